"""A few architectures of benchmarks/zoo.txt: what must be refused always, others where their
packages are there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REFUSED = {
    "odd:batch_mean": r"operation aten\.mean\.dim mixes rows",
    "odd:batch_statistics": r"operation aten\.batch_norm\.default in 'norm' mixes rows",
    "odd:branch_on_values": r"branches on values of the data, at `return h if h\.sum\(\) > 0 else "
    r"-h`",
    "odd:fixed_batch": r"operation aten\.\S+ gives shape \[\d+, .*B.*\], and the model gives no "
    r"tensor",
    "odd:weight_shared_loop": r"module 'two' runs more than once",
    "odd:memory": r"operation aten\.add_\.Tensor writes to the buffer 'calls' in every call",
    "odd:batch_folded": r"'folded' is not a cut: it gives .* of shape \[2\*B, 6\]",
}
FEW = ["hf:DistilBert", "timm:resnet18", "torchvision:squeezenet1_1"]


@pytest.fixture(scope="module")
def zoo():
    """The script and the modules beside it, and no trace of them afterwards."""
    before = {*sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("zoo")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in {"zoo", "zoo_models", "zoo_odd", "zoo_figures"} - before:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence_that_names_the_operation(zoo, name):
    import re

    found = zoo.tried(name)
    assert found["came"] == "refused"
    assert re.search(REFUSED[name], found["why"]), found["why"]
    assert str(BENCHMARKS) not in found["why"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_a_few_pass(zoo, name):
    packages = {
        "hf": ["transformers"],
        "timm": ["timm", "torchvision"],
        "torchvision": ["torchvision"],
    }
    for package in packages[name.split(":")[0]]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = zoo.tried(name)
    assert found["came"] == "passes", found
    assert found["exact"]
    assert found.get("length", "yes") == "yes"


def test_the_list_is_broad(zoo):
    rows = zoo.listed().values()
    assert len(rows) >= 60
    assert max(Counter(row["family"] for row in rows).values()) <= 5
    assert len({row["family"] for row in rows}) >= 15
    assert {row["kind"] for row in rows} == {"CNN", "ViT", "hybrid", "MLP", "text"}
    assert sum(row["kind"] == "text" for row in rows) >= 15
    assert sum(row["expected"] == "refused" for row in rows) >= 5
