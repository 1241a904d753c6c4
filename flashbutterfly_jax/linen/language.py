"""A language model as a Linen module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashbutterfly_jax.linen.attention import CausalAttention
from flashbutterfly_jax.linen.h3 import H3LongConv
from flashbutterfly_jax.models.checks import check_choice, check_positive, check_rate, resolve_deterministic
from flashbutterfly_jax.models.embedding import embed
from flashbutterfly_jax.models.language import Cache, as_tokens, check_cache
from flashbutterfly_jax.models.residual import EPSILON
from flashbutterfly_jax.typing import ArrayLike, DTypeLike, Precision

type Remat = Literal["none", "dots", "full"]

_POLICIES: dict[str, Any] = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class MLP(nn.Module):
    """Two dense layers with GELU, by its tanh, between them: the mixer of features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flashbutterfly_jax.linen import MLP
      >>> mlp, x = MLP(features=4, hidden_features=16), jnp.ones((3, 4))
      >>> mlp.apply(jax.jit(mlp.init)(jax.random.key(0), x), x).shape
      (3, 4)
    """

    features: int
    hidden_features: int
    dense_init: Callable = nn.initializers.normal(0.02)
    output_init: Callable = nn.initializers.normal(0.02)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
        hidden = nn.Dense(self.hidden_features, kernel_init=self.dense_init, **types, name="hidden")(x)
        output = nn.Dense(self.features, kernel_init=self.output_init, **types, name="output")
        return output(jax.nn.gelu(hidden, approximate=True))


class LanguageBlock(nn.Module):
    """A mixer of steps and one of features, each with its norm before and a residual connection around it.

    Parameters: ``mixer_norm``, ``mixer``, ``mlp_norm``, ``mlp``. The residual stream keeps the dtype of x.
    """

    make_mixer: Callable[[], nn.Module]
    make_mlp: Callable[[], nn.Module]
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        norm = functools.partial(nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype, param_dtype=self.param_dtype)
        self.mixer_norm, self.mlp_norm = norm(), norm()
        self.mixer, self.mlp = self.make_mixer(), self.make_mlp()
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(self, x, deterministic):
        x = x + self.dropout(self.mixer(self.mixer_norm(x), deterministic=deterministic), deterministic=deterministic)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), deterministic=deterministic)

    def init_cache(self, batch_size, max_length, dtype):
        return self.mixer.init_cache(batch_size, max_length, dtype)

    def prefill(self, x, cache):
        mixed, cache = self.mixer.prefill(self.mixer_norm(x), cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache

    def step(self, x, cache):
        mixed, cache = self.mixer.step(self.mixer_norm(x), cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class LanguageModel(nn.Module):
    r"""The logits of the next token after each token: embedding, blocks of mixer and MLP, norm, the same embedding.

    The backbone of H3 (Dao et al. 2023) and of its version with long convolutions: prenorm, no positional embedding,
    one table for input and output. Weights start at N(0, ``init_scale``), biases at 0, and the last layers of MLPs
    and attention at ``init_scale`` over the root of ``2 num_layers``. A Transformer is the same model with attention
    everywhere: ``attention_layers=range(num_layers), attention=functools.partial(CausalAttention, rotary=True)``.

    Layers compute in ``dtype``; the residual stream and the logits have at least float32.

    Generation goes token by token from a cache, a pytree: `init_cache`, `prefill` with all tokens of the prompt at
    once, then `step`, or at once `flashbutterfly_jax.models.generate`. Its logits are those of the whole sequence.

    Parameters: ``embedding (vocab_size, D)``, ``layers_0`` and following (`LanguageBlock`), ``final_norm``. Blocks
    are not scanned, as hybrids have several kinds of them: compiling grows with the depth.

    Attributes:
      vocab_size: tokens of the vocabulary. A token out of it gives NaN, and an error where it comes as a numpy array.
      features: D.
      num_layers: blocks.
      mixer: makes the mixer of a block, when called with ``features``, ``dense_init``, ``dtype``, ``param_dtype`` and
        ``precision``; bind other arguments by ``functools.partial``.
      attention_layers: blocks, counted from 0, whose mixer is attention instead.
      num_heads: of the attention.
      attention: makes that mixer, when called with ``num_heads`` and ``output_init`` besides.
      mlp: makes the mixer of features, when called with ``features``, ``hidden_features``, ``dense_init``,
        ``output_init``, ``dtype``, ``param_dtype`` and ``precision``.
      hidden_features: of the MLPs; None is 4D.
      init_scale: standard deviation of the weights.
      embedding_dropout_rate: of the dropout of the embedded tokens.
      dropout_rate: of the dropout of what each layer adds to the residual stream.
      dtype: of the computation; None promotes.
      param_dtype: of the parameters.
      precision: of the dense layers.
      remat: what the backward pass computes again instead of keeping it: ``"none"``; ``"dots"``, all but the products
        with weights; ``"full"``, all within a block.
      deterministic: True leaves dropout out. May be given at the call instead; nobody has to say where None of the
        model's own rates is above 0 and the mixers have none.

    Raises:
      ValueError: at construction for a wrong argument, at the call for wrong tokens.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> mixer = functools.partial(fb.linen.H3LongConv, kernel_length=32)
      >>> model = fb.linen.LanguageModel(
      ...     vocab_size=256, features=8, num_layers=3, mixer=mixer, attention_layers=(1,), num_heads=2
      ... )
      >>> tokens = jnp.zeros((2, 32), int)
      >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
      >>> jax.jit(model.apply)(variables, tokens).shape
      (2, 32, 256)

      A size of the paper, with a vocabulary of 50,257 tokens filled up to a multiple of 8:

      >>> size = fb.models.SIZES["125M"]
      >>> model = fb.linen.LanguageModel(vocab_size=50264, **size.arguments)
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
      155131392
    """

    vocab_size: int
    features: int
    num_layers: int
    mixer: Callable[..., nn.Module] = H3LongConv
    attention_layers: Sequence[int] = ()
    num_heads: int = 1
    attention: Callable[..., nn.Module] = CausalAttention
    mlp: Callable[..., nn.Module] = MLP
    hidden_features: int | None = None
    init_scale: float = 0.02
    embedding_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    remat: Remat = "none"
    deterministic: bool | None = None

    def __post_init__(self):
        for name in ("vocab_size", "features", "num_layers", "num_heads"):
            check_positive(name, getattr(self, name))
        if self.hidden_features is not None:
            check_positive("hidden_features", self.hidden_features)
        self.attention_layers = tuple(self.attention_layers)
        for layer in self.attention_layers:
            if layer not in range(self.num_layers):
                raise ValueError(
                    f"attention_layers must be from 0 to {self.num_layers - 1}, as there are {self.num_layers} layers; "
                    f"got {layer}."
                )
        check_rate("embedding_dropout_rate", self.embedding_dropout_rate)
        check_rate("dropout_rate", self.dropout_rate)
        check_choice("remat", self.remat, ("none", *_POLICIES))
        super().__post_init__()

    def setup(self):
        init = nn.initializers.normal(self.init_scale)
        output_init = nn.initializers.normal(self.init_scale / (2 * self.num_layers) ** 0.5)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {
            "features": self.features,
            "dense_init": init,
            "precision": self.precision,
            **types,
        }
        mixer = functools.partial(self.mixer, **common)
        attention = functools.partial(self.attention, num_heads=self.num_heads, output_init=output_init, **common)
        hidden_features = 4 * self.features if self.hidden_features is None else self.hidden_features
        mlp = functools.partial(self.mlp, hidden_features=hidden_features, output_init=output_init, **common)
        block = LanguageBlock
        if self.remat != "none":
            block = nn.remat(LanguageBlock, policy=_POLICIES[self.remat], static_argnums=(2,))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features), self.param_dtype)
        self.embedding_dropout = nn.Dropout(self.embedding_dropout_rate)
        self.layers = [
            block(attention if layer in self.attention_layers else mixer, mlp, self.dropout_rate, **types)
            for layer in range(self.num_layers)
        ]
        self.final_norm = nn.LayerNorm(epsilon=EPSILON, **types)

    def __call__(self, tokens: ArrayLike, *, deterministic: bool | None = None) -> Float[Array, "B L vocab_size"]:
        """The logits of the token after each one."""
        matters = max(self.embedding_dropout_rate, self.dropout_rate) > 0
        deterministic = resolve_deterministic(deterministic, self.deterministic, matters=matters)
        x = self.embedding_dropout(self._embed(as_tokens(tokens, self.vocab_size)), deterministic=deterministic)
        for layer in self.layers:
            x = layer(x, deterministic)
        return self._logits(x)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for ``batch_size`` sequences of up to ``max_length`` tokens, for these parameters alone.

        Raises:
          ValueError: unless both are at least 1.
        """
        check_positive("batch_size", batch_size)
        check_positive("max_length", max_length)
        dtype = self.dtype or self.param_dtype
        layers = tuple(layer.init_cache(batch_size, max_length, dtype) for layer in self.layers)
        return Cache(layers, jnp.int32(0), batch_size, max_length)

    def prefill(self, tokens: ArrayLike, cache: Cache) -> tuple[Float[Array, "B L vocab_size"], Cache]:
        """The logits after each token of the prompts, all of one length, and the cache that remembers them.

        Raises:
          ValueError: for wrong tokens, a prompt longer than the cache, and a cache of another model.
        """
        tokens = as_tokens(tokens, self.vocab_size)
        self._check_cache(cache, tokens.shape[0])
        if not 1 <= tokens.shape[1] <= cache.max_length:
            raise ValueError(
                f"tokens must be from 1 to {cache.max_length}, those that fit into the cache; got {tokens.shape[1]}: "
                f"shorten the prompt, or make the cache by init_cache with a larger max_length."
            )
        x, caches = self._embed(tokens), []
        for layer, before in zip(self.layers, cache.layers, strict=True):
            x, after = layer.prefill(x, before)
            caches.append(after)
        return self._logits(x), cache.replace(layers=tuple(caches), position=jnp.int32(tokens.shape[1]))

    def step(self, tokens: ArrayLike, cache: Cache) -> tuple[Float[Array, "B vocab_size"], Cache]:
        """The logits after one more token of each sequence, ``(B,)``, and the cache that remembers it.

        A step for which there is no place in the cache any more has logits of NaN.

        Raises:
          ValueError: for a cache of another model.
        """
        tokens = as_tokens(jnp.asarray(tokens)[:, None], self.vocab_size)[:, 0]
        self._check_cache(cache, tokens.shape[0])
        x, caches = self._embed(tokens), []
        for layer, before in zip(self.layers, cache.layers, strict=True):
            x, after = layer.step(x, before)
            caches.append(after)
        logits = jnp.where(cache.position < cache.max_length, self._logits(x), jnp.nan)
        return logits, cache.replace(layers=tuple(caches), position=cache.position + 1)

    def _check_cache(self, cache: Any, batch_size: int) -> None:
        sizes = (getattr(cache, "batch_size", batch_size), getattr(cache, "max_length", 1))
        check_cache(cache, jax.eval_shape(lambda: self.init_cache(*sizes)))
        if cache.batch_size != batch_size:
            raise ValueError(f"tokens must be for {cache.batch_size} sequences, as the cache is; got {batch_size}.")

    def _embed(self, tokens):
        table = self.embedding.astype(self.dtype or self.param_dtype)
        return embed(table, tokens).astype(self._wide())

    def _logits(self, x):
        x = self.final_norm(x)
        table = self.embedding.astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table, precision=self.precision, preferred_element_type=self._wide())

    def _wide(self):
        return jnp.promote_types(self.dtype or self.param_dtype, jnp.float32)
