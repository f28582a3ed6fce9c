"""Ours against PEFT in one process: `python -m benchmarks --help`."""
