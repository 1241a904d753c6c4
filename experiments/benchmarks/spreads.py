"""A convolution spread over devices: what lies where, what is computed, and what travels for it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from experiments.benchmarks.cases import Case, Inputs
from flashbutterfly_jax import long_conv, long_conv_on_mesh

type Spread = Literal["one", "data", "feature", "data and feature", "by features", "by frequencies"]
"""What is dealt out: nothing, the batch, the features, both, or the steps, exchanged in either way."""

SPREADS: tuple[Spread, ...] = get_args(Spread.__value__)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a case is computed: the mesh of the devices, and what lies where."""

    spread: Spread
    devices: int
    implementation: str

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """Of the axes (data, feature), or of the sequence alone."""
        shape: tuple[int, ...] = (1, self.devices)
        if self.spread == "data":
            shape = (self.devices, 1)
        elif self.spread == "data and feature":
            shape = (2, self.devices // 2)
        elif self.by_step:
            shape = (self.devices,)
        names = ("sequence",) if self.by_step else ("data", "feature")
        chosen = jax.devices()[: self.devices]
        return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=chosen)

    @property
    def by_step(self) -> bool:
        """Whether the steps of a sequence are dealt out."""
        return self.spread in ("by features", "by frequencies")

    def sharding(self, name: str) -> NamedSharding:
        """Of an argument or result by its name."""
        spec = PartitionSpec(None, None, "sequence") if self.by_step else PartitionSpec("data", "feature")
        return NamedSharding(self.mesh, PartitionSpec(*spec[1:]) if name == "kernel" else spec)

    def refusal(self, case: Case) -> str | None:
        """Why the case cannot be dealt out so, if it cannot."""
        batch, features, steps = (self.mesh.shape.get(axis, 1) for axis in ("data", "feature", "sequence"))
        if self.spread == "by features":
            features = self.devices
        elif self.spread == "by frequencies":
            steps = self.devices**2
        for name, size, unit in (("B", case.batch, batch), ("D", case.features, features), ("L", case.length, steps)):
            if size % unit:
                return f"{unit} does not divide {name} = {size}"
        return None

    def program(self, case: Case) -> Callable[[Inputs], dict[str, Array]]:
        """What is timed."""
        circular = case.protocol == "circular"
        if self.by_step:
            split: Any = self.spread.removeprefix("by ")
            convolve = functools.partial(
                long_conv_on_mesh, mesh=self.mesh, axis_name="sequence", split=split, circular=circular
            )
        else:
            convolve = functools.partial(long_conv, circular=circular)
        convolve = functools.partial(convolve, implementation=self.implementation)

        def forward(inputs: Inputs) -> dict[str, Array]:
            return {"y": convolve(inputs["u"], inputs["kernel"])}

        def both(inputs: Inputs) -> dict[str, Array]:
            y, transposed = jax.vjp(convolve, inputs["u"], inputs["kernel"])
            return {"y": y} | dict(zip(case.arguments, transposed(inputs["cotangent"]), strict=True))

        return forward if case.direction == "forward" else both

    def lowered(self, case: Case) -> Any:
        """The program for inputs that lie where they should, not compiled yet."""
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(name))
            for name, x in jax.eval_shape(functools.partial(draw, case)).items()
        }
        results = ("y",) if case.direction == "forward" else ("y", *case.arguments)
        return jax.jit(self.program(case), out_shardings={name: self.sharding(name) for name in results}).lower(shapes)

    def lowered_draw(self, case: Case) -> Any:
        """The program that draws the inputs where they lie, not compiled yet."""
        placed = {name: self.sharding(name) for name in case.inputs}
        return jax.jit(functools.partial(draw, case), out_shardings=placed).lower()


def draw(case: Case) -> Inputs:
    """Standard normal numbers, taps over sqrt(L): the same however they are spread."""
    shape = (case.batch, case.features, case.length)
    keys = dict(zip(case.inputs, jax.random.split(jax.random.key(0), len(case.inputs)), strict=True))
    inputs = {name: jax.random.normal(keys[name], shape, case.dtype) for name in case.inputs if name != "kernel"}
    return inputs | {"kernel": jax.random.normal(keys["kernel"], shape[1:], jnp.float32) * case.length**-0.5}


def sent_bytes(way: Way, case: Case, program: str) -> float:
    """What each device sends in a call.

    By steps as the docstring of `sequence_parallel_long_conv` reckons it, for as many taps as steps: of P parts of what
    is exchanged one stays. By the batch the taps' gradient is summed, and a ring that sums goes around twice; how many
    numbers that takes is read from the compiled program, since each implementation sums another form of it.
    """
    if not way.by_step:
        return 2 * (1 - 1 / way.mesh.shape["data"]) * summed_bytes(program)
    times = 1 if case.direction == "forward" else 2
    steps, sequences = case.length // way.devices, case.batch * case.features
    held = (2 * sequences * case.itemsize + case.features * 4) * steps
    if way.spread == "by frequencies":
        columns = (steps if case.protocol == "circular" else 2 * steps) // 2 + 1
        held += (2 * sequences + case.features) * 8 * math.ceil(columns / way.devices) * way.devices
    return times * (1 - 1 / way.devices) * held


def summed_bytes(program: str) -> int:
    """Bytes of the arrays that a compiled program sums over devices."""
    lines = re.findall(r"= (.*) all-reduce(?:-start)?\(", program)
    shapes = [shape for line in lines for shape in re.findall(r"\b([a-z]+)(\d+)\[([\d,]*)\]", line)]
    return sum(int(bits) // 8 * math.prod(int(n) for n in numbers.split(",") if n) for _, bits, numbers in shapes)


def sampled(x: Array, features: np.ndarray) -> np.ndarray:
    """Some features of an array (..., D, L), fetched from each device by itself: no device ever gathers the whole."""
    got = np.empty((*x.shape[:-2], len(features), x.shape[-1]), np.float64)
    for shard in x.addressable_shards:
        if shard.replica_id:
            continue
        *lead, rows, steps = shard.index
        first, last, _ = rows.indices(x.shape[-2])
        mine = np.flatnonzero((features >= first) & (features < last))
        for place in mine:
            got[(*lead, place, steps)] = np.asarray(shard.data[..., int(features[place]) - first, :])
    return got
