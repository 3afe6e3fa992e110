"""Documents, examples and benchmarks import what users have: the face, contracts, errors, testing
and shelves.

Benchmarks may measure internals: then the line above such an import says why.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import house

USERS = {"", "contracts", "errors", "templates", "testing", "cli", *house.SHELVES}
PAGE_MAKERS = {
    "command_line.py",
    "recipes.py",
    "gates.py",
}  # they write pages about the package, and are no examples
PAGES = [house.ROOT / "README.md", *sorted((house.ROOT / "docs").rglob("*.md"))]
EXAMPLES = [*sorted((house.ROOT / "examples").glob("*.py"))]
DOCS = [
    file for file in sorted((house.ROOT / "docs").rglob("*.py")) if file.name not in PAGE_MAKERS
]
BENCHMARKS = sorted((house.ROOT / "benchmarks").glob("*.py"))


def inner(source: str) -> dict[int, str]:
    """The internals that a program imports, by line."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "offramp":
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "offramp"]
        else:
            continue
        for name in names:
            module = name.removeprefix("offramp").lstrip(".")
            private = any(part.startswith("_") for part in module.split("."))
            if house.room(module) not in USERS or private:
                found[node.lineno] = module
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda file: str(file.relative_to(house.ROOT)))
def test_pages_show_what_users_have(page: Path) -> None:
    for block in re.findall(
        r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    ):
        if ">>>" not in block:
            assert not inner(block), f"{page.name} imports {inner(block)}"


@pytest.mark.parametrize("file", [*EXAMPLES, *DOCS], ids=lambda file: file.name)
def test_examples_use_what_users_have(file: Path) -> None:
    found = inner(file.read_text(encoding="utf-8"))
    assert not found, f"{file.name} imports {found}"


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.name)
def test_benchmarks_say_why_they_measure_internals(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, module in inner("\n".join(lines)).items():
        line = lines[number - 1]
        above = lines[number - 2].strip()
        assert "  # " in line or above.startswith("# "), (
            f"{file.name}:{number} imports {module} and does not say why"
        )


def test_what_is_looked_for_is_noticed() -> None:
    assert (
        inner(
            "import offramp as off\nfrom offramp.contracts import Gate\nfrom "
            "offramp.gates.confidence import margin"
        )
        == {}
    )
    assert inner("from offramp.networks.nodes import Gate") == {1: "networks.nodes"}
    assert inner("if 1:\n    import offramp.runtime.graphs") == {2: "runtime.graphs"}
    assert inner("from offramp._support.find import find") == {1: "_support.find"}
    assert inner("from offramp.recipes._together import parameters_of") == {1: "recipes._together"}
