"""One command that shows what this project does on a GPU: `python -m benchmarks.gpu`."""
