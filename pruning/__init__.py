"""The TinyFusion method (arXiv 2412.01199), readable on its own: torch only, no processes, files or flags."""
