"""Trains language models: `python -m experiments.language.train --help`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import flashbutterfly_jax as fb
from experiments.common.command import main
from experiments.common.train import Result
from experiments.language.quality import bits_per_byte, compressors, measured
from experiments.language.recipe import PRESETS, Language
from experiments.language.tokenizers import make_tokenizer

WIKITEXT = Path("data/wikitext-103-raw")
RECIPES = {
    "stdlib": PRESETS,
    "wikitext": {name: replace(recipe, path=WIKITEXT, separate=False) for name, recipe in PRESETS.items()},
    "text": {name: replace(recipe, path=Path("data/text")) for name, recipe in PRESETS.items()},
}
SAMPLE = 300  # tokens


def finish(recipe: Language, result: Result, folder: Path) -> None:
    """Prints the exact perplexity on the test split beside what compressors make of it, and a sample."""
    console = Console()
    console.print(comparison(recipe, result, console))
    tokens = recipe.tokens()
    prompt = tokens["test"][: recipe.length // 4]
    model, tokenizer = recipe.model(tokens.vocab_size), make_tokenizer(recipe.tokenizer)
    new = fb.models.generate(model, {"params": result.state.params}, prompt[None], SAMPLE, top_p=0.9, temperature=0.8)
    console.print("[bold]a prompt from the test split, and what the model adds[/]")
    console.print(tokenizer.decode(prompt).decode(errors="replace"), style="dim", end="", markup=False, highlight=False)
    console.print(tokenizer.decode(np.asarray(new[0])).decode(errors="replace"), markup=False, highlight=False)


def comparison(recipe: Language, result: Result, console: Console) -> Table:
    """Bits per byte of the model and of compressors on the test split."""
    info = recipe.tokens().info["test"]
    found = measured(recipe, result.state.params, "test", console)
    model = f"model, {found.value:.3f} perplexity of {found.tokens + 1:,} tokens"
    table = Table(title=f"test split, {info.bytes:,} bytes", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    for name, bits in {model: bits_per_byte(found, info), **compressors(info)}.items():
        table.add_row(name, f"{bits:.3f}")
    return table


if __name__ == "__main__":
    main(RECIPES, prog="python -m experiments.language.train", finish=finish)
