"""The house as read from its sources: floors, imports, and what has grown large.

python tests/helpers/house.py        lists files over 300 lines and functions over 40, for the
                                     reader who decides
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "src" / "offramp"
READ = ("src", "tests", "benchmarks", "examples", "docs")

FLOORS = [
    ["errors"],
    ["_support"],
    ["guarantees"],
    ["plans"],
    ["networks"],
    ["data", "partition"],
    ["augments", "gates", "layers", "members", "runtime"],
    ["engines", "exits"],
    ["models"],
    ["hubs", "recipes"],
    ["calibration", "building"],
    ["fitting"],
    ["deploy", "reporting"],
    ["comparing", "contracts", "designing", "templates", "testing"],
    [""],  # the face, offramp/__init__.py
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
SHELVES = (
    "augments",
    "exits",
    "gates",
    "layers",
    "models",
    "hubs",
    "members",
    "recipes",
    "engines",
)
NO_TORCH = ("calibration", "guarantees", "plans", "reporting")
LINES = 300
LENGTH = 40


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted names under offramp (the face is ""), without the package's own name -> file."""
    found = {}
    for file in sorted(HOUSE.rglob("*.py")):
        parts = file.relative_to(HOUSE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def parsed(file: Path) -> ast.Module:
    """What stands in a file, read once."""
    return ast.parse(file.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The room in which a module stands: a folder or a single file."""
    return module.split(".")[0]


@functools.cache
def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports anywhere but under TYPE_CHECKING, named as `modules`
    names them.
    """
    known = modules()
    found = set()
    for node in _running(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("offramp").lstrip(".")
                for alias in node.names
                if _ours(alias.name)
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            if _ours(node.module or ""):
                base = (node.module or "").removeprefix("offramp").lstrip(".")
                within = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
                found |= within & known.keys() or {base}
    return found


def _ours(name: str) -> bool:
    return name == "offramp" or name.startswith("offramp.")


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _running(child)


def circle() -> list[str] | None:
    """Modules that import each other in a circle, if there are any."""
    known = modules()
    graph = {name: imports(file) & known.keys() for name, file in known.items() if name}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in graph:
            return None
        for other in sorted(graph[name] - {name}):
            found = visit(other, [*way, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in graph if (found := visit(name, []))), None)


def large_files(limit: int) -> list[tuple[int, str]]:
    """Files with more lines than the limit."""
    files = [file for folder in READ for file in sorted((ROOT / folder).rglob("*.py"))]
    sizes = [
        (len(file.read_text(encoding="utf-8").splitlines()), str(file.relative_to(ROOT)))
        for file in files
    ]
    return sorted((size for size in sizes if size[0] > limit), reverse=True)


def large_functions(limit: int) -> list[tuple[int, str]]:
    """Functions longer than the limit, docstring included."""
    found = []
    for folder in READ:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    if length > limit:
                        found.append(
                            (length, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
                        )
    return sorted(found, reverse=True)


def main() -> int:
    """Print what is large. Length is no law: packed code was the price of one."""
    for what, limit, found in (
        ("files", LINES, large_files(LINES)),
        ("functions", LENGTH, large_functions(LENGTH)),
    ):
        print(f"{len(found)} {what} over {limit} lines")
        for size, name in found:
            print(f"  {size:4} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
