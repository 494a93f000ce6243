"""What fnqueue costs, as a ratio to a direct POST measured in the same run: `python -m benchmarks`."""
