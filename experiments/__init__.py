"""Training runs and benchmarks built on flashbutterfly_jax; not part of the wheel."""
