"""A page of headings, paragraphs, tables and pictures, as one HTML file or as Markdown with its pictures beside it."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.common.workdir import write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1d2127 }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem } h2 { border-bottom: 1px solid #d8dce2; padding-bottom: .3rem }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .8rem 0 }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e6e9ee; vertical-align: top }
th { font-weight: 600; background: #f5f6f8 } img { max-width: 100% } summary { cursor: pointer; color: #1f5fa8 }
code { background: #f1f3f5; padding: 0 .2rem }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #dfe3e8 } th, code { background: #23272e } h2, th, td { border-color: #343a43 }
  summary { color: #7fb0ea } img { background: white }
}
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    """In which `this` is code."""


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    name: str
    """Of its file, without a folder."""

    content: bytes
    """A PNG."""

    text: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class Details:
    """Folded away in HTML."""

    summary: str
    blocks: "Sequence[Block]"


type Block = Heading | Paragraph | Bullets | Table | Picture | Details


def write_html(title: str, blocks: Sequence[Block], folder: Path) -> Path:
    """Writes folder/index.html, which needs no other file."""
    body = "\n".join(as_html(block) for block in blocks)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    write_whole(folder / "index.html", page.encode())
    return folder / "index.html"


def as_html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{inline(cell)}</th>" for cell in header)
            body = "\n".join("<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        case Picture(_, content, text):
            data = base64.b64encode(content).decode()
            return f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(text)}"></p>'
        case Details(summary, blocks):
            inner = "\n".join(as_html(inner) for inner in blocks)
            return f"<details><summary>{inline(summary)}</summary>\n{inner}\n</details>"


def inline(text: str) -> str:
    """Escaped, with code and bold type."""
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text)))


def write_markdown(title: str, blocks: Sequence[Block], folder: Path) -> Path:
    """Writes folder/report.md, and the pictures beside it."""
    for picture in pictures(blocks):
        write_whole(folder / picture.name, picture.content)
    text = "\n\n".join([f"# {title}", *(as_markdown(block) for block in blocks)])
    write_whole(folder / "report.md", f"{text}\n".encode())
    return folder / "report.md"


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    found = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Details):
            found += pictures(block.blocks)
    return found


def as_markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        case Picture(name, _, text):
            return f"![{text}]({name})"
        case Details(summary, blocks):
            return "\n\n".join([f"**{summary}**", *(as_markdown(inner) for inner in blocks)])
