"""Plumbing that the scripts share: flags, processes, runs, files, data, the training loop. Knows nothing of pruning."""

# Of pictures; here, so that checks of paths need no more than this.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
