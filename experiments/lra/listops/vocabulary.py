"""The tokens of ListOps and their numbers, fixed: no file and no count decides them."""

from typing import Final

PAD: Final = 0
UNKNOWN: Final = 1  # kept free, as in the paper's code; nothing here writes it
END: Final = 2  # closes every sequence
FIRST_DIGIT: Final = 3  # the digit d is the token FIRST_DIGIT + d
DIGITS: Final = 10
OPERATORS: Final = ("[MIN", "[MAX", "[MED", "[SM")
MIN, MAX, MED, SM = range(FIRST_DIGIT + DIGITS, FIRST_DIGIT + DIGITS + len(OPERATORS))
CLOSE: Final = SM + 1
SIZE: Final = CLOSE + 1  # 18

# By number. Parentheses are no tokens: the released files have them, and every published model drops them.
TEXTS: Final = ("<pad>", "<unk>", "<eos>", *map(str, range(DIGITS)), *OPERATORS, "]")
