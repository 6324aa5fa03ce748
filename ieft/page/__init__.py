"""The search page: its layout, what its visitors may send, its map, links and API, and the command `ieft-page`."""
