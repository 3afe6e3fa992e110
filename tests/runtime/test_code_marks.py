"""Marks of the user's code: what counts, and what does not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import offramp as off
from offramp.networks.nodes import Gate
from offramp.runtime.code_marks import code_marks
from small import dense, ladder_of

GIVEN = "import torch\nfrom torch import nn\nfrom offramp.networks.nodes import Gate\n"


def made(source: str, name: str) -> Any:
    """What a module of the user's with this source calls `name`."""
    space: dict[str, Any] = {"__name__": "users"}
    exec(GIVEN + source, space)
    return space[name]


def gate_mark(gate: Any) -> str | None:
    return dict(code_marks(ladder_of(2, gate=gate))).get("gate 'small'")


def model_mark(model: nn.Module) -> str | None:
    net = off.ladder({"small": dense(0), "large": model.eval()})
    return dict(code_marks(net)).get("model 'large'")


FUNCTION = "def score(z):\n    return z.max(1).values\n"
SAME = {
    "comments and docstring": 'def score(z):\n    "The largest."\n    # a comment\n\n    return z.max(1).values\n',
    "a local name": "def score(logits):\n    return logits.max(1).values\n",
    "other functions in the module": "OTHER = 3\ndef more(z): return z\n" + FUNCTION,
}
OTHER = {
    "a constant": "def score(z):\n    return z.max(0).values\n",
    "an operation": "def score(z):\n    return -z.max(1).values\n",
    "a method": "def score(z):\n    return z.min(1).values\n",
    "a rare branch": "def score(z):\n    y = z.max(1).values\n    return torch.where(y > 30, y + 1, y)\n",
}


@pytest.mark.parametrize("case", SAME)
def test_what_does_not_count(case):
    assert gate_mark(made(SAME[case], "score")) == gate_mark(made(FUNCTION, "score")) is not None


@pytest.mark.parametrize("case", OTHER)
def test_what_counts(case):
    assert gate_mark(made(OTHER[case], "score")) != gate_mark(made(FUNCTION, "score"))


READING = {
    "a global number": "LEVEL = {}\ndef score(z):\n    return z.max(1).values * LEVEL\n",
    "a function that it calls": "def help(z): return z * {}\ndef score(z):\n    return help(z.max(1).values)\n",
    "a default": "def score(z, by={}):\n    return z.max(1).values * by\n",
    "a closure": "def outer(by):\n    def score(z): return z.max(1).values * by\n    return score\nscore = outer({})\n",
    "a lambda": "score = lambda z: z.max(1).values * {}\n",
}


@pytest.mark.parametrize("case", READING)
def test_what_a_function_reads_counts(case):
    two, three = (gate_mark(made(READING[case].format(by), "score")) for by in (2, 3))
    assert two != three
    assert two == gate_mark(made(READING[case].format(2), "score"))


def test_a_partial_and_a_class_of_gate_count():
    source = "def score(z, by): return z.max(1).values * by\n"
    marks = {gate_mark(functools.partial(made(source, "score"), by=by)) for by in (2.0, 3.0)}
    assert len(marks) == 2
    kind = (
        "class Mine(Gate):\n"
        "  def score(self, seen): return seen.own.max(1).values{}\n"
        "  def config(self): return {{'name': 'Mine'}}\n"
    )
    gates = [made(kind.format(end), "Mine")() for end in ("", " + 1", "")]
    assert all(isinstance(gate, Gate) for gate in gates)
    first, other, again = map(gate_mark, gates)
    assert first == again != other


MODEL = """
class Model(nn.Module):
    def __init__(self, dark=0.5):
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.dark = dark
        self.epochs = 0
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        return self.part(x)
    def part(self, x):
        y = self.last(x)
        return torch.where((x.mean(1) < self.dark)[:, None], y, {})
    def training_step(self, batch):
        return {}
"""


def test_a_model_counts_as_far_as_its_forward_pass_reads_it():
    torch.manual_seed(0)
    plain = MODEL.format("2 * y", "0")
    one = made(plain, "Model")()
    mark = model_mark(one)
    assert mark is not None
    assert model_mark(made(MODEL.format("3 * y", "0"), "Model")()) != mark
    assert model_mark(made(plain, "Model")(dark=0.1)) != mark
    assert model_mark(made(MODEL.format("2 * y", "batch"), "Model")()) == mark
    one.epochs = 12
    one(torch.zeros(2, 4))
    assert model_mark(one) == mark


def test_decorated_methods_count():
    torch.manual_seed(0)
    marks = []
    for by in ("2 * y", "3 * y", "2 * y"):
        source = MODEL.format(by, "0").replace("    def forward", "    @torch.no_grad()\n    def forward")
        marks.append(model_mark(made(source, "Model")()))
    first, other, again = marks
    assert first == again != other


def test_a_mark_is_the_same_in_another_process(tmp_path):
    """Whatever the order of sets and the addresses of things are there."""
    source = "KNOWN = ('a', 'b')\ndef score(z):\n    return z.max(1).values * (len(KNOWN) in {1, 2, 'x', 'y'})\n"
    (tmp_path / "users.py").write_text(source)
    code = (
        "import torch, users, offramp as off\n"
        "from offramp.runtime.code_marks import code_marks\n"
        "net = off.ladder([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)], gate=users.score)\n"
        "print(dict(code_marks(net))[\"gate 'rung1'\"])\n"
    )
    marks = set()
    for seed in ("1", "2"):
        places = os.pathsep.join([str(tmp_path), *sys.path])
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": places}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        marks.add(done.stdout.strip())
    assert len(marks) == 1


def test_a_forward_of_an_object_counts():
    model, turned = dense(1), dense(1)
    turned.forward = lambda x: x[:, :3]
    assert model_mark(model) is None
    assert model_mark(turned) is not None


def test_installed_code_has_no_marks():
    assert [what for what, _ in code_marks(ladder_of(3, gate="max_prob"))] == ["made with"]


def test_marks_of_another_python_are_not_compared():
    origin = off.record(ladder_of(2), torch.randn(30, 4), timed=False, progress=False).header.origin
    other = replace(origin, code=(("made with", "cpython 2.7, torch 0.4"), ("gate 'small'", "0" * 16)))
    other.refuse_other_code((("made with", "cpython 3.13, torch 9"), ("gate 'small'", "1" * 16)))
