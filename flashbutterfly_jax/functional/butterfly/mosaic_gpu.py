"""The learned butterfly at a right angle by the fused kernels for Hopper GPUs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.butterfly.blocks import Blocks, stage_blocks
from flashbutterfly_jax.functional.butterfly.convolution import RIGHT_ANGLE
from flashbutterfly_jax.functional.butterfly.learned import LearnedButterfly
from flashbutterfly_jax.functional.butterfly.plans import Plan
from flashbutterfly_jax.functional.butterfly.transform import inverse_dft_blocks
from flashbutterfly_jax.functional.origin import check_pallas_kernels

FIRST_FACTOR, SECOND_FACTORS = 64, (16, 32, 64)
LONG_FACTORS = 64, 64
"""Those after the first of a plan of three."""
FIRST_OF_THREE = range(2, 129)


def check_supported(u: Array, reverse_kernel: Array | None, butterfly: LearnedButterfly, plan: Plan) -> None:
    """Refuses what the kernel does not compute, without a look at any device.

    Raises:
      NotImplementedError: with the reason, and what would do instead.
    """
    takes, instead = "the learned kernel", 'Use implementation="butterfly" or None.'
    if butterfly.form != "right_angle":
        raise NotImplementedError(f"{takes} takes the form 'right_angle'; got {butterfly.form!r}. {instead}")
    if not _fits(plan):
        raise NotImplementedError(
            f"{takes} takes the factors 64 and one of {SECOND_FACTORS}, or m, 64 and 64 with m from "
            f'{FIRST_OF_THREE[0]} to {FIRST_OF_THREE[-1]}; got {plan}. Give LearnedButterfly("right_angle", '
            f"factors=(64, 16)) for up to 1024 taps, (64, 64) for 4096, (16, 64, 64) for 65,536 and so on, or use "
            f'implementation="butterfly" or None.'
        )
    if butterfly.per_feature or butterfly.activation is not None:
        raise NotImplementedError(
            f"{takes} takes blocks that features share and no activation; got {butterfly}. {instead}"
        )
    if reverse_kernel is not None:
        raise NotImplementedError(
            f"{takes} takes no reverse_kernel; got one of shape {reverse_kernel.shape}. {instead}"
        )
    if u.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"{takes} takes bfloat16 or float16 sequences; got {u.dtype}. Cast u, or give a layer such a dtype; or "
            f'use implementation="butterfly" or None.'
        )


def _fits(plan: Plan) -> bool:
    """Whether there are kernels with blocks of these factors."""
    first, *others = plan.factors
    if len(others) == 1:
        return first == FIRST_FACTOR and others[0] in SECOND_FACTORS
    return tuple(others) == LONG_FACTORS and first in FIRST_OF_THREE


def with_channels_and_skip(
    u: Float[Array, "*B D L"],
    kernel: Float[Array, "*C D K"],
    skip: Float[Array, "*C D"] | None,
    blocks: dict[str, Blocks],
    butterfly: LearnedButterfly,
) -> Float[Array, "*BC D L"]:
    """`learned_long_conv` by the kernel, a launch for each channel; the skip's product is a float32 one."""
    channels, batch = kernel.shape[:-2], u.shape[:-2]
    if not u.size or not kernel.size:
        return jnp.zeros((*batch, *channels, *u.shape[-2:]), u.dtype)
    rows = u.reshape(math.prod(batch), *u.shape[-2:])
    ys = [_one_channel(rows, one, blocks, butterfly) for one in kernel.reshape(-1, *kernel.shape[-2:])]
    y = (jnp.stack(ys, 1) if channels else ys[0]).reshape(*batch, *channels, *u.shape[-2:])
    if skip is None:
        return y
    weighted = skip[..., None] * (u if not channels else u[..., None, :, :]).astype(jnp.float32)
    return (y + weighted).astype(u.dtype)


@functools.partial(jax.jit, static_argnames="butterfly")  # lowered once for all channels and layers of a model
def _one_channel(u, kernel, blocks, butterfly):
    return learned_long_conv_mosaic_gpu(u, kernel, blocks=blocks, butterfly=butterfly)


def learned_long_conv_mosaic_gpu(
    u: Float[Array, "B D L"],
    kernel: Float[Array, "D K"],
    *,
    blocks: dict[str, Blocks],
    butterfly: LearnedButterfly,
    config: Any = None,
) -> Float[Array, "B D L"]:
    """`learned_long_conv` without a skip, of 16-bit numbers with float32 sums; it has first derivatives.

    Args:
      u: bfloat16 or float16.
      kernel: one for each feature.
      blocks: of `LearnedButterfly.init`.
      butterfly: at a right angle, of the factors 64 and 16, 32 or 64 or m, 64 and 64 with m from 2 to 128, its blocks
        shared by the features, linear.
      config: of two factors, a `pallas_kernels.fft_conv.config.Config` of the kernels; of three, the most blocks of
        threads in a launch. None chooses.

    Raises:
      NotImplementedError: the kernel does not compute this.
    """
    plan = butterfly.plan(kernel.shape[-1])
    check_supported(u, None, butterfly, plan)
    check_pallas_kernels()
    from pallas_kernels.fft_conv import learned_api, learned_long_api  # not above: importing Pallas takes a second

    def stages(name):
        options = {"offset_scale": butterfly.offset_scale, "inverse": name == "output"}
        tree = jax.tree.map(lambda block: block.astype(jnp.float32), blocks[name])
        return stage_blocks(tree, plan, RIGHT_ANGLE, **options)

    there, of_taps = stages("input"), stages("kernel")
    exact = [jnp.asarray(block, jnp.complex64) for block in inverse_dft_blocks(plan, RIGHT_ANGLE)]
    back = stages("output") if butterfly.learn_inverse else exact
    # The stages multiply by [k, n] from the left; the kernels' last factor, by its transpose from the right.
    chain = *there[:-1], there[-1].T, back[-1].T, *reversed(back[:-1]), *of_taps[:-1], of_taps[-1].T
    if plan.order == 2:
        return learned_api.learned_fft_conv(u, kernel, learned_api.Blocks(*chain), config)
    return learned_long_api.learned_long_fft_conv(u, kernel, learned_long_api.LongBlocks(*chain), config or 132)
