"""What benchmarks import of the package exists. They measure internals, which may be renamed."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*.py"))


def imported(file: Path) -> list[tuple[str, str]]:
    """Modules of the package, and the names that a file imports from them."""
    pairs = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offramp."):
            pairs += [(node.module, alias.name) for alias in node.names]
    return pairs


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_that_every_name_imported_from_the_package_exists(file):
    for module, name in imported(file):
        if not hasattr(import_module(module), name):
            import_module(f"{module}.{name}")  # raises where it is no module either


def test_that_some_benchmark_imports_a_module_of_the_package():
    assert any(map(imported, FILES))
