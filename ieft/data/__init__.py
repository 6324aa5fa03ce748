"""Collections of images and captions as splits: sources, archives, downloads, checks, the image reader."""
