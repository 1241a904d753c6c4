"""Random ListOps expressions with their values, in the distribution of Long Range Arena's generator.

A node is a digit with probability 3/4, and always at the greatest depth; else an operator over 2 to 10 nodes. Digits,
operators and numbers of arguments are uniform. An expression is kept if it has more than 500 and fewer than 2,000
tokens, where an operator counts twice: it opens and it closes. Long Range Arena published these rules as a program
without a seed (google-research/long-range-arena, `lra_benchmarks/data/listops.py`), so that its rows cannot be drawn
again, but rows like them can.

Whole forests are drawn at once, level by level, in numpy: 15 times as fast as one recursion for each expression.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.common.processes import in_processes
from experiments.lra.listops import vocabulary

VERSION = "1.0.0"  # to be raised whenever a seed would give other rows than before
OPERATOR_PROBABILITY = 0.25
ROWS_OF_A_CHUNK = 2000  # fixed: the rows that a seed gives depend on it
TREES_AT_ONCE = 8192  # fixed likewise; about 1 in 12 is kept, and a million nodes are drawn


@dataclass(frozen=True)
class Shape:
    """What limits an expression. The defaults are those of Long Range Arena.

    Attributes:
      min_length: fewest tokens, without the one that ends the sequence.
      max_length: most tokens, likewise.
      max_depth: of the deepest digit; a lone digit has depth 1.
      max_arguments: of an operator; the fewest are 2.
    """

    min_length: int = 501
    max_length: int = 1999
    max_depth: int = 10
    max_arguments: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length must be from 1 to max_length = {self.max_length}; got {self.min_length}.")
        if not 1 <= self.max_depth <= 20:
            raise ValueError(f"max_depth must be from 1 to 20; got {self.max_depth}.")
        if not 2 <= self.max_arguments <= 10:
            raise ValueError(f"max_arguments must be from 2 to 10; got {self.max_arguments}.")


class Row(NamedTuple):
    """The tokens of an expression, uint8, without an end, and its value, 0 to 9."""

    tokens: np.ndarray
    value: int


class Level(NamedTuple):
    """All nodes of one depth, in the order of their parents; the arguments of an operator are neighbours.

    Attributes:
      tree: of each node, the expression it belongs to.
      is_operator: of each node.
      arguments: of each operator.
    """

    tree: np.ndarray
    is_operator: np.ndarray
    arguments: np.ndarray


def rows(seed: int, shape: Shape, *, workers: int = 1) -> Iterator[Row]:
    """Different expressions without end: the same ones for the same seed and shape, whatever the number of workers.

    Args:
      seed: at least 0.
      shape: of the expressions.
      workers: processes that draw; with 1 it is this one.

    Raises:
      ValueError: for a seed below 0 or fewer workers than 1.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}.")
    draw = functools.partial(draw_chunk, seed, shape)
    if workers == 1:
        return different(map(draw, itertools.count()))
    return different(in_processes(draw, workers))


def different(chunks: Iterable[list[Row]]) -> Iterator[Row]:
    """All rows, in order, but those whose tokens came before: no expression is in two splits.

    Raises:
      ValueError: for a chunk without anything new, after which there is little hope for more.
    """
    seen: set[bytes] = set()
    for chunk in chunks:
        before = len(seen)
        for row in chunk:
            digest = hashlib.blake2b(row.tokens.tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield row
        if len(seen) == before:
            raise ValueError(
                f"the limits on expressions must allow for more different ones; got {before:,}, and then "
                f"{len(chunk):,} in a row that were among them."
            )


def draw_chunk(seed: int, shape: Shape, number: int) -> list[Row]:
    """The rows of one chunk of a seed's stream. Chunks are independent of each other, so that any process may draw it.

    Raises:
      ValueError: if expressions of this shape are too rare to be found by drawing.
    """
    rng = np.random.default_rng([seed, number])
    found: list[Row] = []
    for forests in itertools.count(1):
        found += forest(rng, shape)
        if len(found) >= ROWS_OF_A_CHUNK:
            return found[:ROWS_OF_A_CHUNK]
        if forests >= 20 and len(found) < forests:
            raise ValueError(
                f"{shape} must be met by at least one random expression in {TREES_AT_ONCE:,}; got {len(found)} in "
                f"{forests * TREES_AT_ONCE:,}."
            )
    raise AssertionError("unreachable")


def forest(rng: np.random.Generator, shape: Shape) -> list[Row]:
    """Draws `TREES_AT_ONCE` expressions and returns those of the right length."""
    levels = _draw_levels(rng, shape)
    lengths = _tokens_of_each_tree(levels)
    kept = np.flatnonzero((shape.min_length <= lengths) & (lengths <= shape.max_length))
    if len(kept) == 0:
        return []
    tokens, values = _write(rng, _restrict(levels, kept), lengths[kept])
    ends = np.cumsum(lengths[kept])
    return [Row(*row) for row in zip(np.split(tokens, ends[:-1]), values.tolist(), strict=True)]


def _draw_levels(rng: np.random.Generator, shape: Shape) -> list[Level]:
    tree = np.arange(TREES_AT_ONCE)
    levels = []
    for depth in range(1, shape.max_depth + 1):
        deepest = depth == shape.max_depth
        is_operator = np.zeros(len(tree), bool) if deepest else rng.random(len(tree)) <= OPERATOR_PROBABILITY
        arguments = rng.integers(2, shape.max_arguments, np.count_nonzero(is_operator), endpoint=True)
        levels.append(Level(tree, is_operator, arguments))
        tree = np.repeat(tree[is_operator], arguments)
    return levels


def _tokens_of_each_tree(levels: list[Level]) -> np.ndarray:
    """Every node is a token, and every operator closes with another."""
    counts = [
        np.bincount(level.tree, minlength=TREES_AT_ONCE)
        + np.bincount(level.tree[level.is_operator], minlength=TREES_AT_ONCE)
        for level in levels
    ]
    return np.sum(counts, axis=0)


def _restrict(levels: list[Level], kept: np.ndarray) -> list[Level]:
    """The levels of some trees, in their order, which are numbered from 0 again."""
    number = np.full(TREES_AT_ONCE, -1)
    number[kept] = np.arange(len(kept))
    restricted = []
    for tree, is_operator, arguments in levels:
        new = number[tree]
        restricted.append(Level(new[new >= 0], is_operator[new >= 0], arguments[new[is_operator] >= 0]))
    return restricted


def _write(rng: np.random.Generator, levels: list[Level], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws digits and operators: the tokens of all trees, one after the other, and the value of each tree."""
    digits = [rng.integers(0, vocabulary.DIGITS, len(level.tree)) for level in levels]
    operators = [rng.integers(vocabulary.MIN, vocabulary.CLOSE, len(level.arguments)) for level in levels]
    # Upwards: how many tokens a node spans, and its value.
    spans, values = [np.ones(0, int)], np.zeros(0, int)
    for level, digit, operator in zip(levels[::-1], digits[::-1], operators[::-1], strict=True):
        span = np.ones(len(level.tree), int)
        span[level.is_operator] = 2 + _sums(spans[0], level.arguments)
        spans.insert(0, span)
        above = digit.copy()
        above[level.is_operator] = evaluate(operator, values, level.arguments)
        values = above
    # Downwards: where a node begins.
    tokens = np.empty(lengths.sum(), np.uint8)
    begin = np.cumsum(lengths) - lengths
    for level, digit, operator, span, span_below in zip(levels, digits, operators, spans, spans[1:], strict=False):
        tokens[begin] = vocabulary.FIRST_DIGIT + digit
        opening = begin[level.is_operator]
        tokens[opening] = operator
        tokens[opening + span[level.is_operator] - 1] = vocabulary.CLOSE
        before = np.cumsum(span_below) - span_below  # tokens of the level below that come earlier
        first = _firsts(level.arguments)
        begin = np.repeat(opening + 1 - before[first], level.arguments) + before
    return tokens, values


def evaluate(operators: np.ndarray, values: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """The value of each operator; its arguments are the next `arguments` of the values.

    MED of an even number of digits is the mean of the two in the middle, rounded down. SM is the sum modulo 10.
    """
    if len(operators) == 0:
        return np.zeros(0, int)
    first = _firsts(arguments)
    group = np.repeat(np.arange(len(operators)), arguments)
    ordered = np.sort(vocabulary.DIGITS * group + values) % vocabulary.DIGITS  # within each operator
    results = {
        vocabulary.MIN: ordered[first],
        vocabulary.MAX: ordered[first + arguments - 1],
        vocabulary.MED: (ordered[first + (arguments - 1) // 2] + ordered[first + arguments // 2]) // 2,
        vocabulary.SM: _sums(values, arguments) % vocabulary.DIGITS,
    }
    return np.choose(operators - vocabulary.MIN, [results[operator] for operator in sorted(results)])


def _firsts(arguments: np.ndarray) -> np.ndarray:
    return np.cumsum(arguments) - arguments


def _sums(values: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, _firsts(arguments)) if len(arguments) else np.zeros(0, int)
