"""Makes sure that `pallas_kernels`, a name which others may choose too, is the package that belongs to this one."""

import functools
import importlib.util
from pathlib import Path

_OURS = Path(__file__).resolve().parents[2] / "pallas_kernels"


@functools.cache
def check_pallas_kernels() -> None:
    """Checks once where `import pallas_kernels` leads; runs nothing of what it finds.

    Raises:
      ImportError: if that is nowhere, or not the folder beside `flashbutterfly_jax`.
    """
    spec = importlib.util.find_spec("pallas_kernels")
    folders = [] if spec is None else [Path(folder).resolve() for folder in spec.submodule_search_locations or ()]
    if folders != [_OURS]:
        found = " and ".join(map(str, folders)) or "no package"
        raise ImportError(
            f"flashbutterfly_jax needs the pallas_kernels package in {_OURS}, but `import pallas_kernels` finds "
            f"{found}. Remove or rename that, or move it behind ours on the import path."
        )
