"""Image-caption collections: sources, archives, downloads, checks, the image reader, prepared splits."""
