"""The two state-space models of H3 (Dao et al. 2023): what they convolve with, and their recurrences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

BLOCK = 64
"""Steps whose powers of the transition are multiplied out at once."""


class Diagonal(NamedTuple):
    r"""A discrete diagonal state-space model for each feature, one of each pair of conjugate states.

    .. math:: x_t = A x_{t-1} + B u_t, \qquad y_t = 2\, \mathrm{Re}(C x_t)
    """

    transition: Complex[Array, "D N"]
    input: Complex[Array, "D N"]
    output: Complex[Array, "D N"]


def discretize(
    log_decay: Float[Array, "D N"],
    frequency: Float[Array, "D N"],
    log_step: Float[Array, "D"],
    input_weight: Float[Array, "D N 2"],
    output_weight: Float[Array, "D N 2"],
) -> Diagonal:
    r"""The bilinear discretisation of the continuous model with :math:`A = -e^{\mathrm{log\_decay}} + i\,\omega`.

    .. math:: \bar A = \frac{1 + \Delta A / 2}{1 - \Delta A / 2}, \qquad \bar B = \frac{\Delta B}{1 - \Delta A / 2}

    Complex numbers are stored as pairs of their real and imaginary parts.
    """
    step = jnp.exp(log_step)[:, None]
    half = step * jax.lax.complex(-jnp.exp(log_decay), frequency) / 2
    return Diagonal((1 + half) / (1 - half), as_complex(input_weight) * step / (1 - half), as_complex(output_weight))


def as_complex(pairs: Float[Array, "*S 2"]) -> Complex[Array, "*S"]:
    """The complex numbers of real and imaginary parts."""
    return jax.lax.complex(pairs[..., 0], pairs[..., 1])


def diagonal_kernel(ssm: Diagonal, length: int) -> Float[Array, "D L"]:
    r"""The impulse response, :math:`k_t = 2\,\mathrm{Re} \sum_n C_n A_n^t B_n`.

    Powers factor into those within a block and those of whole blocks, so that no array has N times L numbers.
    """
    within, across = _powers(ssm.transition, jnp.arange(BLOCK)), BLOCK * jnp.arange(-(-length // BLOCK))
    starts = (ssm.output * ssm.input)[..., None] * _powers(ssm.transition, across)
    kernel = 2 * jnp.einsum("dnb,dnt->dbt", starts, within, precision="highest").real
    return kernel.reshape(kernel.shape[0], -1)[:, :length]


def diagonal_state(ssm: Diagonal, u: Float[Array, "*B D L"]) -> Complex[Array, "*B D N"]:
    """The state after a sequence."""
    padded = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(-u.shape[-1] % BLOCK, 0)])  # zeros first leave the state zero
    blocks = padded.reshape(*u.shape[:-1], -1, BLOCK)
    weights = ssm.input[..., None] * _powers(ssm.transition, jnp.arange(BLOCK - 1, -1, -1))
    added = jnp.einsum("dnt,...dbt->b...dn", weights, blocks.astype(weights.dtype), precision="highest")
    block_transition = _powers(ssm.transition, jnp.array(BLOCK))
    state = jnp.zeros((*u.shape[:-1], ssm.transition.shape[-1]), weights.dtype)
    return jax.lax.scan(lambda x, block: (block_transition * x + block, None), state, added)[0]


def diagonal_step(
    ssm: Diagonal, u: Float[Array, "*B D"], state: Complex[Array, "*B D N"]
) -> tuple[Float[Array, "*B D"], Complex[Array, "*B D N"]]:
    """The output of one step and the next state."""
    state = ssm.transition * state + ssm.input * u[..., None]
    return 2 * (ssm.output * state).sum(-1).real, state


def shift_kernel(input_weight: Float[Array, "D N"], output_weight: Float[Array, "D N"]) -> Float[Array, "D N"]:
    r"""The impulse response of a model whose state is shifted by one place in each step.

    .. math:: k_t = \sum_n b_n c_{n+t}

    has N taps. With b the first unit vector, where it starts, they are c.
    """
    points = 2 * input_weight.shape[-1]
    spectrum = jnp.conj(jnp.fft.rfft(input_weight, points)) * jnp.fft.rfft(output_weight, points)
    return jnp.fft.irfft(spectrum, points)[:, : points // 2]


def _powers(base: Complex[Array, "D N"], exponents: Array) -> Array:
    logarithm = jnp.log(base)
    return jnp.exp(logarithm[..., None] * exponents if exponents.ndim else logarithm * exponents)
