"""GPU kernels in Pallas for long convolutions.

A leaf package: it imports JAX and nothing of `flashbutterfly_jax`, and importing it touches no device.
It holds no kernel yet.
"""
