"""Which sources a program is made of, and their hash: what compiled once is known to compile until that changes.

Followed are the names that a definition mentions, through the modules of the kernels and of these tests: the forward
kernel's hash stays when the backward kernel changes. Comments, docstrings and line breaks do not count.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.kernels.programs import Program

_OURS = ("pallas_kernels", "tests")


def digest(program: Program, versions: dict[str, str]) -> str:
    """The hash of a program's sources, configuration and options, and of the compiler's versions."""
    builder, keywords = program.builder, {}
    if isinstance(builder, functools.partial):
        builder, keywords = builder.func, builder.keywords
    given = {
        "sources": closure(builder.__module__, builder.__name__),
        "keywords": keywords,
        "config": dataclasses.asdict(program.config),
        "dtype": program.dtype,
        "options": program.options,
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def closure(module: str, name: str) -> dict[str, str]:
    """Every definition that one is made of, itself included: `module.name` -> its tokens."""
    found: dict[str, str] = {}
    waiting = [(module, name)]
    while waiting:
        module, name = waiting.pop()
        if f"{module}.{name}" in found:
            continue
        source = _module(module)
        if name in source.imports:  # one that is imported to be passed on
            waiting.append(source.imports[name])
            continue
        node = source.definitions[name]
        found[f"{module}.{name}"] = tokens(source.text(node))
        waiting += _references(source, node)
    return found


@dataclasses.dataclass(frozen=True)
class _Source:
    """A module: its definitions, and where the names come from that it imports from modules of ours."""

    name: str
    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str]]
    modules: dict[str, str]

    def text(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        return "\n".join(self.lines[first - 1 : node.end_lineno]) + "\n"


@functools.cache
def _module(name: str) -> _Source:
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    text = Path(spec.origin).read_text()
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str]] = {}
    modules: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.TypeAlias):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None) or node.name]
            for target in targets:
                definitions |= {one.id: node for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in _OURS:
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if _is_module(whole):
                    modules[alias.asname or alias.name] = whole
                else:
                    imports[alias.asname or alias.name] = (node.module, alias.name)
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] in _OURS]
            assert not ours, f"{name}: import {ours} as `from package import module`, which `closure` can follow"
    return _Source(name, text.splitlines(), definitions, imports, modules)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not a package
        return False


def _references(source: _Source, node: ast.stmt) -> Iterator[tuple[str, str]]:
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id in source.modules:
            yield source.modules[one.value.id], one.attr
        elif isinstance(one, ast.Name):
            if one.id in source.imports:
                yield source.imports[one.id]
            elif one.id in source.definitions:
                yield source.name, one.id


def tokens(text: str) -> str:
    """The tokens of a source without comments, docstrings and the line breaks inside a statement."""
    lines: list[list[str]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            lines += [[f"<{tokenize.tok_name[token.type].lower()}>"], []]
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            lines[-1].append(token.string)
    statements = (line for line in lines if line not in ([], ["<newline>"]) and not _is_docstring(line))
    return "\n".join(" ".join(statement) for statement in statements)


def _is_docstring(line: list[str]) -> bool:
    return len(line) == 1 and line[0].lstrip("rR")[:1] in ("'", '"')
