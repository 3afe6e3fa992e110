"""The five laws of docs/architecture/contracts.md, read from the sources."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

import density
import house
import offramp

MODULES = house.modules()


def in_a_fresh_python(code: str) -> object:
    """What a program prints as JSON, run by a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_law_1_imports_go_down_or_stay(module):
    room = house.room(module)
    assert room in house.FLOOR, f"give the room {room!r} a floor in tests/helpers/house.py"
    floor = house.FLOOR[room]
    for other in house.imports(MODULES[module]):
        there = house.FLOOR[house.room(other)]
        assert there < floor or house.room(other) == room, (
            f"{module} [{floor}] imports {other} [{there}]"
        )


def test_law_1_few_arrows():
    """The drawing stays calm: few arrows between packages, few entries at the top."""
    arrows = {
        (house.room(name), house.room(other))
        for name in MODULES
        for other in house.imports(MODULES[name])
    }
    assert len([arrow for arrow in arrows if arrow[0] != arrow[1]]) <= 140
    marks = ("__pycache__", "__main__.py", "py.typed")  # which Python and type checkers look for
    assert len([entry for entry in house.HOUSE.iterdir() if entry.name not in marks]) <= 29


def test_law_1_no_circle():
    assert house.circle() is None


@pytest.mark.parametrize(
    "module", [name for name in MODULES if house.room(name) not in house.SHELVES]
)
def test_law_1_the_spine_reaches_shelves_by_name(module):
    shelved = {
        other for other in house.imports(MODULES[module]) if house.room(other) in house.SHELVES
    }
    assert not shelved, f"{module} imports {shelved}; use offramp._support.find"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if house.room(name) in house.SHELVES and "._" not in name]
)
def test_law_1_a_file_on_a_shelf_says_what_it_offers(module):
    """Find offers the names in `__all__` and nothing else; each of them is made in that very
    file.
    """
    if "." not in module:
        return  # the package of a shelf
    tree = house.parsed(MODULES[module])
    lists = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert len(lists) == 1, f"{module} has no __all__"
    offered = ast.literal_eval(lists[0].value)
    made = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert offered
    assert len(set(offered) & made) == len(offered)
    assert not [name for name in offered if name.startswith("_")]


def test_law_1_listing_a_shelf_imports_nothing():
    code = """
import json, sys
from offramp._support import find
names = {shelf: find.names(shelf) for shelf in ("exits", "gates", "layers", "models")}
loaded = [name for name in sys.modules if name.split(".")[:1] == ["offramp"]]
print(json.dumps([names, loaded, "torch" in sys.modules]))
"""
    names, loaded, torch = in_a_fresh_python(code)
    assert "margin" in names["gates"]
    assert sorted(loaded) == [
        "offramp",
        "offramp._support",
        "offramp._support.find",
        "offramp.errors",
    ]
    assert not torch


def test_law_2_no_torch():
    names = [f"offramp.{name}" for name in MODULES if house.room(name) in house.NO_TORCH]
    code = f"""
import importlib, json, sys
first = []
for name in ["offramp", *{names}]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        first.append(name)
        break
print(json.dumps(first))
"""
    assert len(names) > 10
    assert in_a_fresh_python(code) == []


def test_law_2_the_face_loads_nothing():
    code = """
import json, sys
import offramp
print(json.dumps([name for name in sys.modules if name.startswith(("offramp.", "torch", "numpy"))]))
"""
    assert in_a_fresh_python(code) == []


HEAVY = ("torch", "numpy", "scipy", "sympy")


@pytest.mark.parametrize(
    "words", [["--help"], ["calibrate", "--help"], ["compare", "--help"], ["--version"]]
)
def test_law_2_help_loads_nothing_heavy(words):
    code = f"""
import contextlib, io, json, sys
sys.argv = ["offramp", *{words}]
from offramp.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said:
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
heavy = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([code, len(said.getvalue()) > 0, heavy]))
"""
    assert in_a_fresh_python(code) == [0, True, []]


def test_law_2_opening_a_ladder_loads_neither_scipy_nor_sympy():
    code = """
import json, sys
import offramp as off
from torch import nn
net = off.ladder({"small": nn.Linear(4, 3), "large": nn.Linear(4, 3)}).eval()
off.open(net, off.Plan.by_hand({"small": 1.0}))
print(json.dumps([name for name in ("scipy", "sympy") if name in sys.modules]))
"""
    assert in_a_fresh_python(code) == []


@pytest.mark.parametrize("submodules_first", [False, True])
def test_law_3_names_on_the_face_stay_what_they_are(submodules_first):
    names = [
        f"offramp.{name}"
        for name in MODULES
        if name not in ("", "__main__") and ".__main__" not in name
    ]
    code = f"""
import importlib, json, offramp
def submodules():
    for name in {names}:
        importlib.import_module(name)
if {submodules_first}:
    submodules()
before = {{name: getattr(offramp, name) for name in offramp.__all__}}
submodules()
after = {{name: getattr(offramp, name) for name in offramp.__all__}}
kinds = {{name: type(value).__name__ for name, value in after.items()}}
print(json.dumps([[name for name in before if before[name] is not after[name]], kinds]))
"""
    changed, kinds = in_a_fresh_python(code)
    assert changed == []
    assert "module" not in kinds.values(), kinds


def test_law_3_the_face_is_small():
    assert len(offramp.__all__) <= 43
    assert offramp.__all__ == sorted(offramp.__all__)
    assert set(offramp.__all__) <= set(dir(offramp))
    with pytest.raises(AttributeError, match="it has"):
        _ = offramp.nothing


def test_law_3_the_face_is_what_the_reference_lists():
    """A new name on the face is a line of docs/reference/python.md, and not of a list here."""
    listed = list[str]()
    for page in ("python.md", "contracts.md"):
        text = (house.ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
        listed += re.findall(r"^::: offramp\.(?:contracts\.)?(\w+)$", text, flags=re.MULTILINE)
    pages_of_modules = ["errors", "testing"]
    assert sorted(listed) == sorted([*offramp.__all__, *pages_of_modules])


def test_law_3_the_type_checker_sees_the_same_face():
    tree = ast.parse((house.HOUSE / "__init__.py").read_text())
    typed = {
        alias.asname: f"{node.module}".removeprefix("offramp.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offramp.")
        for alias in node.names
    }
    assert typed == offramp._HOMES


@pytest.mark.parametrize(
    "module",
    [
        "runtime.running",
        "plans.replay",
        "networks.network",
        "runtime.recording",
        "engines.torch",
        "runtime.graphs",
        "plans.evaluation",
    ],
)
def test_law_4_choose_is_the_only_rule_that_runs(module):
    tree = ast.parse(MODULES[module].read_text())
    orders = (ast.Gt, ast.GtE, ast.Lt, ast.LtE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, orders) for op in node.ops):
            text = ast.unparse(node)
            assert "BAND" in text.upper() or not ("score" in text or "threshold" in text), (
                f"{module}: {text}"
            )
    if module in ("runtime.running", "plans.replay"):
        assert any(
            isinstance(node, ast.Call) and ast.unparse(node.func) == "choose"
            for node in ast.walk(tree)
        )


def test_law_5_no_drawers():
    assert not [file for folder in house.READ for file in (house.ROOT / folder).rglob("util*.py")]


def test_law_5_what_is_large_is_listed(capsys):
    assert house.main() == 0
    assert f"files over {house.LINES} lines" in capsys.readouterr().out


DENSE = """# alone
a, b = b, a
a, b = 1, 2  # fused
c = [x for x in [y for y in range(3)]]
d = {x: y for x in c for y in c}
e = 1 if a else 2

"""


def test_density_counts_what_it_says():
    found = density.density_of(DENSE + "f = " + "1" * density.WIDE + "\n")
    assert found == density.Density(
        lines=7, comments=2, comprehensions=3, nested=2, fused=1, conditional=1, wide=1
    )
    assert found.per_hundred("comments") == pytest.approx(200 / 7)
    assert (found + found).lines == 14


def test_density_is_printed(capsys):
    assert density.main([]) == 0
    assert "the densest files" in capsys.readouterr().out
    assert density.main([str(house.ROOT / "licenses")]) == 2


def test_no_path_of_this_machine():
    """Nothing in the sources names a folder of the machine that it was written on."""
    marks = ("/wo" + "rk/", "/ho" + "me/", "/Us" + "ers/")
    for folder in house.READ:
        for file in (house.ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".md", ".json", ".html", ".toml"}:
                text = file.read_text(encoding="utf-8")
                assert not [mark for mark in marks if mark in text], file
