"""Search in an image archive: index, tiles, filters, feature cache, explanations and the command `ieft-search`."""
