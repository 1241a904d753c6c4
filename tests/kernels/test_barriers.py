"""The kernels that order their own threads do so within each warpgroup; see `barriers`."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fft_conv.mosaic import complex_planes, load, matrices, persistent_kernel, sums_of_products
from tests.kernels.barriers import Trace
from tests.kernels.programs import PROGRAMS, Program

BY_HAND = [
    program for program in PROGRAMS if program.dtype == "bfloat16" or program.name == "inner inverse"
]  # the dtypes share the code but for the widening of numbers

ONE_OF_EACH = {
    "fft_conv_forward": "forward, gated, n2 = 32",
    "fft_conv_blocked_forward": "forward, 4 blocks, lags 0 to 3",
    "fft_conv_blocked_backward": "backward, 3 blocks, lags 0 to 2",
    "fft_conv_blocked_taps_gradient": "gradient of the taps, 3 blocks",
    "fft_conv_streamed_forward": "forward, 5 blocks",
    "fft_conv_streamed_adjoint": "adjoint, 5 blocks",
    "fft_conv_streamed_transform": "transform, 8 blocks",
    "fft_conv_inner_forward": "inner forward, 16 rows",
    "fft_conv_inner_forward, paired": "inner forward, 32 rows of 32 x 64",
    "fft_conv_inner_backward, paired": "inner backward, 32 rows of 32 x 64",
    "fft_conv_outer_stage": "split, 64 rows",
    "fft_conv_outer_radix4_split": "split, 4 x 64 rows,",
    "fft_conv_outer_radix4_join": "join, 4 x 64 rows,",
    "fft_conv_outer_radix_split": "split, 8 x 64 rows,",
    "fft_conv_outer_radix_join": "join, 16 x 64 rows,",
    "learned_fft_conv_backward": "learned backward, n2 = 64",
    "learned_rows_forward": "learned rows forward, 16",
    "learned_rows_transform": "learned rows transform, 16",
    "learned_rows_backward": "learned rows backward, 16",
    "learned_outer_product": "learned outer product and join, 64 rows",
}

BETWEEN_WARPGROUPS = {
    "fft_conv_blocked_forward": 1,
    "fft_conv_blocked_backward": 3,
    "fft_conv_blocked_taps_gradient": 2,
    "fft_conv_streamed_forward": 3,
    "fft_conv_streamed_adjoint": 3,
    "fft_conv_outer_radix4_split": 2,
    "fft_conv_outer_radix4_join": 6,
    "learned_fft_conv_backward": 1,
    "learned_rows_backward": 1,
}
"""Commits of which one warpgroup alone does not need so many: what it stores before them is for others."""


@pytest.mark.parametrize("name", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_nothing_is_shared_within_a_warpgroup_without_a_barrier(name):
    (program,) = (program for program in BY_HAND if str(program).startswith(name) and program.options)
    trace = Trace.of(*program.build())

    assert not trace.faults()


@pytest.mark.slow
@pytest.mark.parametrize("program", BY_HAND, ids=str)
def test_every_commit_is_needed(program: Program):
    trace = Trace.of(*program.build())
    assert not trace.faults()
    superfluous = [commit for commit in trace.commits if not trace.faults(without=commit)]
    assert len(superfluous) <= BETWEEN_WARPGROUPS.get(program.function, 0)


def test_a_commit_left_out_is_found():
    (program,) = (program for program in BY_HAND if str(program).startswith("inner forward, 16") and program.options)
    trace = Trace.of(*program.build())
    assert [len(trace.faults(without=commit)) > 0 for commit in trace.commits] == [True] * 4


def _trace(body) -> Trace:
    """Of one warpgroup with a pair of matrices in shared memory."""
    pair = jax.ShapeDtypeStruct((2, 64, 64), jnp.bfloat16)
    scratch = {"pair": matrices(pair.shape, pair.dtype), "barrier": plgpu.Barrier(num_arrivals=1)}
    return Trace.of(persistent_kernel(body, pair, scratch, 1, 1), [pair])


@pytest.mark.parametrize(
    ("ordered", "found"),
    [
        ("all", set()),
        ("no commit after the store", {("stored", "multiplied")}),
        ("no barrier after the product", {("multiplied", "stored")}),
        ("no commit before the copy", {("stored", "copied out")}),
        ("no wait for the copy", {("copied out", "copied in")}),
        ("no barrier after the load", {("loaded", "copied in")}),
    ],
)
def test_each_kind_of_fault_is_found(ordered, found):
    def body(x, out, scratch):
        @pl.loop(0, 2)
        def _(step):
            pair, barrier = scratch["pair"], scratch["barrier"]
            for plane in (0, 1):
                if ordered != "no wait for the copy":
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(x.at[plane], pair.at[plane], barrier)
                plgpu.barrier_wait(barrier)
            re, im = complex_planes(pair, 0)
            re[...] = load(im)
            if ordered != "no commit after the store":
                plgpu.commit_smem()
            (product,) = sums_of_products([(re, im)])
            if ordered != "no barrier after the product":
                plgpu.commit_smem()
            im[...] = product.astype(jnp.bfloat16)
            if ordered != "no commit before the copy":
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(im, out.at[step])
            if ordered == "no barrier after the load":
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[0] = load(im)
                plgpu.copy_gmem_to_smem(x.at[0], im, barrier)
                plgpu.barrier_wait(barrier)

        plgpu.wait_smem_to_gmem(0)

    kinds = {(fault.earlier, fault.later) for fault in _trace(body).faults()}
    assert found <= kinds
    assert found or not kinds
