"""Text from a language model: the choice of the next token, and the loop around it."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flashbutterfly_jax.models.checks import check_positive
from flashbutterfly_jax.models.language import check_tokens
from flashbutterfly_jax.typing import ArrayLike, checked_by_hand


def choose(
    key: PRNGKeyArray,
    logits: Float[Array, "*B V"],
    temperature: float | Array = 1.0,
    top_k: int | Array = 0,
    top_p: float | Array = 1.0,
) -> Int[Array, "*B"]:
    r"""A token of each distribution, drawn from :math:`\mathrm{softmax}(\mathrm{logits} / T)` without its tail.

    First the ``top_k`` most likely tokens are kept, then of those the fewest whose probabilities, of the temperature's
    distribution over them, add up to ``top_p``; the most likely one always, and of equally likely ones all or none.

    Args:
      key: of the draw.
      logits: of any real dtype; computed with in float32 at least.
      temperature: T; 0 takes the most likely token.
      top_k: 0 keeps all.
      top_p: above 0; 1 keeps all.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.array([0.0, 3.0, 2.0, -1.0])
      >>> int(choose(jax.random.key(0), logits, temperature=0.0))
      1
      >>> keys = jax.random.split(jax.random.key(0), 100)
      >>> sorted(set(jax.vmap(lambda key: choose(key, logits, top_k=2))(keys).tolist()))
      [1, 2]
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    size = logits.shape[-1]
    ranked = -jnp.sort(-scaled, axis=-1)
    kept = jnp.arange(size) < jnp.where(top_k > 0, top_k, size)
    probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept &= (before < top_p) | (top_p >= 1)
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf), axis=-1)
    return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


@checked_by_hand
def generate(
    model: Any,
    variables: Any,
    prompt: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Int[Array, "B max_new_tokens"]:
    """Tokens that follow each prompt, by one compiled program: the prompt at once, then one token after the other.

    It is compiled once for each shape of the prompt and number of tokens, whatever the other arguments. Sequence i of
    a batch draws from its own stream of random numbers, ``fold_in(key(seed), i)``, whatever the others are.

    Args:
      model: a `flashbutterfly_jax.linen.LanguageModel`.
      variables: its ``{"params": ...}``.
      prompt: ``(B, P)``, all of one length, at least 1.
      max_new_tokens: for each.
      temperature: of `choose`, like the next two.
      top_k: likewise.
      top_p: likewise.
      seed: of the draws.

    Raises:
      ValueError: if an argument is out of range, or a token out of the vocabulary.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import flashbutterfly_jax as fb
      >>> mixer = functools.partial(fb.linen.H3LongConv, kernel_length=32)
      >>> model = fb.linen.LanguageModel(vocab_size=50, features=8, num_layers=1, mixer=mixer)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), int))
      >>> fb.models.generate(model, variables, [[3, 1, 4], [1, 5, 9]], 6).shape
      (2, 6)
    """
    prompt = _as_prompt(prompt, model.vocab_size)
    check_positive("max_new_tokens", max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    return _generate(model, variables, prompt, max_new_tokens, _keys(seed, len(prompt)), temperature, top_k, top_p)


@checked_by_hand
def stream(
    model: Any,
    variables: Any,
    prompt: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Int[np.ndarray, "B"]]:
    """The tokens of `generate`, each as soon as it is there: two compiled programs, of the prompt and of a step.

    Arguments and errors are those of `generate`; errors come at once, before the first token is asked for.
    """
    prompt = _as_prompt(prompt, model.vocab_size)
    check_positive("max_new_tokens", max_new_tokens)
    _check_sampling(temperature, top_k, top_p)

    def tokens() -> Iterator[np.ndarray]:
        keys, sampling = _keys(seed, len(prompt)), (temperature, top_k, top_p)
        token, cache = _begin(model, variables, prompt, max_new_tokens, keys, *sampling)
        yield np.asarray(token)
        for number in range(1, max_new_tokens):
            token, cache = _next(model, variables, token, cache, keys, number, *sampling)
            yield np.asarray(token)

    return tokens()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(model, variables, prompt, max_new_tokens, keys, *sampling):
    def step(carry, number):
        token, cache = _next_of(model, variables, *carry, keys, number, *sampling)
        return (token, cache), token

    first = _begin_with(model, variables, prompt, max_new_tokens, keys, *sampling)
    _, others = jax.lax.scan(step, first, jnp.arange(1, max_new_tokens))
    return jnp.concatenate([first[0][None], others]).T


def _begin_with(model, variables, prompt, max_new_tokens, keys, *sampling):
    """The first token, and the cache before it."""
    cache = model.apply(variables, *prompt.shape[:1], prompt.shape[1] + max_new_tokens, method="init_cache")
    logits, cache = model.apply(variables, prompt, cache, method="prefill")
    return _draw(keys, 0, logits[:, -1], *sampling), cache


def _next_of(model, variables, token, cache, keys, number, *sampling):
    """The token after a token, and the cache before it."""
    logits, cache = model.apply(variables, token, cache, method="step")
    return _draw(keys, number, logits, *sampling), cache


_begin = functools.partial(jax.jit, static_argnums=(0, 3))(_begin_with)
_next = functools.partial(jax.jit, static_argnums=0, donate_argnums=3)(_next_of)


def _draw(keys, number, logits, *sampling):
    draw = jax.vmap(lambda key, logits: choose(jax.random.fold_in(key, number), logits, *sampling))
    return draw(keys, logits)


def _keys(seed: int, count: int) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def _as_prompt(prompt: ArrayLike, vocab_size: int) -> Int[np.ndarray, "B P"]:
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # numpy's, for rows of several lengths
        raise ValueError("prompt must have rows of one length; got rows of several.") from None
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ValueError(
            f"prompt must be integers of shape (B, P), at least one token for each; got {tokens.dtype} of shape "
            f"{tokens.shape}."
        )
    check_tokens(tokens, vocab_size)
    return tokens.astype(np.int32)


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite; got {temperature}.")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be an integer of at least 0, and 0 keeps all tokens; got {top_k!r}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1; got {top_p}.")
