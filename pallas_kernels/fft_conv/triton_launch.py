"""Calls a Triton kernel through jax-triton, of which few versions go with few of JAX and of Triton."""

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.fft_conv.triton_plans import CARDS, Card, Plan, card_of

# jax-triton -> releases of Triton that it works with, and its keyword for the types of results. All with jax 0.11.
_WORKING: dict[tuple[int, ...], tuple[tuple[tuple[int, ...], ...], str]] = {
    (0, 3): (((3, 6),), "out_shape"),
    (0, 4): (((3, 7), (3, 8)), "out_type"),
}
_JAX = (0, 11)
_WAY_OUT = """Run `pip install "jax<0.12" jax-triton=={} "triton=={}.*"` or use implementation="xla"."""

interpreter: Callable[..., list[jax.Array]] | None = None
"""What tests put in the place of `launch`."""

interpreted_card = "8.6"
"""The compute capability whose plans are interpreted."""


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def complaint(versions: Mapping[str, str | None]) -> str | None:
    """What is wrong with these versions of jax, jax-triton and triton, and which to install; None if nothing is.

    Example:
      >>> complaint({"jax": "0.11.2", "jax-triton": "0.3.1", "triton": "3.6.0"})
      >>> print(complaint({"jax": "0.11.2", "jax-triton": "0.4.1", "triton": "3.6.0"}))
      jax 0.11.2, jax-triton 0.4.1 and triton 3.6.0 do not work together. Run `pip install "jax<0.12" jax-triton==0.3.1
      "triton==3.6.*"` or use implementation="xla".
    """
    triton = _release(versions["triton"] or "0")
    newer = triton in _WORKING[0, 4][0]  # what is there of Triton may stay
    way_out = _WAY_OUT.format(*(("0.4.1", f"{triton[0]}.{triton[1]}") if newer else ("0.3.1", "3.6")))
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return f'implementation "triton" needs {" and ".join(missing)}, not installed here. {way_out}'
    jax_triton = _release(versions["jax-triton"] or "0")
    if _release(versions["jax"] or "0") != _JAX or triton not in _WORKING.get(jax_triton, ((), ""))[0]:
        found = [f"{name} {version}" for name, version in versions.items()]
        return f"{', '.join(found[:-1])} and {found[-1]} do not work together. {way_out}"
    return None


def installed() -> dict[str, str | None]:
    """The versions that matter here, None for what is not there."""
    found: dict[str, str | None] = {}
    for name in ("jax", "jax-triton", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_installed() -> None:
    """Raises NotImplementedError, with the way out, unless versions that work together are installed."""
    if reason := complaint(installed()):
        raise NotImplementedError(reason)


def this_card() -> Card:
    """The card of this process.

    Raises:
      NotImplementedError: if there is none that the kernels are for, or no Triton that works.
    """
    if interpreter is not None:
        return CARDS[interpreted_card]
    check_installed()
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        raise NotImplementedError(
            'implementation "triton" compiles for the CUDA device at hand, and JAX finds none. Use '
            'implementation="xla" or None here.'
        ) from None
    return card_of({device.compute_capability for device in devices})


def launch(
    name: str,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    plan: Plan,
    card: Card,
    constants: dict[str, Any],
) -> list[jax.Array]:
    """Runs a kernel of the plan's module on so many programs; its constants are those and the plan's.

    Raises:
      NotImplementedError: for more programs than a grid has.
    """
    if programs >= 2**31:
        raise NotImplementedError(
            f"the Triton kernels divide the work into fewer than 2**31 programs; this would be {programs}. Split the "
            f"batch."
        )
    itemsize = operands[0].dtype.itemsize
    constants = constants | plan.constants(name, constants, itemsize)
    if interpreter is not None:
        return interpreter(plan.module, name, operands, results, programs, constants)
    try:
        jax_triton = importlib.import_module("jax_triton")
    except ImportError as error:  # without the CUDA plugin of JAX it cannot be imported
        raise NotImplementedError(
            f"jax-triton cannot be imported: {str(error).splitlines()[0]} Install the cuda extra, or use "
            f'implementation="xla".'
        ) from error
    kernels = importlib.import_module(plan.module)
    keyword = _WORKING[_release(importlib.metadata.version("jax-triton"))][1]
    return jax_triton.triton_call(
        *operands,
        kernel=getattr(kernels, name),
        grid=(programs,),
        name=f"fft_conv_{name}",
        num_warps=plan.warps_of(name, constants, itemsize),
        num_stages=plan.stages_of(name),
        compute_capability=int(card.capability.replace(".", "")),
        **{keyword: list(results)},
        **constants,
    )
