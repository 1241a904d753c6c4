"""The learned butterfly at a right angle by the fused kernels for Hopper GPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashbutterfly_jax.functional.butterfly.blocks import Blocks, stage_blocks
from flashbutterfly_jax.functional.butterfly.convolution import RIGHT_ANGLE
from flashbutterfly_jax.functional.butterfly.learned import LearnedButterfly
from flashbutterfly_jax.functional.butterfly.transform import inverse_dft_blocks
from flashbutterfly_jax.functional.origin import check_pallas_kernels

FIRST_FACTOR, SECOND_FACTORS = 64, (16, 32, 64)


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
      butterfly: at a right angle, of the factors 64 and 16, 32 or 64, its blocks shared by the features, linear.
      config: `pallas_kernels.fft_conv.config.Config` of the kernels; None chooses.

    Raises:
      NotImplementedError: the kernel does not compute this.

    Example:
      >>> butterfly = LearnedButterfly("right_angle", (64, 16))
      >>> blocks = butterfly.init(jax.random.key(0), features=3, taps=1000)
      >>> u, kernel = jnp.ones((2, 3, 1000), jnp.bfloat16), jnp.ones((3, 1000))
      >>> call = jax.jit(lambda u: learned_long_conv_mosaic_gpu(u, kernel, blocks=blocks, butterfly=butterfly))
      >>> "mosaic_gpu" in call.trace(u).lower(lowering_platforms=("cuda",)).as_text()
      True
    """
    plan = butterfly.plan(kernel.shape[-1])
    fits = plan.order == 2 and plan.factors[0] == FIRST_FACTOR and plan.factors[1] in SECOND_FACTORS
    if butterfly.form != "right_angle" or not fits or butterfly.per_feature or butterfly.activation is not None:
        raise NotImplementedError(
            f"the learned kernel takes the form 'right_angle' with the factors 64 and one of {SECOND_FACTORS}, blocks "
            f"that features share and no activation; got {butterfly} with {plan}."
        )
    if u.dtype not in (jnp.bfloat16, jnp.float16) or u.shape[-1] > plan.n:
        raise NotImplementedError(
            f"the learned kernel takes bfloat16 or float16 sequences of at most {plan.n} steps; got {u.dtype} of "
            f"{u.shape[-1]}."
        )
    check_pallas_kernels()
    from pallas_kernels.fft_conv import learned_api  # not above: importing Pallas takes a second

    def stages(name):
        options = {"offset_scale": butterfly.offset_scale, "inverse": name == "output"}
        tree = jax.tree.map(lambda block: block.astype(jnp.float32), blocks[name])
        return stage_blocks(tree, plan, RIGHT_ANGLE, **options)

    there, of_taps = stages("input"), stages("kernel")
    exact = [jnp.asarray(block, jnp.complex64) for block in inverse_dft_blocks(plan, RIGHT_ANGLE)]
    back = stages("output") if butterfly.learn_inverse else exact
    # The stages multiply by [k, n] from the left; the kernel's second factor, by its transpose from the right.
    chain = learned_api.Blocks(there[0], there[1].T, back[1].T, back[0], of_taps[0], of_taps[1].T)
    return learned_api.learned_fft_conv(u, kernel, chain, config)
