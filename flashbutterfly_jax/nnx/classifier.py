"""A classifier of sequences as an NNX module."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flashbutterfly_jax.models.checks import resolve_deterministic
from flashbutterfly_jax.models.classifier import Decoder, as_input, check_classifier
from flashbutterfly_jax.models.embedding import embed
from flashbutterfly_jax.models.layer import uniform_fan_in
from flashbutterfly_jax.models.pooling import pair_features, pool
from flashbutterfly_jax.models.residual import Norm
from flashbutterfly_jax.nnx.long_conv import LongConv
from flashbutterfly_jax.nnx.residual import ResidualBlock, make_norm, normalize
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision


class SequenceClassifier(nnx.Module):
    """Encoder, residual blocks, pooling, linear head: the paper's model of pixels and tokens.

    Inputs, parameters and arguments are those of `flashbutterfly_jax.linen.SequenceClassifier`, and under the same
    parameters so is the result, to the last bit. The blocks are one block scanned over stacked parameters: it is
    compiled once whatever the depth. ``deterministic`` is False until `eval` says otherwise.

    Args:
      num_classes: logits for each sequence.
      features: D, of every layer.
      num_layers: residual blocks.
      kernel_length: K, of every layer.
      input_features: of each pixel; not used for tokens.
      vocab_size: of tokens; None takes pixels.
      decoder: ``"mean"``, ``"last"`` or ``"retrieval"``.
      layer: makes the layer of each block, when called with ``features``, ``kernel_length``, ``dropout_rate``,
        ``dtype``, ``param_dtype``, ``precision`` and ``rngs``; bind other arguments by ``functools.partial``.
      norm: of the blocks, ``"layer"`` or ``"batch"``.
      prenorm: normalises the input of each layer, and the output of the last; False normalises each sum.
      dropout_rate: of the dropout inside each layer and after it.
      tie_dropout: of the dropout after each layer.
      dtype: of the computation; None promotes x and the parameters.
      param_dtype: of the parameters.
      precision: of the matrix products.
      deterministic: True evaluates: no dropout, and running statistics. The call may overrule it.
      scan_layers: False unrolls the scan. On two CPU cores a training step (64 features, L = 1024) then takes 0.83 of
        the time, but compiling grows with the depth: 4 layers 4.2 s instead of 4.8, 8 layers 7.6 s instead of 5.3.
      rngs: streams ``params`` and, where there is dropout, ``dropout``.

    Raises:
      ValueError: here for a wrong argument, at the call for a wrong x or lengths.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flashbutterfly_jax as fb
      >>> model = fb.nnx.SequenceClassifier(
      ...     num_classes=10, features=8, num_layers=3, kernel_length=64, rngs=nnx.Rngs(0)
      ... )
      >>> model(jnp.ones((2, 64, 1))).shape
      (2, 10)
      >>> model.blocks.layer.kernel.shape
      (3, 2, 8, 64)
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        num_layers: int,
        kernel_length: int,
        input_features: int = 1,
        vocab_size: int | None = None,
        decoder: Decoder = "mean",
        layer: Callable[..., nnx.Module] = LongConv,
        norm: Norm = "layer",
        prenorm: bool = False,
        dropout_rate: float = 0.0,
        tie_dropout: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        deterministic: bool = False,
        scan_layers: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_classes, self.features, self.num_layers = num_classes, features, num_layers
        self.kernel_length, self.input_features, self.vocab_size = kernel_length, input_features, vocab_size
        self.decoder, self.norm, self.prenorm, self.dropout_rate = decoder, norm, prenorm, dropout_rate
        self.deterministic, self.scan_layers = deterministic, scan_layers
        check_classifier(self)

        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.encoder = _make_encoder(input_features, vocab_size, features, precision, types, rngs)
        arguments: dict[str, Any] = {"features": features, "kernel_length": kernel_length, "dropout_rate": dropout_rate}
        make_layer = functools.partial(layer, precision=precision, **arguments, **types)

        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> ResidualBlock:
            return ResidualBlock(features, make_layer, norm, prenorm, dropout_rate, tie_dropout, **types, rngs=rngs)

        self.blocks = stack(rngs)
        self.final_norm = make_norm(norm, features, **types, rngs=rngs) if prenorm else None
        retrieval = decoder == "retrieval"
        self.hidden = _make_dense(4 * features, features, precision, types, rngs) if retrieval else None
        self.head = _make_dense(features, num_classes, precision, types, rngs)

    def __call__(
        self,
        x: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B num_classes"]:
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=True)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, unroll=1 if self.scan_layers else self.num_layers)
        def scan(x: Array, block: ResidualBlock) -> Array:
            return block(x, lengths=lengths, deterministic=deterministic)

        h = scan(self._encode(as_input(self, x)), self.blocks)
        if self.final_norm is not None:
            h = normalize(self.final_norm, h, deterministic)
        h = pool(h, "last" if self.decoder == "last" else "mean", lengths)
        if self.hidden is not None:
            h = jax.nn.gelu(self.hidden(pair_features(h)), approximate=False)
        return self.head(h)

    def _encode(self, x: Array) -> Array:
        if isinstance(self.encoder, nnx.Embed):
            return embed(self.encoder.embedding[...].astype(self.encoder.dtype), x)
        return self.encoder(x)


def _make_encoder(input_features, vocab_size, features, precision, types, rngs):
    if vocab_size is None:
        return _make_dense(input_features, features, precision, types, rngs)
    return nnx.Embed(vocab_size, features, embedding_init=nnx.initializers.normal(1.0), **types, rngs=rngs)


def _make_dense(fan_in, features, precision, types, rngs):
    init = uniform_fan_in(fan_in)
    return nnx.Linear(fan_in, features, precision=precision, kernel_init=init, bias_init=init, **types, rngs=rngs)
