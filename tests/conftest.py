"""Settings that must be made before JAX touches a device."""

import os

# Eight devices share one pool of threads, as many as there are cores, and FFTs that wait for a thread of it can hang.
os.environ.setdefault("PJRT_NPROC", "16")


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        # A CUDA plugin that finds no driver complains on import, and warnings are errors here.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)  # sharding is tested on eight devices that one CPU pretends to be
