"""Bits per byte: of a model, exactly, of compressors, and of a table of pairs of tokens."""

import math

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.language.corpus import SplitName
from experiments.language.perplexity import Perplexity, perplexity
from experiments.language.recipe import Language
from experiments.language.tokens import SplitInfo, Tokens

MEASURED = 1 << 17  # tokens of a split, at most, whose perplexity is measured
LARGEST_TABLE = 4096  # tokens of a vocabulary, of which there are pairs
AT_ONCE = 1 << 22  # tokens whose pairs are counted in one go


def measured(recipe: Language, params: dict, split: SplitName, console: Console) -> Perplexity:
    """That of the first tokens of a split, `MEASURED` at most, in windows that begin every half length."""
    tokens = recipe.tokens()
    return perplexity(
        recipe.model(tokens.vocab_size),
        {"params": params},
        tokens[split],
        length=recipe.length,
        stride=max(1, recipe.length // 2),
        at_most=MEASURED,
        track=lambda batches: track(batches, f"perplexity, {split}", console=console, transient=True),
    )


def bits_per_byte(found: Perplexity, info: SplitInfo) -> float:
    """Of what was measured of a split: exact where that is all of it, or where tokens are bytes but for separators."""
    return found.bits_per_byte(info.bytes * (found.tokens + 1) / info.tokens)


def compressors(info: SplitInfo) -> dict[str, float]:
    """Bits per byte of the whole split, compressed."""
    sizes = {"gzip -9": info.gzip, "xz -6": info.xz, "xz, after the training text": info.xz_after_train}
    return {name: 8 * size / info.bytes for name, size in sizes.items() if size is not None}


def bigram(tokens: Tokens, split: SplitName) -> Perplexity | None:
    """That of the same first tokens, each predicted from the one before by how often it follows it in training.

    Every pair counts once more than it occurs. None for a vocabulary of more than `LARGEST_TABLE` tokens.
    """
    size = tokens.vocab_size
    if size > LARGEST_TABLE:
        return None
    text, counts = tokens["train"], np.ones(size**2)
    for first in range(0, len(text) - 1, AT_ONCE):  # of a text that may be larger than memory
        part = np.asarray(text[first : first + AT_ONCE + 1], np.int64)
        counts += np.bincount(part[:-1] * size + part[1:], minlength=size**2)
    pairs = counts.reshape(size, size)
    likelihoods = pairs / pairs.sum(-1, keepdims=True)
    known = np.asarray(tokens[split][:MEASURED], np.int64)
    return Perplexity(-float(np.log(likelihoods[known[:-1], known[1:]]).sum()), len(known) - 1)


def per_byte(nats: float, info: SplitInfo) -> float:
    """Bits per byte of a mean loss per token of a split."""
    return nats / math.log(2) * info.tokens / info.bytes
