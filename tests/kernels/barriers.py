"""Finds what the threads of a warpgroup share without a barrier between, which the interpreter cannot: to it, a
warpgroup is one thread.

A kernel without automatic barriers is traced, and the trace is walked as each warpgroup of its first block would walk
it: scalars are computed, matrices are not, and of every loop a few turns are taken. For each number in shared memory it
is known what happened to it since the last barrier. All loads and stores by threads use one layout, so that a number
belongs to one thread, and these order their own loads and stores. What else must lie between two accesses:

* store, then a product's or a copy's read: a commit, which makes the stores of all threads visible to these
* load, then the write of a copy that comes in: a barrier, since one thread starts it while others may still load
* a product's read, then a store or a write: that it was awaited, and a barrier, since each warp awaits its own part
* the read of a copy that goes out, then a store or a write: that it was awaited

Commits are barriers too, and so is to wait for copies that go out, or for all of those who arrive at a barrier.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import core
from jax._src.state.indexing import NDIndexer, Slice

TURNS = 3
"""Of each loop: the longest ring of places comes around in so many, or in one that is written out."""

_SHIFT = 31  # the kernels' opaque zeros are their steps shifted right by this operand


@dataclasses.dataclass(frozen=True)
class Fault:
    """Two accesses to the same numbers of a buffer without what must lie between them."""

    warpgroup: int
    buffer: tuple[int, ...]
    """Its shape."""
    earlier: str
    later: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """Of a kernel: what its warpgroups run."""

    jaxpr: core.Jaxpr
    warpgroups: int
    automatic: bool
    """Whether Mosaic puts barriers into it."""

    @classmethod
    def of(cls, kernel, operands) -> "Trace":
        """That of a kernel for such operands."""
        equations = _equations(jax.make_jaxpr(kernel)(*operands).jaxpr)
        (launch,) = (equation for equation in equations if equation.primitive.name == "mpmd_map")
        (mesh,), (jaxpr,) = launch.params["meshes"], launch.params["jaxprs"]
        return cls(jaxpr, mesh.num_threads, not launch.params["compiler_params"].unsafe_no_auto_barriers)

    @property
    def commits(self) -> list[core.JaxprEqn]:
        """As they stand in it."""
        return [equation for equation in _equations(self.jaxpr) if equation.primitive.name == "commit_smem"]

    def faults(self, without: core.JaxprEqn | None = None) -> set[Fault]:
        """Its faults, or those that it would have without one of its commits."""
        return {fault for group in range(self.warpgroups) for fault in _Warpgroup(group, without).walk(self.jaxpr)}


def _equations(jaxpr) -> Iterator[core.JaxprEqn]:
    """All of them, also those of the functions within; of one that is used twice, once."""
    seen: set[int] = set()

    def of(jaxpr):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) in seen:
            return
        seen.add(id(jaxpr))
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from of(inner)

    return of(jaxpr)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


class _Buffer:
    """A reference's memory, and for each of its numbers what it went through since the last barrier."""

    def __init__(self, aval):
        self.aval = aval
        self.shape: tuple[int, ...] | None = None  # known once it is indexed: that of the aval is cut into tiles
        self.since: dict[str, np.ndarray] = {}

    def part(self, transforms) -> tuple[slice, ...]:
        """What transforms select, of all axes; they begin with the tiles, which say nothing about the part."""
        indexers = [t for t in transforms if isinstance(t, NDIndexer)]
        if not indexers:
            return (slice(None),) * len(self.shape or ())
        if self.shape is None:
            self.shape = tuple(indexers[0].shape)
        starts, sizes, kept = [0] * len(self.shape), list(self.shape), list(range(len(self.shape)))
        for indexer in indexers:
            left = []
            for axis, index in zip(kept, indexer.indices, strict=True):
                if isinstance(index, Slice):
                    assert index.stride == 1
                    starts[axis], sizes[axis] = starts[axis] + int(index.start), index.size
                    left.append(axis)
                else:
                    starts[axis], sizes[axis] = starts[axis] + int(index), 1
            kept = left
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

    def mark(self, what: str, part):
        self.since.setdefault(what, np.zeros(self.shape or (), bool))[part] = True

    def marked(self, what: str, part) -> bool:
        return what in self.since and bool(self.since[what][part].any())


class _Warpgroup:
    """One of them, walking through the trace."""

    def __init__(self, number: int, lacks: core.JaxprEqn | None):
        self.axes = {"block": 0, "warpgroup": number}
        self.lacks = lacks
        self.buffers: list[_Buffer] = []
        self.arrived: set[Any] = set()
        self.going_out: collections.deque = collections.deque()
        self.found: set[Fault] = set()

    def walk(self, jaxpr) -> set[Fault]:
        self.run(jaxpr, [self.new(v.aval) for v in jaxpr.invars])
        return self.found

    def new(self, aval) -> _Buffer:
        self.buffers.append(_Buffer(aval))
        return self.buffers[-1]

    def run(self, jaxpr, arguments: list, constants=()) -> list:
        values = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            step = getattr(self, f"_{equation.primitive.name}", None)
            operands = [read(atom) for atom in equation.invars]
            results = step(equation, *operands) if step else self.compute(equation, operands)
            values.update(zip(equation.outvars, results or [], strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def compute(self, equation, operands) -> list:
        """Scalars of scalars; whatever is as large as a matrix, or comes from one, is None."""
        known = all(operand is not None and not isinstance(operand, _Buffer) for operand in operands)
        if not known or any(v.aval.shape for v in equation.outvars):
            return [None] * len(equation.outvars)
        result = _SCALARS[equation.primitive.name](*operands)
        return [np.asarray(result, equation.outvars[0].aval.dtype)[()]]

    # What is between accesses.

    def barrier(self):
        for buffer in self.buffers:
            buffer.since.pop("loaded", None)
            buffer.since.pop("multiplied", None)

    def _commit_smem(self, equation):
        if equation is self.lacks:
            return
        self.barrier()
        for buffer in self.buffers:
            buffer.since.pop("stored", None)

    def _barrier_arrive(self, equation, barrier, *indices):
        self.arrived.add(self.key(equation, barrier, indices))

    def _barrier_wait(self, equation, barrier, *indices):
        key = self.key(equation, barrier, indices)
        if key in self.arrived:  # else it waits for copies, which no other thread takes part in
            self.arrived.remove(key)
            self.barrier()

    def key(self, equation, barrier, indices):
        transforms = jax.tree.unflatten(equation.params["transforms_treedef"], indices)
        return id(barrier), tuple(int(i) for t in transforms for i in t.indices if not isinstance(i, Slice))

    def _wait_smem_to_gmem(self, equation):
        while len(self.going_out) > equation.params["n"]:
            self.going_out.popleft()
        self.barrier()

    def _wgmma_accumulator_deref_p(self, equation, accumulator):
        for buffer in self.buffers:
            if "in a product" in buffer.since:
                buffer.mark("multiplied", buffer.since.pop("in a product"))
        return [None]

    # Accesses.

    def access(self, buffer: _Buffer, transforms, how: str, conflicts: tuple[str, ...]):
        part = buffer.part(transforms)
        clashes = [what for what in conflicts if buffer.marked(what, part)]
        if how in ("stored", "copied in"):
            clashes += ["copied out"] * any(b is buffer and _overlap(part, p) for b, p in self.going_out)
        for what in clashes:
            self.found.add(Fault(self.axes["warpgroup"], buffer.shape or (), what, how))
        return part

    def _load(self, equation, ref, *indices):
        if _shared(ref):
            transforms = jax.tree.unflatten(equation.params["tree"], indices)
            ref.mark("loaded", self.access(ref, transforms, "loaded", ()))
        return [None]

    def _swap(self, equation, ref, value, *indices):
        if _shared(ref):
            transforms = jax.tree.unflatten(equation.params["tree"], indices)
            ref.mark("stored", self.access(ref, transforms, "stored", ("multiplied", "in a product")))
        return [None]

    def _get(self, equation, ref, *indices):
        return [_SHIFT if equation.outvars[0].aval.dtype == np.int32 else None]

    def _wgmma_ref(self, equation, accumulator, a, b, *indices):
        leaves = list(indices)
        for operand, name in ((a, "a_transforms_tree"), (b, "b_transforms_tree")):
            tree = equation.params[name]
            if tree is not None:
                transforms = jax.tree.unflatten(tree, [leaves.pop(0) for _ in range(tree.num_leaves)])
                operand.mark("in a product", self.access(operand, transforms, "multiplied", ("stored",)))

    def _copy_gmem_to_smem(self, equation, source, target, barrier, *indices):
        size = equation.params["src_transforms_treedef"].num_leaves
        tree = equation.params["dst_transforms_treedef"]
        transforms = jax.tree.unflatten(tree, indices[size : size + tree.num_leaves])
        self.access(target, transforms, "copied in", ("stored", "loaded", "multiplied", "in a product"))

    def _copy_smem_to_gmem(self, equation, source, target, *indices):
        tree = equation.params["src_transforms_treedef"]
        transforms = jax.tree.unflatten(tree, indices[: tree.num_leaves])
        self.going_out.append((source, self.access(source, transforms, "copied out", ("stored",))))

    # Control.

    def _axis_index(self, equation):
        return [np.int32(self.axes[equation.params["axis_name"]])]

    def _cond(self, equation, index, *operands):
        branch = equation.params["branches"][int(index)]
        return self.run(branch.jaxpr, list(operands), branch.consts)

    def _scan(self, equation, *operands):
        body = equation.params["jaxpr"]
        constants = len(operands) - len(body.out_avals)  # nothing but constants and what a turn hands to the next
        carry = list(operands[constants:])
        for _ in range(min(equation.params["length"], TURNS)):
            carry = self.run(body.jaxpr, [*operands[:constants], *carry], body.consts)
        return carry

    def _jit(self, equation, *operands):
        inner = equation.params["jaxpr"]
        return self.run(inner.jaxpr, list(operands), inner.consts)

    def _run_scoped(self, equation, *operands):
        inner = equation.params["jaxpr"]
        return self.run(inner, [self.new(v.aval) for v in inner.invars], operands)


def _shared(ref: _Buffer) -> bool:
    return "smem" in str(ref.aval)


def _overlap(a, b) -> bool:
    return all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True))


_SCALARS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: int(a / b),
    "rem": np.fmod,
    "neg": np.negative,
    "sign": np.sign,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": lambda a: not a,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "select_n": lambda which, *cases: cases[int(which)],
    "convert_element_type": lambda a: a,
    "multiple_of": lambda a: a,
    "shift_right_logical": np.right_shift,
}
