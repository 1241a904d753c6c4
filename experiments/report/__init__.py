"""One page of many runs: `python -m experiments.report --help`."""
