"""Who may import whom: experiments -> flashbutterfly_jax -> pallas_kernels -> jax, with Flax above the core."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAX_FAMILY = {"flax", "optax", "orbax"}

# folder -> top-level modules, and dotted prefixes, that nothing below it may import
FORBIDDEN = {
    "pallas_kernels": {"flashbutterfly_jax", "experiments", "tests"} | FLAX_FAMILY,
    "flashbutterfly_jax": {"experiments", "tests"},
    "flashbutterfly_jax/functional": {
        "flashbutterfly_jax.interop",
        "flashbutterfly_jax.linen",
        "flashbutterfly_jax.models",
        "flashbutterfly_jax.nnx",
        "flashbutterfly_jax.optim",
    }
    | FLAX_FAMILY,
    "experiments": {"pallas_kernels.fft_conv", "tests"},  # its clock and its records they share
}
# Importable with the dependencies of the core alone.
CORE_FILES = ("flashbutterfly_jax/__init__.py", "flashbutterfly_jax/initializers.py", "flashbutterfly_jax/typing.py")
CORE_MAY_IMPORT = {"flashbutterfly_jax", "jax", "jaxtyping", "numpy", "pallas_kernels", "scipy"}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Every module, and every `module.name`, that the source imports anywhere, with relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, package: str, forbidden: set[str]) -> list[str]:
    return [
        module
        for module in imported_modules(source, package)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    ]


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_import_points_upwards(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file, so this test checks nothing"
    found = {
        str(path.relative_to(ROOT)): bad
        for path in files
        if (bad := violations(path.read_text(), package_of(path), FORBIDDEN[folder]))
    }
    assert found == {}


def test_the_core_imports_only_its_declared_dependencies():
    files = [*map(ROOT.__truediv__, CORE_FILES), *(ROOT / "flashbutterfly_jax/functional").rglob("*.py")]
    for path in files:
        # `if TYPE_CHECKING:` blocks name our own modules, so the top-level names are all that matters here.
        roots = {module.split(".")[0] for module in imported_modules(path.read_text(), package_of(path))}
        assert roots - sys.stdlib_module_names <= CORE_MAY_IMPORT, path


@pytest.mark.parametrize(
    ("source", "package", "caught"),
    [
        ("import experiments.digits", "flashbutterfly_jax", True),
        ("from experiments import digits", "flashbutterfly_jax", True),
        ("def f():\n    from experiments.digits import train", "flashbutterfly_jax", True),
        ("from ..linen import LongConv", "flashbutterfly_jax.functional", True),
        ("from .. import linen", "flashbutterfly_jax.functional", True),
        ("from flashbutterfly_jax import linen", "flashbutterfly_jax.functional", True),
        ("import experiments_of_others", "flashbutterfly_jax", False),
        ("from . import experiments", "flashbutterfly_jax", False),
    ],
)
def test_violations_are_seen(source, package, caught):
    assert bool(violations(source, package, {"experiments", "flashbutterfly_jax.linen"})) is caught
