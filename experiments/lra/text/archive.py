"""The archive of the IMDB reviews, `aclImdb_v1.tar.gz`, as its authors serve it.

A review is a member `aclImdb/<train or test>/<pos or neg>/<number>_<rating>.txt`, in UTF-8; ratings of 7 to 10 praise,
1 to 4 blame. Reviews without a label, in `unsup`, are not used.
"""

import re
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console

from experiments.common.archives import ArchiveError, members
from experiments.common.downloads import Download, obtain

IMDB: Final = Download(
    url="http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    size=84_125_825,
    sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
)
VERSION: Final = "1.0.0"  # of what is made of it
SPLITS: Final = ("train", "test")
LABELS: Final = ("neg", "pos")  # by number
REVIEWS: Final = 25_000  # in each split
LARGEST: Final = 2**20  # bytes of a review; the longest has 14,000

_NAME = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d+)_(\d+)\.txt")
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}


class Review(NamedTuple):
    text: bytes
    label: int
    """1 praises, 0 blames."""


def get(data_dir: Path, console: Console) -> dict[str, list[Review]]:
    """Both splits, from the archive in a folder, which is downloaded to there if it is missing.

    Raises:
      ValueError: if it cannot be had, or is not the published one.
    """
    return read(obtain(IMDB, data_dir, console))


def read(path: Path) -> dict[str, list[Review]]:
    """Both splits, in the order of the archive.

    Raises:
      ArchiveError: if it is damaged, or a review's name has a rating that is not its label's, or there are not as
        many as there should be.
    """
    splits: dict[str, list[Review]] = {split: [] for split in SPLITS}
    for member in members(path, lambda name: _NAME.fullmatch(name) is not None, largest=LARGEST):
        found = _NAME.fullmatch(member.name)
        assert found is not None, "only such members are wanted"
        split, label, _, rating = found.groups()
        if int(rating) not in _RATINGS[label]:
            ratings = _RATINGS[label]
            raise ArchiveError(
                f"{path} must have ratings from {ratings[0]} to {ratings[-1]} in {label}; got {member.name!r}."
            )
        splits[split].append(Review(member.content.strip(), LABELS.index(label)))
    for split, reviews in splits.items():
        if len(reviews) != REVIEWS:
            raise ArchiveError(
                f"{path} must have {REVIEWS:,} reviews in aclImdb/{split}; got {len(reviews):,}. Remove it and get it "
                "again."
            )
    return splits
