"""GPU kernels in Pallas for long convolutions, and the clock and the records of their measurements.

A leaf package: it imports JAX and nothing of `flashbutterfly_jax`, and importing it touches no device.
"""
