"""Search in an archive: index, tiles, filters, feature cache, explanations, the command ieft-search."""
