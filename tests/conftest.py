"""Settings that must be made before JAX touches a device."""

import os
import shutil
import tempfile

# Eight devices share one pool of threads, as many as there are cores, and FFTs that wait for a thread of it can hang.
os.environ.setdefault("PJRT_NPROC", "16")


# XLA emits fused operations through LLVM alone instead of through passes of MLIR, and each program in one piece instead
# of up to 32, which costs memory and time where there are two cores. tests/functional/test_learned_butterfly.py took
# 31 s of a core, the second alone 30 s, the first alone 22 s, both 18 s, 6 of them before the first test runs;
# test_xla.py 90 s on a busy machine, with both 56 s.
QUICK_TO_COMPILE = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        # A CUDA plugin that finds no driver complains on import, and warnings are errors here.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if config.option.markexpr == "not slow and not gpu":
        spare_compilation(config)
    import jax

    jax.config.update("jax_num_cpu_devices", 8)  # sharding is tested on eight devices that one CPU pretends to be


def spare_compilation(config):
    """Compiles programs with few optimisations and each but once, here and in the processes that tests start.

    Compiling small programs is most of what the fast tests do. Their tolerances are the same as those of `make
    test-all`, which runs all tests, these too, with all of the compiler. Workers of one run share nothing: one could
    read what another has half written.
    """
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    os.environ["XLA_FLAGS"] = " ".join([*QUICK_TO_COMPILE, os.environ.get("XLA_FLAGS", "")])  # the last one holds
    if "JAX_COMPILATION_CACHE_DIR" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
