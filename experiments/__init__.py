"""Training runs and benchmarks built on flashbutterfly_jax; not part of the wheel."""

import os

# XLA's CPU runtime (jaxlib 0.11.2) can hang in FFTs: one that runs on a worker of the thread pool splits its work over
# the same pool and waits for it, so as many concurrent FFTs as the pool has threads wait for each other for ever. The
# library runs its FFTs in turn; the models written by hand that benchmarks compare it with do not, and on two cores
# three free FFTs in one jit hang within seconds. JAX reads the size of its pool from here when it starts.
os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count() or 1)))
