"""How long a training step of each paper recipe takes: `python -m experiments.lra.step_times --help`."""
