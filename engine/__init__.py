"""Plumbing that the scripts share: flags, processes, runs, files, data, the training loop. Knows nothing of pruning."""
