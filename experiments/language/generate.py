"""Writes on from a prompt with a trained language model, token by token as they come.

python -m experiments.language.generate --workdir W --prompt "def main(" --tokens 500
"""

import codecs
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import flashbutterfly_jax as fb
from experiments.common.errors import RunError
from experiments.language.perplexity import perplexity
from experiments.language.tokenizers import Tokenizer
from experiments.language.trained import Trained, load


@dataclass(frozen=True)
class Options:
    """Write on from a prompt with the latest checkpoint of a training run."""

    workdir: Path
    """Folder of the run."""

    prompt: str = ""
    """Text to go on from; empty begins a document."""

    tokens: int = 500
    """To write."""

    samples: int = 1
    """Texts that are written at once. The first appears as it comes, and the others in the end."""

    temperature: float = 0.8
    """Below 1 makes likely tokens likelier; 0 takes the likeliest."""

    top_k: int = 0
    """Tokens to draw from, the likeliest; 0 is all."""

    top_p: float = 0.95
    """Probability of the likeliest tokens to draw from."""

    seed: int = 0
    """Of the draws."""

    perplexity_of: Path | None = None
    """Measures a text file instead of writing one."""

    stride: int | None = None
    """Tokens between the windows of that measurement; None is half of the training length."""


def texts(trained: Trained, options: Options) -> Iterator[str]:
    """The first sample piece by piece, then every other as a whole.

    Raises:
      ValueError: if an option is out of range.
    """
    if options.samples < 1:
        raise ValueError(f"samples must be at least 1; got {options.samples}.")
    prompt = trained.tokenizer.encode(options.prompt.encode()).astype(np.int32)
    if trained.recipe.separate or not len(prompt):  # a document begins after the end of another
        prompt = np.concatenate([[trained.tokenizer.separator], prompt])
    steps = fb.models.stream(
        trained.model,
        trained.variables,
        np.tile(prompt, (options.samples, 1)),
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )

    def pieces() -> Iterator[str]:
        written: list[np.ndarray] = []

        def first() -> Iterator[int]:
            for tokens in steps:
                written.append(_known(tokens, trained.tokenizer))
                yield int(written[-1][0])

        yield options.prompt
        yield from decoded(first(), trained.tokenizer)
        for number, sample in enumerate(np.stack(written, axis=1)[1:], 2):
            text = trained.tokenizer.decode(sample).decode(errors="replace")
            yield f"\n\n--- {number} ---\n{options.prompt}{text}"

    return pieces()


def decoded(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of tokens as they come, characters whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    seen: list[int] = []
    given = 0
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if text.endswith("\ufffd".encode()):  # a library's sign for a character that is not there in full yet
            continue
        yield decoder.decode(text[given:])
        given = len(text)
        if text.endswith(b"\n") and len(seen) > 64:  # nothing before a line's end depends on what follows
            seen, given = [], 0
    yield decoder.decode(b"", final=True)


def _known(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The vocabulary is filled up; what is beyond it has never been seen and is shown as a separator."""
    return np.where(tokens < tokenizer.vocab_size, tokens, tokenizer.separator)


def measure(trained: Trained, options: Options) -> str:
    """The sentence about a text.

    Raises:
      ValueError: if it is no text, or too short.
    """
    file = options.perplexity_of
    assert file is not None
    try:
        text = file.read_bytes()
        text.decode()
    except OSError as error:
        raise ValueError(f"perplexity_of must be a file of text; got {file} ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"perplexity_of must be UTF-8 text; {file} is not, at byte {error.start:,}.") from error
    tokens = np.concatenate([[trained.tokenizer.separator], trained.tokenizer.encode(text).astype(np.int64)])
    length = trained.recipe.length
    stride = max(1, length // 2) if options.stride is None else options.stride
    measured = perplexity(trained.model, trained.variables, tokens, length=length, stride=stride)
    return (
        f"{measured.value:.4f} perplexity of {measured.tokens:,} tokens, {measured.bits_per_byte(len(text)):.4f} bits "
        f"per byte, in windows of {length} every {stride}"
    )


def main() -> None:
    """Writes to standard output; what can go wrong is one sentence."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = tyro.cli(Options, prog="python -m experiments.language.generate")
    try:
        trained = load(options.workdir)
        if options.perplexity_of is not None:
            print(measure(trained, options))
            return
        for piece in texts(trained, options):
            print(piece, end="", flush=True)
        print()
    except (RunError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
