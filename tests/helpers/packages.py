"""The packages behind the hubs for tests: real ones where they are installed, else the test is
skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo_models.py"


def real(name: str) -> Any:
    """A package; torchvision from PyPI (which timm imports) gets by beside a CPU build of torch."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    found = importlib.util.spec_from_file_location("zoo_models_of_hubs", ZOO)
    assert found is not None
    assert found.loader is not None
    models = importlib.util.module_from_spec(found)
    found.loader.exec_module(models)
    models.without_compiled_operations()
    KEPT.append(models)
    return importlib.import_module(name)


KEPT: list[Any] = []  # the declarations last as long as the module that made them
