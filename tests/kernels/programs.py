"""Every kernel that ships, as programs to lower or to compile: each configuration, dtype and extreme of options.

A new kernel needs a builder and a line in `_KERNELS`, or programs of its own in `PROGRAMS`; `resources` says the rest.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import (
    block_toeplitz,
    blocked_backward_sm90,
    blocked_sm90,
    inner_rows,
    inner_sm90,
    inner_transform_sm90,
    kernel_sm90,
    learned_backward_sm90,
    learned_outer_sm90,
    learned_paired_sm90,
    learned_rows,
    learned_rows_backward_sm90,
    learned_rows_forward_sm90,
    learned_rows_transform_sm90,
    learned_sm90,
    outer_panels,
    outer_radix4_sm90,
    outer_radix_sm90,
    outer_sm90,
    spectrum_sm90,
    streamed_gradient_sm90,
    streamed_sm90,
    three_pass,
    tiles,
)
from pallas_kernels.fft_conv.config import BLOCK, N1, TILE, Config, Kernel
from pallas_kernels.fft_conv.mosaic import PIECE
from pallas_kernels.fft_conv.outer_plan import RADICES, OuterPlan, inner_tables
from pallas_kernels.fft_conv.rearranged import fragment_shape
from pallas_kernels.fft_conv.tables import convolution_tables, dft_tables
from pallas_kernels.fft_conv.tuned import configuration

DTYPES = ("bfloat16", "float16")
FEATURES = 768


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel with a configuration.

    Attributes:
      name: the kernel's.
      builder: makes of the program the kernel and its operands, `jax.ShapeDtypeStruct`s; a function of a module, or a
        partial of one, whose sources tell when the program changes.
      config: its own unless the program is to try another.
      options: False for the shortest code that its dispatch allows; True for everything at once: a sequence shorter
        than the transform, a count that ends inside a tile, and of a gated kernel both gates, each channel its own. For
        the taps, False is on one side, fewer than points, and True on both.
      function: the name that the kernel has where it is lowered.
    """

    name: str
    builder: Callable[["Program"], tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]
    config: Any
    dtype: str
    options: bool
    function: str

    def __str__(self) -> str:
        config = f"n2 = {self.config.n2}" if isinstance(self.config, Config) else str(self.config)
        return f"{self.name}, {config}, {self.dtype}, options {'on' if self.options else 'off'}"

    def build(self):
        """The kernel and its operands."""
        return self.builder(self)


def _tables(config, dtype):
    return jax.eval_shape(lambda: (*convolution_tables(*dft_tables(config, dtype)), jnp.zeros(1, jnp.int32)))


def _shapes(program: Program, channels: int, gated: bool) -> tiles.Shapes:
    batch, length = 64 - program.options, N1 - 8 * program.options
    post_gates = (channels if program.options else 1) if gated else 0
    dtype = jnp.dtype(program.dtype)
    return tiles.Shapes(batch, channels, FEATURES, length, dtype, gated and program.options, post_gates)


def _rows(shapes: tiles.Shapes | block_toeplitz.Shapes, n2: int, channels: int | None = None) -> jax.ShapeDtypeStruct:
    """Sequences, `(B, D, rows, n2)`, or those of channels."""
    of_channels = () if channels is None else (channels,)
    return jax.ShapeDtypeStruct((shapes.batch, *of_channels, shapes.features, shapes.length, n2), shapes.dtype)


def _forward(program: Program, *, channels: int, gated: bool):
    config, shapes = program.config, _shapes(program, channels, gated)
    u, gate = _rows(shapes, config.n2), _rows(shapes, config.n2, max(shapes.post_gates, 1))
    spectrum = jax.ShapeDtypeStruct((FEATURES, 2 * channels, N1, config.n2), shapes.dtype)
    return kernel_sm90.forward(config, shapes), (u, u, gate, spectrum, *_tables(config, shapes.dtype))


def _backward(program: Program, *, gated: bool):
    config, shapes = program.config, _shapes(program, 1, gated)
    u, g = _rows(shapes, config.n2), _rows(shapes, config.n2, 1)
    spectrum = jax.ShapeDtypeStruct((FEATURES, 2, N1, config.n2), shapes.dtype)
    return kernel_sm90.backward(config, shapes), (u, u, g, g, spectrum, *_tables(config, shapes.dtype))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Of a kernel by blocks: how many a sequence has, and the lags of those of its taps."""

    count: int
    lags: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.count} blocks, lags {self.lags[0]} to {self.lags[1]}"


def _blocked_shapes(program: Program) -> block_toeplitz.Shapes:
    on, blocks = program.options, program.config
    length = N1 * blocks.count - 8 * on
    dtype = jnp.dtype(program.dtype)
    return block_toeplitz.Shapes(
        64 - on, 1, FEATURES, length, blocks.lags, dtype, pre_gates=int(on), post_gates=int(on)
    )


def _blocked_operands(shapes: block_toeplitz.Shapes):
    f1, *tables = _tables(Config(TILE), shapes.dtype)
    return _rows(shapes, TILE, 1), (jax.ShapeDtypeStruct((2, *f1.shape[1:]), f1.dtype), *tables)


def _blocked_forward(program: Program):
    shapes = _blocked_shapes(program)
    u, tables = _blocked_operands(shapes)
    spectra = jax.ShapeDtypeStruct((*shapes.spectra, 2, N1, TILE), shapes.dtype)
    return blocked_sm90.forward(shapes), (u, u, u, spectra, *tables)


def _blocked_backward(program: Program):
    shapes = _blocked_shapes(program)
    u, tables = _blocked_operands(shapes)
    spectra = jax.ShapeDtypeStruct((*shapes.spectra, 2, N1, TILE), shapes.dtype)
    return blocked_backward_sm90.backward(shapes), (u, u, u, u, *[spectra] * shapes.dx_fits, *tables)


def _streamed_forward(program: Program):
    shapes = _blocked_shapes(program)
    u, tables = _blocked_operands(shapes)
    f1, f2, twiddle, shift = tables
    spectra, twiddle = (
        jax.ShapeDtypeStruct((*outer, TILE // PIECE, *fragment_shape(dtype)), dtype)
        for outer, dtype in ((shapes.spectra, shapes.dtype), ((), jnp.float32))
    )
    return streamed_sm90.forward(shapes), (u, u, u, spectra, f1, f2, twiddle, shift)


def _streamed_adjoint(program: Program):
    shapes = dataclasses.replace(_blocked_shapes(program), pre_gates=0, post_gates=0)
    g, _, _, spectra, *tables = _streamed_forward(program)[1]
    return streamed_sm90.adjoint(shapes), (g, spectra, *tables)


def _streamed_transform(program: Program):
    shapes = dataclasses.replace(_blocked_shapes(program), pre_gates=0, post_gates=0)
    u, _, _, _, *tables = _streamed_forward(program)[1]
    return streamed_gradient_sm90.transform(shapes), (u, *tables)


def _streamed_taps_gradient(program: Program):
    shapes = _blocked_shapes(program)
    spectra = streamed_sm90.spectra_of(1, shapes)
    return streamed_gradient_sm90.taps_gradient(shapes), (spectra, spectra)


def _streamed_spectrum(program: Program):
    """Of the taps for it; options are fewer features."""
    dtype, config = jnp.dtype(program.dtype), Config(TILE)
    taps = jax.ShapeDtypeStruct((FEATURES - program.options, program.config.count, BLOCK), jnp.float32)

    def transform(taps, *tables):
        return spectrum_sm90.tap_spectra(taps, config, dtype, *tables, before=False, in_fragments=True)

    return transform, (taps, *jax.eval_shape(lambda: (*dft_tables(config, jnp.float32), jnp.zeros(1, jnp.int32))))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of a kernel for long sequences: rows of 4096 or 2048 steps, and whether it joins instead of splitting them."""

    plan: OuterPlan
    join: bool = False

    def __str__(self) -> str:
        plan = self.plan
        rows = f"{plan.rows} rows" if plan.radix == 1 else f"{plan.radix} x {plan.height} rows"
        return f"{rows} of {plan.row_height} x {plan.row_width}" if plan.paired else rows


def _inner_operands(program: Program, warpgroups: int | None = None):
    """For so many warpgroups, or as many as have registers."""
    dtype, plan, rows = jnp.dtype(program.dtype), program.config.plan, program.config.plan.rows
    tile = {"height": plan.row_height, "width": plan.row_width, "together": 1 + plan.paired}
    warpgroups = warpgroups or three_pass.warpgroups(plan)
    shapes = inner_rows.Shapes(16 - program.options, 1, FEATURES, rows, dtype, warpgroups=warpgroups, **tile)
    elementwise = jnp.float32 if plan.paired else dtype
    spectrum = jax.ShapeDtypeStruct((FEATURES, 1, rows, *shapes.spectrum), elementwise)
    tables = jax.eval_shape(lambda: inner_tables(plan, dtype))
    return shapes, (spectrum, *tables, jax.ShapeDtypeStruct((1,), jnp.int32))


def _inner_forward(program: Program):
    shapes, operands = _inner_operands(program)
    return inner_sm90.forward(shapes), (shapes.result, *operands)


def _inner_backward(program: Program):
    shapes, operands = _inner_operands(program, 2)
    return inner_sm90.backward(shapes), (shapes.result, shapes.result, *operands)


def _taps_operands(program: Program):
    """Those of the inner transform of taps, which is in float16 for any spectra."""
    shapes, (_, *tables, shift) = _inner_operands(dataclasses.replace(program, dtype="float16"))
    shapes = dataclasses.replace(shapes, batch=FEATURES - program.options, features=1, together=1)
    return shapes, (*tables, shift)


def _taps_forward(program: Program):
    shapes, operands = _taps_operands(program)
    scale = jax.ShapeDtypeStruct((shapes.batch,), jnp.float32)
    return inner_transform_sm90.forward(shapes, jnp.dtype(program.dtype)), (shapes.result, scale, *operands)


def _taps_inverse(program: Program):
    shapes, operands = _taps_operands(program)
    return inner_transform_sm90.inverse(shapes), (shapes.result, *operands)


def _outer_stage(program: Program):
    plan, join, on = program.config.plan, program.config.join, program.options
    ins, outs = (2 * plan.rows, plan.rows) if join else (plan.rows, 2 * plan.rows)
    dtype = jnp.dtype(program.dtype)
    shapes = outer_sm90.Shapes(16, 1, FEATURES, ins, outs, dtype, 1, int(on), on and not join, plan.steps // TILE)
    source = dataclasses.replace(shapes, rows_out=ins).result
    gate = dataclasses.replace(shapes, rows_out=plan.rows).result
    matrix = jax.ShapeDtypeStruct((shapes.tiles_out, N1, N1 * shapes.tiles_in), dtype)
    return outer_sm90.stage(shapes), (source, gate, matrix)


def _outer_radix(program: Program):
    plan, join, dtype = program.config.plan, program.config.join, jnp.dtype(program.dtype)
    shapes = outer_panels.Shapes(64, plan.rows - 8 * program.options, plan, dtype)
    source = outer_panels.Panels(shapes).z if join else (shapes.rows, BLOCK)
    source = jax.ShapeDtypeStruct((64, *source), dtype)
    tables = [(plan.radix, 2, N1), (plan.radix, 2, plan.radix)]
    tables = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in tables]
    kernel = outer_radix_sm90.join if join else outer_radix_sm90.split
    return kernel(shapes), (source, jax.ShapeDtypeStruct((3, N1, N1), dtype), *tables)


def _outer_radix4(program: Program):
    plan, join, dtype = program.config.plan, program.config.join, jnp.dtype(program.dtype)
    shapes = outer_panels.Shapes(64, plan.rows - 32 * program.options, plan, dtype)
    source = outer_panels.Panels(shapes).z if join else (shapes.rows // 4, 4 * BLOCK)
    f, factors = jax.ShapeDtypeStruct((2, N1, N1), dtype), jax.ShapeDtypeStruct((3, 2, N1), jnp.float32)
    kernel = outer_radix4_sm90.join if join else outer_radix4_sm90.split
    return kernel(shapes), (jax.ShapeDtypeStruct((64, *source), dtype), f, factors)


def _spectrum(program: Program):
    config, options = program.config, program.options
    length = config.points - 8 * config.n2 * (not options)  # taps on both sides are never fewer
    taps = jax.ShapeDtypeStruct((FEATURES - options, 1 + options, length), jnp.float32)

    def transform(taps, *tables):
        return spectrum_sm90.tap_spectra(taps, config, jnp.dtype(program.dtype), *tables, before=options)

    return transform, (taps, *jax.eval_shape(lambda: (*dft_tables(config, jnp.float32), jnp.zeros(1, jnp.int32))))


@dataclasses.dataclass(frozen=True)
class Learned:
    """Of a kernel with learned blocks: its second factor, and of the backward ones which launch, from 0."""

    n2: int
    launch: int | None = None

    def __str__(self) -> str:
        return f"n2 = {self.n2}" if self.launch is None else f"n2 = {self.n2}, launch {self.launch + 1}"

    @property
    def derives_u(self) -> bool:
        """Whether the launch is the first of two."""
        return self.launch == 0


def _learned_operands(program: Program):
    n2, dtype = program.config.n2, jnp.dtype(program.dtype)
    shapes = tiles.Shapes(64 - program.options, 1, FEATURES, N1 - 8 * program.options, dtype)
    spectrum = jax.ShapeDtypeStruct((FEATURES, 2, N1, n2), dtype)
    blocks = {"first": (2, N1, N1), "second": (2, n2, 2 * n2), "back": (2, n2, 2 * n2), "twiddle": (2, N1, n2)}
    blocks = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in blocks.items()}
    return shapes, spectrum, blocks, jax.ShapeDtypeStruct((1,), jnp.int32)


def _learned_forward(program: Program):
    n2 = program.config.n2
    shapes, spectrum, blocks, shift = _learned_operands(program)
    tables = (blocks[name] for name in ("first", "second", "first", "second", "twiddle"))
    kernel = learned_sm90.forward(learned_sm90.default_config(n2), shapes)
    return kernel, (_rows(shapes, n2), spectrum, *tables, shift)


def _learned_backward(program: Program):
    n2, derives_u = program.config.n2, program.config.derives_u
    shapes, spectrum, blocks, shift = _learned_operands(program)
    tables = (blocks[name.split("_")[-1]] for name in learned_backward_sm90.tables(derives_u))
    kernel = learned_backward_sm90.backward(learned_backward_sm90.default_config(n2), shapes, derives_u)
    return kernel, (_rows(shapes, n2), _rows(shapes, n2), spectrum, shift, *tables)


def _learned_paired(program: Program):
    shapes, spectrum, blocks, shift = _learned_operands(program)
    both = jax.ShapeDtypeStruct((2, *blocks["first"].shape), shapes.dtype)
    rows = _rows(shapes, TILE)
    return learned_paired_sm90.backward(shapes), (rows, rows, spectrum, shift, both, both, blocks["twiddle"])


def _learned_rows_operands(program: Program):
    dtype, rows = jnp.dtype(program.dtype), program.config.plan.rows
    shapes = learned_rows.Shapes(16 - program.options, FEATURES - program.options, rows, dtype)
    of_row = jax.ShapeDtypeStruct((rows, 2, N1, TILE), dtype)
    spectrum = jax.ShapeDtypeStruct((shapes.features, *of_row.shape), dtype)
    return shapes, spectrum, of_row, jax.ShapeDtypeStruct((1,), jnp.int32)


def _learned_rows_forward(program: Program):
    shapes, spectrum, twiddle, shift = _learned_rows_operands(program)
    second = jax.ShapeDtypeStruct(twiddle.shape[1:], shapes.dtype)
    first = jax.ShapeDtypeStruct((shapes.rows, 3, N1, N1), shapes.dtype)
    tables = learned_rows_forward_sm90.Tables(first, second, first, second, twiddle)
    return learned_rows_forward_sm90.forward(shapes), (shapes.sequences, spectrum, *tables, shift)


def _learned_rows_transform(program: Program):
    """In float16, whatever the spectra are in."""
    shapes, _, twiddle, shift = _learned_rows_operands(dataclasses.replace(program, dtype="float16"))
    shapes = dataclasses.replace(shapes, batch=shapes.features, features=1)
    first, second = (jax.ShapeDtypeStruct((*planes, N1, N1), shapes.dtype) for planes in ((shapes.rows, 3), (2,)))
    scale = jax.ShapeDtypeStruct((shapes.batch,), jnp.float32)
    kernel = learned_rows_transform_sm90.transform(shapes, jnp.dtype(program.dtype))
    return kernel, (shapes.sequences, scale, first, second, twiddle, shift)


def _learned_rows_backward(program: Program):
    shapes, spectrum, twiddle, shift = _learned_rows_operands(program)
    first, second = (jax.ShapeDtypeStruct((2, *rows, 2, N1, N1), shapes.dtype) for rows in ((shapes.rows,), ()))
    sequences = shapes.sequences
    return learned_rows_backward_sm90.backward(shapes), (sequences, sequences, spectrum, shift, first, second, twiddle)


def _learned_outer(program: Program):
    plan, on, dtype = program.config.plan, program.options, jnp.dtype(program.dtype)
    rows = 8 if on and plan.rows < 8 else plan.rows - 8 * on  # few are padded
    shapes = learned_outer_sm90.Shapes(
        (16 - on) * (FEATURES - 2 * on), 2 * plan.rows, rows, dtype, joins=program.config.join
    )
    z, x = (jax.ShapeDtypeStruct((shapes.sequences * count, N1, TILE), dtype) for count in (2 * plan.rows, rows))
    matrix = jax.ShapeDtypeStruct((N1, N1 * shapes.own), dtype)
    return learned_outer_sm90.product(shapes), (z, x, *[matrix] * shapes.joins)


_KERNELS = {
    Kernel.FORWARD: ("fft_conv_forward", functools.partial(_forward, channels=1, gated=False)),
    Kernel.FORWARD_GATED: ("fft_conv_forward", functools.partial(_forward, channels=1, gated=True)),
    Kernel.FORWARD_CHANNELS: ("fft_conv_forward", functools.partial(_forward, channels=2, gated=False)),
    Kernel.FORWARD_CHANNELS_GATED: ("fft_conv_forward", functools.partial(_forward, channels=2, gated=True)),
    Kernel.BACKWARD: ("fft_conv_backward", functools.partial(_backward, gated=False)),
    Kernel.BACKWARD_GATED: ("fft_conv_backward", functools.partial(_backward, gated=True)),
}

# Causal, its adjoint, both sides; with four blocks those take two launches.
_LAGS = {2: ((0, 1), (-1, 0), (-1, 1)), 3: ((0, 2), (-2, 0), (-2, 2)), 4: ((0, 3), (-3, 0), (1, 3))}

_INNER = OuterPlan(1, 16), OuterPlan(1, 32, BLOCK // 2, True)
_WIDE = OuterPlan(4, N1, paired=True)
_DIRECT = (
    *(OuterPlan(1, m) for m in (8, 16, 64, 128)),
    *(OuterPlan(1, m, BLOCK // 2, True) for m in (16, 32, 128)),
)
_BY_TWO_FACTORS = tuple(OuterPlan(radix, N1, paired=paired) for radix in RADICES for paired in (False, True))

# Of long sequences: name, builder, configuration, function.
_LONG: tuple[tuple[str, Any, Any, str], ...] = (
    *(
        ("forward", _streamed_forward, Blocks(count, (0, count - 1)), "fft_conv_streamed_forward")
        for count in (5, 6, 7, 8)
    ),
    *(
        ("adjoint", _streamed_adjoint, Blocks(count, (0, count - 1)), "fft_conv_streamed_adjoint")
        for count in (5, 6, 7, 8)
    ),
    ("transform", _streamed_transform, Blocks(8, (0, 7)), "fft_conv_streamed_transform"),
    ("taps gradient", _streamed_taps_gradient, Blocks(8, (0, 7)), "fft_conv_streamed_taps_gradient"),
    (
        "spectrum in fragments",
        _streamed_spectrum,
        Blocks(streamed_sm90.MAX_BLOCKS, (0, streamed_sm90.MAX_BLOCKS - 1)),
        "fft_conv_spectrum",
    ),
    *(("inner forward", _inner_forward, Rows(plan), "fft_conv_inner_forward") for plan in (*_INNER, _WIDE)),
    *(("inner backward", _inner_backward, Rows(plan), "fft_conv_inner_backward") for plan in _INNER),
    *(("inner spectrum", _taps_forward, Rows(plan), "fft_conv_inner_transform") for plan in (*_INNER, _WIDE)),
    *(
        ("join" if join else "split", _outer_stage, Rows(plan, join), "fft_conv_outer_stage")
        for plan in _DIRECT
        for join in (False, True)
    ),
    *(
        (
            "join" if join else "split",
            _outer_radix4 if plan.real_products else _outer_radix,
            Rows(plan, join),
            f"fft_conv_outer_radix{'4' if plan.real_products else ''}_{'join' if join else 'split'}",
        )
        for plan in _BY_TWO_FACTORS
        for join in (False, True)
    ),
)

LEARNED_ROWS = tuple(
    Program(f"learned rows {way}", builder, Rows(OuterPlan(1, rows)), dtype, options, f"learned_rows_{way}")
    for way, builder in (
        ("forward", _learned_rows_forward),
        ("backward", _learned_rows_backward),
        ("transform", _learned_rows_transform),
    )
    for rows in (2, 16)
    for dtype in DTYPES
    for options in (False, True)
)
"""With learned blocks, between the outer stages of long sequences."""

LEARNED_OUTER = tuple(
    Program(
        f"learned outer {name}", _learned_outer, Rows(OuterPlan(1, rows), join), dtype, options, "learned_outer_product"
    )
    for name, join, counts in (("product", False, (2, 16, 128)), ("product and join", True, (2, 16, 64)))
    for rows in counts
    for dtype in DTYPES
    for options in (False, True)
)
"""The cotangents of their outer blocks; 128 rows are too many to join."""

LEARNED = tuple(
    Program(f"learned {way}", builder, Learned(n2, launch), dtype, options, f"learned_fft_conv_{way}")
    for n2 in (16, 32, 64)
    for way, builder, launches in (
        ("forward", _learned_forward, (None,)),
        ("backward", _learned_paired, (None,)) if n2 == TILE else ("backward", _learned_backward, (0, 1)),
    )
    for launch in launches
    for dtype in DTYPES
    for options in (False, True)
)
"""With learned blocks."""

PROGRAMS = (
    *(
        Program(kernel.value, builder, configuration(kernel, n2, dtype), dtype, options, function)
        for kernel, (function, builder) in _KERNELS.items()
        for n2 in (16, 32, 64)
        for dtype in DTYPES
        for options in (False, True)
    ),
    *(
        Program("spectrum", _spectrum, Config(n2), dtype, options, "fft_conv_spectrum")
        for n2 in (16, 32, 64)
        for dtype in DTYPES
        for options in (False, True)
    ),
    *(
        Program("forward", _blocked_forward, Blocks(count, lags), dtype, options, "fft_conv_blocked_forward")
        for count in _LAGS
        for lags in _LAGS[count]
        for dtype in DTYPES
        for options in (False, True)
    ),
    *(
        Program(
            "backward" if fits else "gradient of the taps",
            _blocked_backward,
            Blocks(count, lags),
            dtype,
            options,
            f"fft_conv_blocked_{'backward' if fits else 'taps_gradient'}",
        )
        for count, lags, fits in (
            (2, (0, 1), True),
            (2, (-1, 1), True),
            (3, (0, 2), True),
            (3, (-2, 2), False),
            (4, (0, 3), True),
            (4, (-3, 3), False),
        )
        for dtype in DTYPES
        for options in (False, True)
    ),
    *(
        Program(name, builder, config, dtype, options, function)
        for name, builder, config, function in _LONG
        for dtype in DTYPES
        for options in (False, True)
    ),
    # The gradient of the taps is in float16 whatever they are.
    *(
        Program("inner inverse", _taps_inverse, Rows(plan), "float16", options, "fft_conv_inner_inverse")
        for plan in _INNER
        for options in (False, True)
    ),
    *LEARNED,
    *LEARNED_ROWS,
    *LEARNED_OUTER,
)

_MUCH_LIKE_ANOTHER = {"5 blocks", "6 blocks", "7 blocks", "8 rows", "16 rows", "64 rows", "8 x 64 rows"}

TYPICAL = tuple(
    program
    for program in PROGRAMS
    if program.dtype == "bfloat16"
    and program.options
    and program not in LEARNED + LEARNED_ROWS + LEARNED_OUTER
    and (
        program.builder in (_inner_forward, _inner_backward, _taps_forward)
        or str(program.config).split(",")[0] not in _MUCH_LIKE_ANOTHER
    )
)
"""Each configuration once: the others differ in little. Those with learned blocks `test_learned` and
`test_learned_long` lower."""
