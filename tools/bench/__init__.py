"""Speed and memory of the notebooks, one script each, named by its number: `python -m tools.bench.07`."""
