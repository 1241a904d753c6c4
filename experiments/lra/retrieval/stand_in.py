"""Pairs of papers made up by a grammar: a stand-in for AAN where that is not at hand, for small runs and tests alone.

A paper is about one of six topics: some of its words are of that topic, the others of any paper. Two papers are related
where they have the same topic, as half of the pairs have. What a model reaches here says nothing about citations.
"""

import random
from typing import Final

from experiments.lra.retrieval.released import Pair

TOPICS: Final = (
    ("parser", "grammar", "treebank", "syntax"),
    ("translation", "bilingual", "alignment", "decoder"),
    ("speech", "acoustic", "phoneme", "speaker"),
    ("sentiment", "opinion", "polarity", "reviews"),
    ("retrieval", "query", "ranking", "documents"),
    ("summary", "sentences", "headline", "compression"),
)
WORDS: Final = (
    *("we", "the", "of", "a", "and", "show", "results", "model", "data", "method", "approach", "new", "improves"),
    *("corpus", "training", "large", "previous", "work", "features", "task", "system", "language", "using", "on"),
)
ON_TOPIC: Final = 0.15  # of the words
SHORTEST: Final = 200  # characters that the longest paper may have: less may have no room for its topic


def pairs(count: int, seed: int, split: str, longest: int) -> list[Pair]:
    """So many pairs of papers of at most so many characters each, at least half as many, every second pair related.

    Args:
      count: of the pairs.
      seed: fixes them, each by its number.
      split: whose pairs to make up; those of another are others.
      longest: characters, at least 200.
    """
    return [_pair(random.Random(f"{seed} {split} {number}"), number % 2, longest) for number in range(count)]


def _pair(rng: random.Random, label: int, longest: int) -> Pair:
    first, other = rng.sample(TOPICS, 2)
    return Pair((_paper(rng, first, longest), _paper(rng, first if label else other, longest)), label)


def _paper(rng: random.Random, topic: tuple[str, ...], longest: int) -> bytes:
    wanted = rng.randint(longest // 2, longest)
    text = rng.choice(topic)
    while True:
        word = rng.choice(topic if rng.random() < ON_TOPIC else WORDS)
        if len(text) + 1 + len(word) > wanted:
            return text.encode()
        text = f"{text} {word}"
