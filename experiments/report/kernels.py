"""The long kernels of a run, from its latest checkpoint: how smooth they are, and what they look like."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import flashbutterfly_jax as fb
from experiments.common.figures import plain, png
from experiments.common.workdir import Row
from flashbutterfly_jax.functional import high_frequency_share, total_variation
from flashbutterfly_jax.optim import label_long_kernels

STORED, USED = "#a9afb9", "#1f5fa8"
LAYERS_SHOWN, KERNELS_SHOWN = 4, 3


@dataclass(frozen=True)
class Kernels:
    """Of all layers, after one step, (layers, R, D, K): R rows of channels, those that look ahead last."""

    step: int

    stored: np.ndarray
    """As they are learned."""

    used: np.ndarray
    """As they are convolved with in evaluation: smoothed and squashed."""

    def variation(self) -> np.ndarray:
        """`flashbutterfly_jax.functional.total_variation` of each, (layers, R, D), NaN where all taps are zero."""
        return self._of_living(total_variation(self.used))

    def high_frequencies(self) -> np.ndarray:
        """`flashbutterfly_jax.functional.high_frequency_share`, likewise."""
        return self._of_living(high_frequency_share(self.used))

    def _of_living(self, values: Any) -> np.ndarray:
        return np.where((self.used != 0).any(-1), values, np.nan)

    def alive(self) -> np.ndarray:
        """Share of the taps of each kernel that are not zero, (layers, R, D)."""
        return np.mean(self.used != 0, axis=-1)


def read(workdir: Path, recipe: Row) -> tuple[Kernels | None, list[str]]:
    """The kernels of the latest checkpoint that can be read, and sentences about those that cannot.

    None if the model has no long kernels of one shape, or there is no checkpoint.
    """
    problems: list[str] = []
    if recipe.get("form") == "grid":
        return None, ["its kernels have two dimensions and are not shown."]
    folders = sorted(
        (path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()),
        key=lambda path: -int(path.name),
    )
    if not folders:
        problems.append("there is no checkpoint, so the kernels are not shown.")
    for folder in folders:
        try:
            stored = long_kernels(folder.absolute() / "default")
        except Exception as error:  # whatever Orbax and its storage find wrong, each with an exception of its own
            line = next(iter(str(error).strip().splitlines()), "")[:200].replace(str(workdir.absolute()), "")
            problems.append(f"the checkpoint of step {folder.name} cannot be read ({type(error).__name__}: {line}).")
            continue
        return (None if stored is None else regularized(int(folder.name), stored, recipe)), problems
    return None, problems


def long_kernels(checkpoint: Path) -> np.ndarray | None:
    """All long kernels in the parameters of a checkpoint, and nothing else of it: (layers, R, D, K)."""
    handler = ocp.PyTreeCheckpointHandler()
    params = handler.metadata(checkpoint).tree["state"]["params"]
    labels = label_long_kernels(params)
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda meta, label: (
            jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=here) if label == "long_kernel" else None
        ),
        params,
        labels,
    )
    item = {"state": {"params": pruned(wanted)}}
    shapes = {leaf.shape[-3:] for leaf in jax.tree.leaves(item)}
    if len(shapes) != 1:
        return None
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    found = jax.tree.leaves(handler.restore(checkpoint, args=arguments))
    return np.concatenate([np.asarray(kernel, np.float32).reshape(-1, *kernel.shape[-3:]) for kernel in found])


def pruned(tree: dict) -> dict:
    """Without what is None, and without the branches that held nothing else."""
    branches = {name: pruned(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: value for name, value in branches.items() if value is not None and value != {}}


def regularized(step: int, stored: np.ndarray, recipe: Row) -> Kernels:
    """What the options of the recipe make of the kernels, as in evaluation."""
    smoothed = fb.smooth(stored, recipe.get("smooth_width", 1))
    return Kernels(step, stored, np.asarray(fb.squash(smoothed, recipe.get("squash_threshold", 0.0))))


def summary(values: np.ndarray) -> str:
    """The median over kernels, and their range."""
    known = values[np.isfinite(values)]
    if not known.size:
        return "–"
    return f"{np.median(known):.3f} ({known.min():.3f} to {known.max():.3f})"


def every_kernel(kernels: Kernels) -> bytes:
    """A JSON file with the figures of each kernel."""
    content = {
        "step": kernels.step,
        "axes": ["layer", "channel, those that look ahead last", "feature"],
        "normalised_total_variation": rounded(kernels.variation()),
        "share_of_energy_above_a_quarter_cycle_per_step": rounded(kernels.high_frequencies()),
        "share_of_taps_alive": rounded(kernels.alive()),
    }
    return (json.dumps(content) + "\n").encode()


def rounded(values: np.ndarray) -> Any:
    """As nested lists with null for what is not a number."""
    numbers = np.round(values, 4).astype(object)
    numbers[np.isnan(values)] = None
    return numbers.tolist()


def picture(kernels: Kernels) -> bytes:
    """A PNG: the strongest kernels of some layers by lag, and the mean spectrum of all kernels of each of these."""
    layers = np.unique(np.linspace(0, len(kernels.used) - 1, LAYERS_SHOWN).round().astype(int))
    figure = Figure(figsize=(13, 1.9 * len(layers) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(layers), KERNELS_SHOWN + 1, squeeze=False)
    for axes_of_row, layer in zip(grid, layers, strict=True):
        energy = np.square(kernels.used[layer]).sum(-1)
        strongest = np.argsort(-energy, axis=None)[:KERNELS_SHOWN]
        for axes, place in zip(axes_of_row, strongest, strict=False):
            row, feature = np.unravel_index(place, energy.shape)
            axes.plot(kernels.stored[layer, row, feature], color=STORED, lw=0.8, label="stored")
            axes.plot(kernels.used[layer, row, feature], color=USED, lw=0.6, label="used")
            axes.set_title(f"layer {layer + 1}, channel {row}, feature {feature}", fontsize=8, loc="left")
            axes.set_xlabel("lag (steps)", fontsize=8)
            plain(axes)
        for axes in axes_of_row[len(strongest) : KERNELS_SHOWN]:
            axes.set_axis_off()
        spectrum(axes_of_row[-1], kernels, layer)
    grid[0, 0].legend(frameon=False, fontsize=7)
    return png(figure)


def spectrum(axes: Axes, kernels: Kernels, layer: int) -> None:
    """The mean power of a layer's kernels over the frequency, in decibels below the stored ones' peak."""
    stored, used = mean_power(kernels.stored[layer]), mean_power(kernels.used[layer])
    peak = max(float(stored.max()), float(np.finfo(np.float32).tiny))
    for power, colour in ((stored, STORED), (used, USED)):
        frequencies = np.linspace(0, 0.5, len(power))
        axes.plot(frequencies, 10 * np.log10(np.maximum(power / peak, 1e-6)), color=colour, lw=0.8)
    axes.set(xlim=(0, 0.5))
    axes.set_title(f"layer {layer + 1}, mean power, dB", fontsize=8, loc="left")
    axes.set_xlabel("cycles per step", fontsize=8)
    plain(axes)


def mean_power(kernels: np.ndarray) -> np.ndarray:
    """Of kernels (R, D, K), by frequency."""
    return np.square(np.abs(np.fft.rfft(kernels))).mean((0, 1))
