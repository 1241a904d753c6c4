"""Images, as sequences of pixels and as grids."""
