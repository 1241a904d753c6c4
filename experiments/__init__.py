"""Training runs and benchmarks built on flashbutterfly_jax; not part of the wheel."""

import os

# XLA's CPU runtime (jaxlib 0.11.2) can hang in FFTs: one that runs on a worker of the thread pool splits its work over
# the same pool and waits for it, so as many concurrent FFTs as the pool has threads wait for each other for ever. On
# two cores three FFTs in one jit hang within seconds, always. One layer and its gradient run at most three at a time,
# so a pool of 16 threads, read from here before JAX starts, has workers left. It costs no time: the cores are as busy.
os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count() or 1)))
