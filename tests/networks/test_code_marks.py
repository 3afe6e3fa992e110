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
from torch.nn.modules.module import register_module_forward_hook

import offramp as off
from offramp.networks.code_marks import cache_of, code_marks
from offramp.networks.members import BACKBONE, ModelSpec
from offramp.networks.network import plain_network
from offramp.networks.nodes import Gate
from small import dense, ladder_of

GIVEN = "import torch\nfrom torch import nn\nfrom offramp.networks.nodes import Gate\n"


def made(source: str, name: str) -> Any:
    """What a module of the user's with this source calls `name`."""
    space: dict[str, Any] = {"__name__": "users"}
    exec(compile(GIVEN + source, "<typed>", "exec", dont_inherit=True), space)
    return space[name]


def gate_mark(gate: Any) -> str | None:
    return dict(code_marks(ladder_of(2, gate=gate))).get("gate 'small'")


def model_mark(model: nn.Module) -> str | None:
    net = plain_network(model.eval(), ModelSpec(BACKBONE))
    return dict(code_marks(net)).get("model 'backbone'")


FUNCTION = "def score(z):\n    return z.max(1).values\n"
SAME = {
    "comments and docstring": 'def score(z):\n    "The largest."\n    # a comment\n\n    return '
    "z.max(1).values\n",
    "a local name": "def score(logits):\n    return logits.max(1).values\n",
    "other functions in the module": "OTHER = 3\ndef more(z): return z\n" + FUNCTION,
}
OTHER = {
    "a constant": "def score(z):\n    return z.max(0).values\n",
    "an operation": "def score(z):\n    return -z.max(1).values\n",
    "a method": "def score(z):\n    return z.min(1).values\n",
    "a rare branch": "def score(z):\n    y = z.max(1).values\n    return torch.where(y > 30, y + "
    "1, y)\n",
}


@pytest.mark.parametrize("case", SAME)
def test_what_does_not_count(case):
    assert gate_mark(made(SAME[case], "score")) == gate_mark(made(FUNCTION, "score")) is not None


@pytest.mark.parametrize("case", OTHER)
def test_what_counts(case):
    assert gate_mark(made(OTHER[case], "score")) != gate_mark(made(FUNCTION, "score"))


READING = {
    "a global number": "LEVEL = {}\ndef score(z):\n    return z.max(1).values * LEVEL\n",
    "a function that it "
    "calls": "def help(z): return z * {}\ndef score(z):\n    return help(z.max(1).values)\n",
    "a default": "def score(z, by={}):\n    return z.max(1).values * by\n",
    "a closure": "def outer(by):\n    def score(z): return z.max(1).values * by\n    return "
    "score\nscore = outer({})\n",
    "a lambda": "score = lambda z: z.max(1).values * {}\n",
    "a number in a global "
    "dict": "LEVELS = {{'by': {}}}\ndef score(z): return z.max(1).values * LEVELS['by']\n",
    "a function in a global dict": (
        "REG = {{'f': lambda z: z * {}}}\ndef score(z): return REG['f'](z.max(1).values)\n"
    ),
    "a list of functions": "ALL = [lambda z: z * {}]\ndef score(z): return "
    "ALL[0](z.max(1).values)\n",
    "a global tensor": "BY = torch.tensor([{}.0])\ndef score(z): return z.max(1).values * BY\n",
    "a namespace": (
        "from types import SimpleNamespace\nCFG = SimpleNamespace(by={})\n"
        "def score(z): return z.max(1).values * CFG.by\n"
    ),
    "an object of a class with slots": (
        "class Cfg:\n  __slots__ = ('by',)\n  def __init__(self, by): self.by = by\nCFG = Cfg({})\n"
        "def score(z): return z.max(1).values * CFG.by\n"
    ),
    "a member of an enum": (
        "import enum\nclass Kind(enum.Enum):\n  LOW = 2\n  HIGH = 3\nKIND = Kind({})\n"
        "def score(z): return z.max(1).values * KIND.value\n"
    ),
    "a method of a helper object": (
        "class Help:\n  def go(self, z): return z * {}\nHELP = Help()\ndef score(z): return "
        "HELP.go(z.max(1).values)\n"
    ),
    "a bound method of a dict": (
        "GET = {{'by': {}}}.get\ndef score(z): return z.max(1).values * GET('by')\n"
    ),
    "the user's decorator": (
        "import functools\n"
        "def times(f):\n  @functools.wraps(f)\n  def g(z): return f(z) * {}\n  return g\n"
        "@times\ndef score(z): return z.max(1).values\n"
    ),
    "the user's decorator within torch's": (
        "import functools\n"
        "def times(f):\n  @functools.wraps(f)\n  def g(z): return f(z) * {}\n  return g\n"
        "@torch.no_grad()\n@times\ndef score(z): return z.max(1).values\n"
    ),
    "the user's decorator that is a class": (
        "import functools\n"
        "class Times:\n  def __init__(self, f):\n    functools.update_wrapper(self, f)\n    "
        "self.f = f\n"
        "  def __call__(self, z): return self.f(z) * {}\n"
        "@Times\ndef score(z): return z.max(1).values\n"
    ),
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


KEPT = """
import functools
from dataclasses import dataclass
def apply(model, y): return y * model.outside
def turned(f):
    @functools.wraps(f)
    def g(self, x): return f(self, x) * self.wrapped
    return g
class Help:
    def __init__(self): self._by, self.uses = 1, 0
    def set_by(self, by): self._by = by
    def __call__(self, y):
        self.uses += 1
        return y * self._by
@dataclass
class Config:
    by: float = 1.0
    folder: str = "a"
class Model(nn.Module):
    _SHARED = 1
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)
        self._private, self.__mangled, self.public, self.outside, self.wrapped = 1, 1, 1, 1, 1
        self.tensor, self.config, self.help = torch.ones(1), Config(), Help()
        self.table = {"by": 1}
        self.steps = [lambda y: y]
        self.hidden = [nn.Linear(3, 3)]
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.cache, self.log, self.calls = {}, [], 0
        self.unread = 1
    def set_public(self, value): self.public = value
    def set_private(self, value): self._private = value
    @turned
    def forward(self, x):
        self.calls += 1
        cache = self.cache
        cache[x.shape] = len(x)
        self.log.append(len(x))
        y = self.last(x) * self._SHARED * self._private * self.__mangled * self.public * self.tensor
        y = self.hidden[0](self.steps[0](y)) * self.scale * self.config.by * self.table["by"]
        return self.help(apply(self, y))
"""
SETS = {
    "a private attribute": lambda model: setattr(model, "_private", 2),
    "a private attribute of its class": lambda model: setattr(type(model), "_SHARED", 2),
    "a mangled attribute": lambda model: setattr(model, "_Model__mangled", 2),
    "an attribute with a setter": lambda model: model.set_public(2),
    "a private attribute with a setter": lambda model: model.set_private(2),
    "what a function outside reads": lambda model: setattr(model, "outside", 2),
    "what the user's decorator reads": lambda model: setattr(model, "wrapped", 2),
    "a tensor": lambda model: model.tensor.mul_(2),
    "a field of a dataclass": lambda model: setattr(model.config, "by", 2.0),
    "a value in a dict": lambda model: model.table.update(by=2),
    "a function in a list": lambda model: model.steps.__setitem__(0, lambda y: -y),
    "a private attribute of a helper": lambda model: model.help.set_by(2),
    "weights of a module in a list": lambda model: model.hidden[0].weight.data.mul_(2),
    "a buffer that is not saved": lambda model: model.scale.mul_(2),
    "another class": lambda model: setattr(
        model, "__class__", type("Model", (type(model),), {"_SHARED": 3})
    ),
    "a setting of a layer within": lambda model: setattr(model.hidden[0], "in_features", 5),
}


@pytest.mark.parametrize("case", SETS)
def test_an_attribute_that_a_forward_pass_reads_counts(case):
    torch.manual_seed(0)
    model = made(KEPT, "Model")().eval()
    mark = model_mark(model)
    model(torch.zeros(2, 4))
    assert model_mark(model) == mark
    SETS[case](model)
    assert model_mark(model) != mark


def test_what_a_forward_pass_sets_or_does_not_read_does_not_count():
    torch.manual_seed(0)
    model = made(KEPT, "Model")().eval()
    mark = model_mark(model)
    for size in (1, 2, 3):
        model(torch.zeros(size, 4))
    model.unread = 2
    model.config.folder = "b"
    model.requires_grad_(False)
    model.last.weight.grad = torch.ones(3, 4)
    assert model_mark(model) == mark


def test_a_global_that_a_forward_pass_changes_does_not_count():
    source = (
        "SEEN, COUNT, LAST = [], {'n': 0}, None\n"
        "def score(z):\n"
        "    global LAST\n"
        "    SEEN.append(len(z))\n    COUNT['n'] += 1\n    LAST = z\n"
        "    return z.max(1).values\n"
    )
    score = made(source, "score")
    mark = gate_mark(score)
    score(torch.zeros(2, 3))
    assert gate_mark(score) == mark


def test_what_a_closure_changes_does_not_count():
    source = (
        "def outer(by):\n"
        "    calls, seen = 0, []\n"
        "    def score(z):\n"
        "        nonlocal calls\n"
        "        calls += 1\n        seen.append(len(z))\n"
        "        return z.max(1).values * by\n"
        "    return score\n"
        "score = outer(2)\nother = outer(3)\n"
    )
    score = made(source, "score")
    mark = gate_mark(score)
    score(torch.zeros(2, 3))
    assert gate_mark(score) == mark != gate_mark(made(source, "other"))


def test_what_setattr_sets_does_not_count():
    source = (
        "class Model(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.last, self.count = "
        "nn.Linear(4, 3), 0\n"
        "    def forward(self, x):\n"
        "        setattr(self, 'count', self.count + 1)\n        return self.last(x)\n"
    )
    model = made(source, "Model")().eval()
    mark = model_mark(model)
    model(torch.zeros(2, 4))
    assert model_mark(model) == mark


def test_circles_and_deep_objects_end():
    source = (
        "class Link:\n  def __init__(self, after): self.after = after\n"
        "CHAIN = None\n"
        "for _ in range(5000): CHAIN = Link(CHAIN)\n"
        "RING = []\nRING.append(RING)\n"
        "def score(z): return z.max(1).values * (CHAIN.after is not None) * len(RING)\n"
    )
    assert gate_mark(made(source, "score")) == gate_mark(made(source, "score"))


def test_settings_of_torchs_layers_are_compared():
    def net(slope, eps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(slope), nn.BatchNorm1d(3, eps=eps))
        return off.ladder({"small": dense(0), "large": model.eval()})

    marks = [
        dict(code_marks(net(*each)))["the settings of model 'large'"]
        for each in ((0.1, 1.0), (0.1, 2.0))
    ]
    assert marks[0] == dict(code_marks(net(0.1, 1.0)))["the settings of model 'large'"] != marks[1]
    trace = off.record(net(0.1, 1e-5), torch.randn(300, 4), timed=False, progress=False)
    plan = off.calibrate(trace, at_most=0.9)
    with pytest.raises(off.errors.Mismatch, match="settings of model 'large'"):
        off.open(net(0.1, 1.001e-5), plan)


HOOK = "def hook(module, inputs, output):\n    return output * {}\n"


def hooked(change):
    """A model of torch's layers alone, which has no code of the user, after a change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval()
    change(model)
    return model


ADDED = {
    "a forward hook": lambda m: m[0].register_forward_hook(made(HOOK.format(2), "hook")),
    "a pre-hook": lambda m: m[1].register_forward_pre_hook(
        made("def hook(module, inputs):\n    return (-inputs[0],)\n", "hook")
    ),
    "a forward of a layer": lambda m: setattr(
        m[1], "forward", made("def forward(x):\n    return x / 2\n", "forward")
    ),
    "a hook of a package": lambda m: nn.utils.weight_norm(m[0]),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", ADDED)
def test_code_on_torchs_layers_counts_also_where_there_was_none(change):
    plain = model_mark(hooked(lambda _: None))
    added = model_mark(hooked(ADDED[change]))
    assert plain is None is not added
    origin = off.record(ladder_of(2), torch.randn(30, 4), timed=False, progress=False).header.origin
    before = (*origin.code, ("model 'x'", added))
    replace(origin, code=before).refuse_other_code(before)
    for one, other in ((before, origin.code), (origin.code, before)):
        with pytest.raises(off.errors.Mismatch, match="the code of model 'x'"):
            replace(origin, code=one).refuse_other_code(other)


def test_what_a_hook_computes_and_reads_counts():
    reading = "class By:\n  def __init__(self): self.by = {}\nBY = By()\n" + HOOK.format("BY.by")
    for source in (HOOK, reading):
        marks = []
        for by in (2, 3, 2):
            hook = made(source.format(by), "hook")
            marks.append(model_mark(hooked(lambda m, hook=hook: m[0].register_forward_hook(hook))))
        assert marks[0] == marks[2] != marks[1]


def test_hooks_of_all_modules_have_a_mark():
    net = ladder_of(2)
    assert "the hooks of all modules" not in dict(code_marks(net))
    marks = []
    for by in (2, 3, 2):
        handle = register_module_forward_hook(made(HOOK.format(by), "hook"))
        marks.append(dict(code_marks(net))["the hooks of all modules"])
        handle.remove()
    assert marks[0] == marks[2] != marks[1]
    assert "the hooks of all modules" not in dict(code_marks(net))


def test_a_hook_that_reads_a_module_is_refused():
    hook = made(
        "inner = nn.Linear(3, 3)\ndef hook(module, inputs, output):\n    return inner(output)\n",
        "hook",
    )
    with pytest.raises(off.errors.BadNetwork, match="the module 'inner'"):
        off.ladder({"small": dense(0), "large": hooked(lambda m: m[0].register_forward_hook(hook))})


def test_a_cache_is_emptied_when_code_changes():
    net = ladder_of(2)
    kept = cache_of(net)
    assert kept.once("a", lambda: 1) == 1
    assert cache_of(net).once("a", lambda: 2) == 1
    handle = net.backbone["small"].register_forward_hook(made(HOOK.format(2), "hook"))
    assert cache_of(net).once("a", lambda: 2) == 2
    handle.remove()
    assert cache_of(net).once("a", lambda: 3) == 3


def test_a_plan_with_marks_of_the_older_kind_says_that_they_are_not_compared():
    origin = off.record(ladder_of(2), torch.randn(30, 4), timed=False, progress=False).header.origin
    here = dict(origin.code)["made with"]
    older = replace(
        origin, code=(("made with", here.removesuffix(", marks 2")), ("gate 'small'", "0" * 16))
    )
    with pytest.warns(
        off.errors.Notice, match="older kind, which covers less.*Record and calibrate again"
    ):
        older.refuse_other_code(origin.code)


def test_decorated_methods_count():
    torch.manual_seed(0)
    marks = []
    for by in ("2 * y", "3 * y", "2 * y"):
        source = MODEL.format(by, "0").replace(
            "    def forward", "    @torch.no_grad()\n    def forward"
        )
        marks.append(model_mark(made(source, "Model")()))
    first, other, again = marks
    assert first == again != other


def test_a_mark_is_the_same_in_another_process(tmp_path):
    """Whatever the order of sets and the addresses of things are there."""
    source = (
        "KNOWN = ('a', 'b')\ndef score(z):\n    return z.max(1).values * (len(KNOWN) in "
        "{1, 2, 'x', 'y'})\n"
    )
    (tmp_path / "users.py").write_text(source)
    code = (
        "import torch, users, offramp as off\n"
        "from offramp.networks.code_marks import code_marks\n"
        "net = off.ladder([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)], gate=users.score)\n"
        "print(dict(code_marks(net))[\"gate 'member1'\"])\n"
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
    model = dense(1)
    turned = dense(1)
    turned.forward = lambda x: x[:, :3]
    assert model_mark(model) is None
    assert model_mark(turned) is not None


def test_installed_code_has_no_marks():
    marks = [what for what, _ in code_marks(ladder_of(3, gate="max_prob"))]
    assert [what for what in marks if not what.startswith("the settings of model ")] == [
        "made with"
    ]


def test_marks_of_another_python_are_not_compared():
    origin = off.record(ladder_of(2), torch.randn(30, 4), timed=False, progress=False).header.origin
    other = replace(
        origin, code=(("made with", "cpython 2.7, torch 0.4"), ("gate 'small'", "0" * 16))
    )
    other.refuse_other_code((("made with", "cpython 3.13, torch 9"), ("gate 'small'", "1" * 16)))


def test_code_that_changes_what_it_reads_while_it_is_recorded_is_named_and_not_compared():
    source = (
        "import sys\nSEEN = {}\ndef note(key, value): object.__getattribute__(SEEN, "
        "'update')({key: value})\n"
        "def score(z):\n    note(len(SEEN), 1)\n    return z.max(1).values\n"
    )
    net = ladder_of(2, gate=made(source, "score"))
    with pytest.warns(off.errors.Notice, match="gate 'small' changed attributes or globals"):
        trace = off.record(net, torch.randn(300, 4), timed=False, progress=False)
    off.open(net, off.calibrate(trace, at_most=0.9))


HIDING = """
GLOBAL = nn.Linear(4, 3)
class Help:
    def __init__(self): self.inner = nn.Linear(4, 3)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.parts, self.named, self.help = [nn.Linear(4, 3)], {"a": nn.Linear(4, 3)}, Help()
        self.weights = [nn.Parameter(torch.ones(3))]
        self.leaf = torch.ones(3, requires_grad=True)
        inner = nn.Linear(4, 3)
        self.closed = lambda x: inner(x)
    def forward(self, x):
        x = self.first(x)
        return self.last(x) + READ
"""
HIDDEN = {
    "self.parts[0](x)": "the module 'parts'",
    "self.named['a'](x)": "the module 'named'",
    "self.help.inner(x)": "the module 'inner'",
    "self.closed(x)": "the module 'inner'",
    "GLOBAL(x)": "the module 'GLOBAL'",
    "self.weights[0]": "the trainable tensor 'weights'",
    "self.leaf": "the trainable tensor 'leaf'",
}


@pytest.mark.parametrize("read", HIDDEN)
def test_modules_and_parameters_that_nothing_registers_are_refused(read):
    model = made(HIDING.replace("READ", read), "Model")().eval()
    with pytest.raises(
        off.errors.BadNetwork,
        match=f"model 'large' reads {HIDDEN[read]}, which no module registers",
    ):
        off.ladder({"small": dense(0), "large": model})
    with pytest.raises(off.errors.BadNetwork, match=f"model 'backbone' reads {HIDDEN[read]}"):
        off.cut(model, torch.randn(4, 4), at=["first"])


def test_a_module_behind_a_function_is_refused():
    inner = nn.Linear(4, 3).eval()
    with pytest.raises(off.errors.BadNetwork, match="model 'small' reads the module 'inner'"):
        off.ladder(
            {"small": lambda x: inner(torch.as_tensor(x)).detach().numpy(), "large": dense(1)}
        )
    net = ladder_of(2)
    net.gates["small"].function = lambda z: inner(z)[:, 0]  # after it was made: record looks again
    with pytest.raises(off.errors.BadNetwork, match="gate 'small' reads the module 'inner'"):
        off.record(net, torch.randn(30, 4), timed=False, progress=False)


class Makes(dict):
    """A table of classes that gives a new object each time, as transformers has for activations."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


ACTIVATIONS = Makes(relu=nn.ReLU, prelu=nn.PReLU)


def test_a_table_that_makes_modules_holds_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.act = ACTIVATIONS["prelu"]
            self.last = nn.Linear(4, 3)
            self.name = "relu"

        def forward(self, x):
            return self.last(ACTIVATIONS[self.name](self.act(self.first(x))))

    off.cut(Model().eval(), torch.randn(4, 4), at=["first"])


SQUASH = nn.Sequential(nn.ReLU(), nn.Tanh())


def test_a_module_without_weights_may_be_global():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(4, 3)

        def forward(self, x):
            return self.last(SQUASH(self.first(x)))

    off.cut(Model().eval(), torch.randn(4, 4), at=["first"])


def test_registered_modules_may_be_read_from_anywhere():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(4, 3)
            self.order = [self.first, self.last]
            self.tied = [self.last.bias]
            self.teacher = [nn.Linear(4, 3)]  # no forward pass reads it

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x + self.tied[0]

    model = Model().eval()
    gate_layer = model.last
    off.ladder({"small": dense(0), "large": model}, gate=lambda z: z[:, 0] + gate_layer.bias[0])
