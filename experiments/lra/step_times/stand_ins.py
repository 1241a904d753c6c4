"""Lets recipes be read on a machine without the libraries that read data, which their options do not need."""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

OF_DATA = ("grain", "sklearn", "PIL", "tensorflow_datasets", "orbax", "tyro", "matplotlib", "rich")


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of the packages that are not installed, all of them empty."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        self.missing = missing

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.split(".")[0] in self.missing else None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __spec__=spec, __path__=[])

    def exec_module(self, module) -> None: ...


def install() -> tuple[str, ...]:
    """Makes imports of missing data libraries succeed in this process, and returns their names."""
    missing = tuple(name for name in OF_DATA if importlib.util.find_spec(name) is None)
    if missing:
        sys.meta_path.append(_Finder(missing))
    return missing
