"""How dense the code is: a table for a reader's eye, printed by `make check`. No number fails
anything.

python tests/helpers/density.py               src/offramp, by package, with the densest files
python tests/helpers/density.py FOLDER ...    other folders, such as tests, benchmarks or another
                                              library

Everything is counted by hundred lines that are not blank: comprehensions, those inside of others,
fused assignments (`a, b = x, y`, except swaps), conditional expressions (`x if c else y`), lines
over 100 columns, and lines with a comment. BoTorch has 0.6 comprehensions, 0.01 nested, 0.11 fused,
0.6 conditional, no wide lines and 7.8 comments; einops 1.9, 0.04, 0, 0.4, 4.6 and 5.3.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import house

WIDE = 100  # columns
SHOWN = 10  # files in the list of the densest
COLUMNS = {
    "compr.": "comprehensions",
    "nested": "nested",
    "fused": "fused",
    "x if c": "conditional",
    "wide": "wide",
    "comments": "comments",
}
PACKED = ("comprehensions", "nested", "fused", "conditional")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Density:
    """Counts of one or several files.

    Attributes:
        lines: those that are not blank.
        comments: lines with a comment, alone or behind code.
        comprehensions: of lists, sets and dicts, and generator expressions.
        nested: those of them that stand inside of another one, or have two `for`.
        fused: assignments of several values to several names in one statement, swaps left out.
        conditional: expressions `x if c else y`.
        wide: lines over 100 columns.
    """

    lines: int = 0
    comments: int = 0
    comprehensions: int = 0
    nested: int = 0
    fused: int = 0
    conditional: int = 0
    wide: int = 0

    def __add__(self, other: Density) -> Density:
        """The counts of both together."""
        names = Density.__dataclass_fields__
        return Density(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def per_hundred(self, name: str) -> float:
        """A count by hundred lines."""
        return 100 * getattr(self, name) / max(self.lines, 1)

    @property
    def packed(self) -> float:
        """What the list of the densest files is sorted by: everything that has to be decoded, by
        hundred lines.
        """
        return sum(self.per_hundred(name) for name in PACKED)


def density_of(source: str) -> Density:
    """The counts of one file's text."""
    tree = ast.parse(source)
    lines = [line for line in source.splitlines() if line.strip()]
    return Density(
        lines=len(lines),
        comments=len(_comment_lines(source)),
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree)),
        nested=_nested(tree),
        fused=sum(_is_fused(node) for node in ast.walk(tree)),
        conditional=sum(isinstance(node, ast.IfExp) for node in ast.walk(tree)),
        wide=sum(len(line) > WIDE for line in lines),
    )


def _comment_lines(source: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def _nested(tree: ast.Module) -> int:
    """Comprehensions inside of comprehensions, and those with two `for`: each counts once."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not isinstance(node, COMPREHENSIONS):
            continue
        if len(node.generators) > 1:
            found.add(node)
        for inner in ast.walk(node):
            if inner is not node and isinstance(inner, COMPREHENSIONS):
                found.add(inner)
    return len(found)


def _is_fused(node: ast.AST) -> bool:
    """Whether it is `a, b = x, y`, and not a swap such as `a, b = b, a`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return False
    swapped = {ast.unparse(name) for name in target.elts} == {
        ast.unparse(value) for value in node.value.elts
    }
    return not swapped


def measured(folders: Sequence[Path]) -> dict[Path, Density]:
    """The counts of every Python file below some folders."""
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return {file: density_of(file.read_text(encoding="utf-8")) for file in files}


def _row(name: str, density: Density) -> str:
    cells = [f"{density.per_hundred(column):10.2f}" for column in COLUMNS.values()]
    return f"{name:34}" + "".join(cells) + f"{density.lines:10,}"


def _package(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else "."


def _print(folder: Path, found: dict[Path, Density]) -> None:
    groups: dict[str, Density] = {}
    for file, density in found.items():
        name = _package(file, folder)
        groups[name] = groups.get(name, Density()) + density
    heads = "".join(f"{head:>10}" for head in (*COLUMNS, "lines"))
    print(f"{folder.name + ', by 100 lines':34}{heads}")
    print(_row("total", sum(found.values(), Density())))
    for name in sorted(groups):
        print(_row(f"  {name}", groups[name]))
    print("the densest files")
    ordered = sorted(found, key=lambda file: found[file].packed, reverse=True)
    for file in ordered[:SHOWN]:
        print(_row(f"  {file.relative_to(folder)}", found[file]))


def main(arguments: Sequence[str]) -> int:
    """Print the table of each folder."""
    for folder in [Path(argument).resolve() for argument in arguments] or [house.HOUSE]:
        found = measured([folder])
        if not found:
            print(f"{folder} has no Python files", file=sys.stderr)
            return 2
        _print(folder, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
