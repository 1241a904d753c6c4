"""The model of brain activity: long convolutions that look back, and a head for the next volume or for the task."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

import flashbutterfly_jax as fb
from flashbutterfly_jax.linen.residual import make_norm
from flashbutterfly_jax.models.layer import uniform_fan_in
from flashbutterfly_jax.models.pooling import pool
from flashbutterfly_jax.models.residual import Norm


class BrainModel(nn.Module):
    """A linear encoder of each volume, residual long convolutions, and a linear head; causal in the length.

    Without `num_classes` it gives for each volume what it expects of the next, (B, L, networks); with it, the logits of
    the task from the mean over the true length, (B, num_classes). Both have the parameters `encoder`, `blocks`
    and `final_norm` (where prenorm) in common, so that a model that decodes can start from one that predicts; the
    parameters of the heads are `next_volume` and `task`. The encoder sees the repetition time beside the signal,
    because the response of the blood has its own time, in seconds.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> model = BrainModel(networks=5, features=8, num_layers=2, kernel_length=16)
      >>> run = functools.partial(model.init_with_output, deterministic=True)
      >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((3, 16, 5)), jnp.full(3, 0.72))[0].shape
      (3, 16, 5)
    """

    networks: int
    features: int
    num_layers: int
    kernel_length: int
    num_classes: int | None = None
    layer: Callable[..., nn.Module] = fb.linen.LongConv
    norm: Norm = "layer"
    prenorm: bool = True
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, bold: ArrayLike, t_r: ArrayLike, *, lengths: ArrayLike | None = None, deterministic: bool
    ) -> jnp.ndarray:
        bold, t_r = jnp.asarray(bold), jnp.asarray(t_r)
        seconds = jnp.broadcast_to(t_r[:, None, None], (*bold.shape[:2], 1)).astype(bold.dtype)
        h = self._dense(self.networks + 1, self.features, "encoder")(jnp.concatenate([bold, seconds], axis=-1))
        h = self._blocks(h, lengths, deterministic)
        if self.prenorm:
            h = make_norm(self.norm, deterministic, self.dtype, jnp.float32, "final_norm")(h)
        if self.num_classes is None:
            return self._dense(self.features, self.networks, "next_volume")(h)
        return self._dense(self.features, self.num_classes, "task")(pool(h, "mean", lengths))

    def _blocks(self, x: jnp.ndarray, lengths: ArrayLike | None, deterministic: bool) -> jnp.ndarray:
        """All blocks as one scan, compiled once."""
        layer = functools.partial(
            self.layer,
            features=self.features,
            kernel_length=self.kernel_length,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )
        block = fb.linen.ResidualBlock(
            features=self.features,
            layer=layer,
            norm=self.norm,
            prenorm=self.prenorm,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            name="blocks",
        )
        scan: Any = nn.scan(
            lambda block, x: (block(x, lengths=lengths, deterministic=deterministic), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        return scan(block, x)[0]

    def _dense(self, fan_in: int, features: int, name: str) -> nn.Module:
        init = uniform_fan_in(fan_in)
        return nn.Dense(features, kernel_init=init, bias_init=init, dtype=self.dtype, name=name)
