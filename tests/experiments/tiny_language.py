"""A language model of seconds for tests: one sentence many times, and a recipe small enough to learn from it."""

import contextlib

from experiments.common.train import Log
from experiments.language.recipe import Language

TEXT = "the quick brown fox jumps over the lazy dog. "


def tiny_language(tmp_path_factory) -> Language:
    """The recipe, in folders of its own."""
    folder = tmp_path_factory.mktemp("text")
    for name, copies in (("train", 40), ("valid", 12), ("test", 12)):
        (folder / f"{name}.txt").write_text(TEXT * copies)
    return Language(
        path=folder,
        data_dir=tmp_path_factory.mktemp("data"),
        steps=8,
        batch_size=8,
        length=16,
        features=8,
        num_layers=2,
        num_heads=2,
        warmup_steps=1,
        log_every=2,
        evaluate_every=4,
        checkpoint_every=2,
        evaluation_windows=8,
    )


@contextlib.contextmanager
def interrupted_at(monkeypatch, step):
    """The training within is interrupted at that step."""
    add = Log.add

    def interrupt(self, now, measures):
        if now == step:
            raise KeyboardInterrupt
        add(self, now, measures)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", interrupt)
        yield
