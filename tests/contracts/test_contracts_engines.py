"""Every engine on the shelf keeps the contract, and the kit notices those that do not."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch

import house
from offramp._support import find
from offramp.engines.torch import Eager
from offramp.networks.network import last_model
from offramp.runtime.engine import Engine, kind_of
from offramp.testing import check_bare, check_engine
from small import conv, ladder_of, rows_of

ENGINES = sorted(
    file.stem for file in (find.HOUSE / "engines").glob("*.py") if not file.stem.startswith("_")
)


@pytest.mark.parametrize("name", ENGINES)
def test_the_shelf(name):
    engine = kind_of(name)()
    # exits that read earlier exits, and convolutions
    check_engine(engine, ladder_of(2, answer="mean"), rows_of(9))
    check_engine(
        engine,
        ladder_of(2, make=conv),
        torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["own", "mean"])
@pytest.mark.parametrize("name", ENGINES)
def test_the_shelf_on_three_members(name, answer):
    check_engine(kind_of(name)(), ladder_of(3, answer=answer), rows_of(9))


@pytest.mark.parametrize("name", ENGINES)
def test_the_bare_call_of_the_shelf(name):
    check_bare(kind_of(name)(), last_model(ladder_of(2)), {"x": rows_of(5)})


def changed(change):
    """The eager engine, with its parts changed."""

    class Changed(Eager):
        def open(self, network, steps, device):
            return change(super().open(network, steps, device))

    return Changed()


def wrong_logits(engine_stages):
    functions = {
        **engine_stages[1].functions,
        "exit": lambda state: {"middle/logits": state["middle"] + 0.01},
    }
    return [engine_stages[0], replace(engine_stages[1], functions=functions), *engine_stages[2:]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda engine_stages: engine_stages[:2], "one part per stage"),
        (lambda engine_stages: engine_stages[::-1], "one part per stage"),
        (
            lambda engine_stages: [
                *engine_stages[:2],
                replace(engine_stages[2], stage=replace(engine_stages[2].stage, reads=("y",))),
            ],
            "reads",
        ),
        (wrong_logits, "logits of 'middle'"),
    ],
)
def test_the_kit_notices(change, says):
    with pytest.raises(AssertionError, match=says):
        check_engine(changed(change), ladder_of(3), rows_of(9))


class Least(Engine):
    """What somebody must write, and nothing else."""

    def open(self, network, steps, device):
        return Eager().open(network, steps, device)


def test_one_method_is_an_engine():
    engine = Least()
    check_engine(engine, ladder_of(3), rows_of(9))
    check_bare(engine, last_model(ladder_of(2)), {"x": rows_of(5)})
    assert engine.identity == "test_contracts_engines"
    assert (engine.compiles, engine.own_threads, engine.trained_on) == (False, False, None)
    assert engine.measures_threads is False
    assert Least(width=3, fast=True).identity == "test_contracts_engines:fast,width=3"


def test_without_open_it_is_none():
    with pytest.raises(TypeError, match="abstract"):
        Engine()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("compiles", "no", "compiles is 'no'"),
        ("own_threads", None, "own_threads is None"),
        ("measures_threads", 1, "measures_threads is 1"),
        ("trained_on", [1], "trained_on is"),
        ("version", lambda self: "", "version"),
        ("marks", lambda self: "fast", "marks"),
        ("identity", property(lambda self: object()), "identity differs"),
    ],
)
def test_the_kit_notices_what_an_engine_says_wrongly(name, value, says):
    with pytest.raises(AssertionError, match=says):
        check_engine(type("Odd", (Least,), {name: value})(), ladder_of(2), rows_of(3))


@pytest.mark.parametrize(
    "module", ["runtime.engine", "runtime.session", "runtime.recording", "runtime.benching"]
)
def test_nobody_probes_an_engine(module):
    for node in ast.walk(house.parsed(house.modules()[module])):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"hasattr", "getattr"}, (
                f"{module} probes: {ast.unparse(node)}"
            )
