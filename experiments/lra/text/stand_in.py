"""Reviews made up by a grammar: a stand-in for IMDB where that is not at hand, for small runs and tests alone.

A review is a number of sentences about the parts of a film. Some praise or blame one; a third of those say so by a
`not` before the word of the opposite opinion; the others tell the plot. The label is what the most opinions are. It is
far simpler than English, and what a model reaches here says nothing about IMDB.
"""

import random

from experiments.lra.text.archive import Review

PRAISE = ("good", "great", "clever", "moving", "brilliant", "funny", "lovely", "superb")
BLAME = ("bad", "poor", "dull", "silly", "awful", "boring", "weak", "clumsy")
PARTS = ("film", "plot", "cast", "music", "camera", "script", "ending", "dialogue", "pace", "acting")
DEGREES = ("", "really ", "quite ", "rather ", "very ", "simply ")
PEOPLE = ("the captain", "a young doctor", "her brother", "the old thief", "their teacher", "a lonely pilot")
DEEDS = ("leaves the city", "finds a letter", "meets a stranger", "steals a car", "comes home", "loses the map")
NEGATED = 1 / 3
TOLD = 1 / 3


SHORTEST = 100  # characters of the longest review that is asked for: less may have no room for an opinion


def reviews(count: int, seed: int, split: str, longest: int) -> list[Review]:
    """So many reviews of at most so many characters, at least half as many, every second of them praising.

    Args:
      count: of the reviews.
      seed: fixes them, each by its number.
      split: whose reviews to make up; those of another are others.
      longest: characters, at least 100.
    """
    return [_review(random.Random(f"{seed} {split} {number}"), number % 2, longest) for number in range(count)]


def naive_label(text: bytes) -> float:
    """What counting the words of praise and of blame makes of a review without minding `not`: 1, 0, or 0.5 for a tie.

    The baseline that a model has to beat to have understood more than words.
    """
    words = text.decode().replace(".", " ").split()
    surplus = sum((word in PRAISE) - (word in BLAME) for word in words)
    return 0.5 * (1 + (surplus > 0) - (surplus < 0))


def _review(rng: random.Random, label: int, longest: int) -> Review:
    """Draws sentences until they are enough, and starts again where their opinion is not the label's."""
    while True:
        wanted = rng.randint(longest // 2, longest)
        text, surplus = "", 0
        sentence, opinion = _sentence(rng)
        while len(text) + 1 + len(sentence) <= wanted:
            text, surplus = f"{text} {sentence}".strip(), surplus + opinion
            sentence, opinion = _sentence(rng)
        if surplus and (surplus > 0) == bool(label):
            return Review(text.encode(), label)


def _sentence(rng: random.Random) -> tuple[str, int]:
    """A sentence, and whether it praises, 1, blames, -1, or tells, 0."""
    if rng.random() < TOLD:
        return f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)}.", 0
    opinion = rng.choice((-1, 1))
    negated = rng.random() < NEGATED
    word = rng.choice(PRAISE if (opinion > 0) != negated else BLAME)
    return f"the {rng.choice(PARTS)} is {'not ' if negated else ''}{rng.choice(DEGREES)}{word}.", opinion
