"""ListOps as it is drawn: the value of every row, the distribution, and that a seed says it all."""

import itertools
import re

import numpy as np
import pytest

from experiments.lra.listops import trees, vocabulary
from experiments.lra.listops.trees import Row, Shape

ROWS = 10_000


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return list(itertools.islice(trees.rows(0, Shape()), ROWS))


def value_of(text: str) -> int:
    """Another evaluator: rewrites innermost lists to their values, as text, until one number is left."""
    innermost = re.compile(r"\[(MIN|MAX|MED|SM)((?: \d)+) \]")

    def reduced(match: re.Match) -> str:
        digits = sorted(int(digit) for digit in match[2].split())
        middle = len(digits) // 2
        return {
            "MIN": lambda: str(digits[0]),
            "MAX": lambda: str(digits[-1]),
            "MED": lambda: str(digits[middle] if len(digits) % 2 else (digits[middle - 1] + digits[middle]) // 2),
            "SM": lambda: str(sum(digits))[-1],
        }[match[1]]()

    while not text.isdigit():
        text, replaced = innermost.subn(reduced, text)
        assert replaced, f"no innermost list in {text}"
    return int(text)


def text_of(row: Row) -> str:
    return " ".join(vocabulary.TEXTS[token] for token in row.tokens)


def depths(row: Row) -> np.ndarray:
    """How many lists are open behind each token."""
    opens = (row.tokens >= vocabulary.MIN) & (row.tokens < vocabulary.CLOSE)
    return np.cumsum(opens.astype(int) - (row.tokens == vocabulary.CLOSE))


def test_values_are_those_of_another_evaluator(rows):
    assert [number for number, row in enumerate(rows) if value_of(text_of(row)) != row.value] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MED 1 2 ]", 1),  # 1.5, rounded down
        ("[MED 9 1 2 4 ]", 3),
        ("[MED 9 1 4 ]", 4),
        ("[MED 0 0 9 9 ]", 4),
        ("[SM 9 8 7 ]", 4),
        ("[SM 5 5 ]", 0),
        ("[MIN 3 [MAX 9 0 ] 4 ]", 3),
        ("[MAX [MIN 3 2 ] [SM 4 4 ] ]", 8),
    ],
)
def test_the_other_evaluator_knows_the_rules(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("operator", "digits", "value"),
    [
        (vocabulary.MED, [1, 2], 1),
        (vocabulary.MED, [9, 1, 2, 4], 3),
        (vocabulary.MED, [9, 1, 4], 4),
        (vocabulary.MED, [8, 9], 8),
        (vocabulary.SM, [9, 8, 7], 4),
        (vocabulary.SM, [5, 5], 0),
        (vocabulary.MIN, [3, 9, 2], 2),
        (vocabulary.MAX, [3, 9, 2], 9),
    ],
)
def test_operators(operator, digits, value):
    # Between two others, so that a wrong border would show.
    arguments = np.array([2, len(digits), 2])
    operators = np.array([vocabulary.MAX, operator, vocabulary.MIN])
    assert trees.evaluate(operators, np.array([0, 0, *digits, 9, 9]), arguments).tolist() == [0, value, 9]


def test_lists_are_well_formed_and_nest_nine_deep(rows):
    for row in rows[:2000]:
        depth = depths(row)
        assert depth[-1] == 0
        assert depth[:-1].min() == 1  # one list around everything
        # With fewer levels hardly any expression is so long: in all rows measured, the deepest list is at the limit.
        assert depth.max() == 9


def test_lists_have_two_to_ten_arguments_in_equal_shares(rows):
    counts = np.zeros(12, int)
    for row in rows[:2000]:
        open_lists: list[int] = []
        for token in row.tokens:
            if token == vocabulary.CLOSE:
                counts[open_lists.pop()] += 1
            elif open_lists:
                open_lists[-1] += 1
            if vocabulary.MIN <= token < vocabulary.CLOSE:
                open_lists.append(0)
    shares = counts / counts.sum()
    assert shares[[0, 1, 11]].tolist() == [0, 0, 0]
    # 350,000 lists: a standard deviation of 0.0005. That only long expressions are kept makes 2 a little less frequent
    # (0.109) and 10 a little more (0.112).
    np.testing.assert_allclose(shares[2:11], 1 / 9, atol=0.005)


def test_digits_and_operators_are_uniform(rows):
    counts = np.bincount(np.concatenate([row.tokens for row in rows[:2000]]), minlength=vocabulary.SIZE)
    assert counts[: vocabulary.FIRST_DIGIT].tolist() == [0, 0, 0]
    digits = counts[vocabulary.FIRST_DIGIT :][: vocabulary.DIGITS]
    operators = counts[vocabulary.MIN : vocabulary.CLOSE]
    np.testing.assert_allclose(
        digits / digits.sum(), 0.1, atol=0.002
    )  # 1.4 million: five standard deviations are 0.0013
    np.testing.assert_allclose(operators / operators.sum(), 0.25, atol=0.006)  # 0.3 million: 0.004
    assert counts[vocabulary.CLOSE] == operators.sum()


def test_lengths_are_those_of_the_published_generator(rows):
    lengths = np.array([len(row.tokens) for row in rows])
    assert lengths.min() >= 501
    assert lengths.max() <= 1999
    assert lengths.min() <= 505
    assert lengths.max() >= 1990
    # 60,000 rows of a plain recursion by the published rules: quartiles 701, 949, 1306, mean 1032.4, deviation 392.4.
    # The standard deviations here, at 10,000 rows, are 4, 6 and 8, and 4 of the mean.
    np.testing.assert_allclose(np.quantile(lengths, [0.25, 0.5, 0.75]), [701, 949, 1306], atol=25)
    assert abs(lengths.mean() - 1032.4) < 16
    assert abs(lengths.std() - 392.4) < 12


def test_values_are_distributed_as_in_the_published_generator(rows):
    shares = np.bincount([row.value for row in rows], minlength=10) / len(rows)
    # Of the same 60,000 rows. Standard deviations here: 0.004 at the ends, else 0.003.
    expected = [0.170, 0.090, 0.078, 0.083, 0.091, 0.087, 0.077, 0.070, 0.089, 0.166]
    np.testing.assert_allclose(shares, expected, atol=0.015)


def test_other_shapes_are_kept_to():
    shape = Shape(min_length=10, max_length=30, max_depth=3, max_arguments=4)
    few = list(itertools.islice(trees.rows(1, shape), 500))
    assert {len(row.tokens) for row in few} <= set(range(10, 31))
    assert max(depths(row).max() for row in few) == 2
    assert [row for row in few if value_of(text_of(row)) != row.value] == []


def same(first: list[Row], second: list[Row]) -> bool:
    return all(
        np.array_equal(one.tokens, other.tokens) and one.value == other.value
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_rows_do_not_depend_on_the_number_of_workers(rows, workers):
    # Beyond two chunks, so that several processes draw at once.
    assert same(list(itertools.islice(trees.rows(0, Shape(), workers=workers), 4500)), rows[:4500])


def test_a_seed_repeats_and_another_differs(rows):
    assert same(list(itertools.islice(trees.rows(0, Shape()), 100)), rows[:100])
    others = list(itertools.islice(trees.rows(1, Shape()), 2000))
    seen = {row.tokens.tobytes() for row in rows}
    assert [row for row in others if row.tokens.tobytes() in seen] == []


def test_chunks_differ(rows):
    assert len({row.tokens.tobytes() for row in rows}) == ROWS


def test_what_came_before_is_left_out():
    def row(*tokens):
        return Row(np.array(tokens, np.uint8), tokens[0])

    chunks = [[row(1), row(2), row(1)], [row(2), row(1, 2)], [row(3)]]
    assert [kept.tokens.tolist() for kept in trees.different(chunks)] == [[1], [2], [1, 2], [3]]


def test_short_expressions_are_different_rows_too():
    shape = Shape(min_length=4, max_length=5)  # so few that most are drawn several times
    few = list(itertools.islice(trees.rows(0, shape), 3000))
    assert len({row.tokens.tobytes() for row in few}) == 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_length": 0}, "min_length must be from 1 to max_length = 1999; got 0."),
        ({"min_length": 3000}, "min_length must be from 1 to max_length = 1999; got 3000."),
        ({"max_depth": 0}, "max_depth must be from 1 to 20; got 0."),
        ({"max_arguments": 1}, "max_arguments must be from 2 to 10; got 1."),
    ],
)
def test_shapes_say_what_they_expect(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Shape(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be at least 0; got -1."),
        ({"seed": 0, "workers": 0}, "workers must be at least 1; got 0."),
    ],
)
def test_drawing_says_what_it_expects(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trees.rows(shape=Shape(), **arguments)


def test_a_shape_that_is_never_met_is_an_error():
    with pytest.raises(ValueError, match=r"must be met by .*; got 0 in 163,840"):
        next(trees.rows(0, Shape(min_length=600, max_length=700, max_depth=3)))


def test_limits_that_leave_too_few_expressions_are_an_error():
    with pytest.raises(ValueError, match=r"must allow for more different ones; got 10, and then 2,000 in a row"):
        list(trees.rows(0, Shape(min_length=1, max_length=1)))
