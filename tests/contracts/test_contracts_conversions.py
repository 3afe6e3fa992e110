"""Every method of the shelf `layers` on one footing: a converted model is cut, trained, saved,
exported and run on ONNX Runtime like any other, and what cannot be converted is one sentence.
"""

from __future__ import annotations

import runpy

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.converting import conversions_of, methods, spec_with
from offramp.errors import BadNetwork, InvalidArgument, OfframpError, UnknownName
from offramp.layers.residual import Block
from small import seeded

SPEC = "offramp:resnet20"
X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 10
TINY = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))

# Of each method what it replaces in a small model, and in a ResNet-20 with random weights.
SMALL = {
    "adaptive_depth": {"layer1": "adaptive_depth"},
    "binary": {"layer1.*": "binary"},
    "g_ghost": {"layer1": "g_ghost"},
    "ghost": {"layer1.*": "ghost"},
    "low_rank": {"layer1.*": "low_rank?rank=4"},
    "packed": {"layer1.*": "packed?of=binary"},
    "packed-ternary": {"layer1.*": "packed?of=ternary"},
    "pad": {"layer1.*": "pad?ratio=0.3", "linear": "pad?ratio=0.5"},
    "pruned": {"layer1.*.conv1": "pruned?importance=taylor"},
    "pruned-bn_scale": {"layer1.*.conv1": "pruned?importance=bn_scale"},
    "pruned-magnitude": {"layer1.*.conv1": "pruned?importance=magnitude&round_to=4"},
    "pruned-thinet": {"layer1.*.conv1": "pruned?importance=thinet"},
    "skip": {"layer1.1": "skip"},
    "ternary": {"layer1.*": "ternary"},
    "tucker": {"layer1.*": "tucker?rank_in=4&rank_out=4"},
}
REAL = {
    **SMALL,
    "adaptive_depth": {"layer3": "adaptive_depth"},
    "adaptive_depth-sample": {"layer2": "adaptive_depth?per=sample&eps=0.05", "layer3": "keep"},
    "g_ghost": {"layer2": "g_ghost", "layer3": "g_ghost"},
    "low_rank": {"layer*": "low_rank?rank=8"},
    "pruned": {"layer*.conv1": "pruned?importance=taylor&round_to=8"},
    "skip": {"layer*.2": "skip"},
    "tucker": {"layer*": "tucker?rank_in=8&rank_out=8"},
}
# `keep` changes nothing, and `switchable_norm` belongs to networks with several resolutions, which
# have tests of their own.
ELSEWHERE = {"keep", "switchable_norm"}


class Small(nn.Module):
    """Images [B, 3, 8, 8] -> logits [B, 10], with the names of a ResNet-20."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(self.layer1(self.conv1(x)).mean((2, 3)))


def converted(method, real):
    """A converted model, and rows for it."""
    if method.startswith("pruned"):
        pytest.importorskip("torch_pruning")
    x = X if real else TINY
    model = seeded(lambda: off.make_model(SPEC) if real else Small(), 0).eval()
    layers = (REAL if real else SMALL)[method]
    made = seeded(lambda: off.convert(model, layers, example=x, data=(x, Y)), 0)
    return made, x


def cut_of(made, x, spec=None):
    at = "conv1"
    return seeded(lambda: off.cut(made, x, at=[at], spec=spec), 0).eval()


TO_THE_END = off.Plan.by_hand({"conv1": float("inf")})
EVERY = [
    *((method, False) for method in SMALL),
    *(pytest.param(method, True, marks=pytest.mark.slow) for method in REAL),
]
# One goes through ONNX at once; all others in the slow suite.
QUICK = ("ghost",)
ONNX = [
    *((method, False) for method in QUICK),
    *(pytest.param(one, False, marks=pytest.mark.slow) for one in SMALL if one not in QUICK),
    *(pytest.param(method, True, marks=pytest.mark.slow) for method in REAL),
]


def test_no_method_is_forgotten():
    for listed in (SMALL, REAL):
        assert {name.partition("-")[0] for name in listed} == set(methods()) - ELSEWHERE


@pytest.mark.parametrize(("method", "real"), EVERY)
def test_it_is_cut_trained_saved_and_loaded(method, real, tmp_path):
    made, x = converted(method, real)
    net = cut_of(made, x)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    off.fit(net, (x, Y), recipe="joint", epochs=1, batch_size=3, progress=False)
    after = made.state_dict()
    # packed weights are bytes and stay as they are; everything else was trained
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("layer" in key for key in changed)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", converted(method, real)[0])
    with torch.no_grad():
        for one, other in zip(net(x), again(x), strict=True):
            assert torch.equal(one, other)
    if real:
        # and by its name alone, without the model
        text = spec_with(SPEC, conversions_of(made, off.make_model(SPEC)))
        named = cut_of(made, x, text)
        off.save(named, tmp_path / "named")
        again = off.load(tmp_path / "named")
        with torch.no_grad():
            assert torch.equal(again(x)[-1], made(x))


@pytest.mark.parametrize(("method", "real"), ONNX)
def test_it_runs_on_onnxruntime_as_a_plan_a_folder_and_one_file(method, real, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made, x = converted(method, real)
    net = cut_of(made, x)
    with torch.no_grad():
        want = made(x).numpy()
    close = {"atol": 1e-4 * max(1.0, float(np.abs(want).max())), "rtol": 0}
    runner = off.open(net, TO_THE_END, engine="onnxruntime")
    np.testing.assert_allclose(runner(x).logits.numpy(), want, **close)

    off.export(net, TO_THE_END, tmp_path / "folder", example=x)
    run = runpy.run_path(str(tmp_path / "folder" / "run.py"))["run"]
    np.testing.assert_allclose(run(x.numpy())["logits"], want, **close)

    off.export(net, TO_THE_END, tmp_path / "one", example=x, one_file=True)
    (file,) = (tmp_path / "one").rglob("*.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (logits,) = session.run(["logits"], {given.name: x.numpy()})
    np.testing.assert_allclose(logits, want, **close)


def one_sentence(problem):
    """Whether an error is one line of ours, without the words of another library's traceback."""
    text = str(problem)
    return isinstance(problem, OfframpError) and "\n" not in text and len(text) < 500


def each(method):
    """The name of a method with the options that it cannot do without."""
    return {"packed": "packed?of=ternary", "pruned": "pruned?importance=magnitude"}.get(
        method, method
    )


METHODS = sorted(set(methods()) - ELSEWHERE)


def refused(method, model, pattern, x):
    if method.startswith("pruned"):
        pytest.importorskip("torch_pruning")
    with pytest.raises(OfframpError) as raised:
        off.convert(model, {pattern: method}, example=x, data=(x, torch.arange(len(x)) % 3))
    assert one_sentence(raised.value), str(raised.value)
    return raised.value


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_that_matches_nothing_offers_the_nearest_names(method):
    problem = refused(each(method), seeded(Small, 0).eval(), "layr1.*", TINY)
    assert isinstance(problem, UnknownName)
    assert "matches no module of this model; the nearest names are layer1" in str(problem)


# `skip` takes any module; what does not fit fails on the example.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "skip"])
def test_a_layer_of_another_kind_is_refused(method):
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 3)).eval()
    problem = refused(each(method), model, "0", TINY)
    assert isinstance(problem, BadNetwork)
    assert "ReLU" in str(problem) or "none was matched" in str(problem)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_is_refused(method):
    name = f"{each(method)}{'&' if '?' in each(method) else '?'}color=3"
    problem = refused(name, seeded(Small, 0).eval(), "layer1", TINY)
    assert isinstance(problem, (UnknownName, BadNetwork))
    if isinstance(problem, UnknownName):
        assert "called 'color'" in str(problem)


class Tied(nn.Module):
    """Two stages with the same weights."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        for one, other in zip(self.layer1, self.layer2, strict=True):
            other.conv1.weight = one.conv1.weight
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_shares_weights_is_refused_or_they_stay_shared(method):
    pattern = "layer1" if method in ("g_ghost", "adaptive_depth", "skip") else "layer1.*.conv1"
    problem = refused(each(method), seeded(Tied, 0).eval(), pattern, TINY)
    assert "are the same weights" in str(problem)


@pytest.mark.parametrize("method", ["ghost", "low_rank", "tucker", "pad"])
def test_a_grouped_convolution_is_refused_where_a_method_has_no_answer(method):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(216, 3)).eval()
    problem = refused(method, model, "0", TINY)
    assert f"'0': {method} cannot replace a grouped convolution, got groups=3" == str(problem)


@pytest.mark.parametrize("method", ["binary", "ternary", "packed?of=binary", "pruned", "skip"])
def test_a_grouped_convolution_is_replaced_where_a_method_has_one(method):
    if method == "pruned":
        pytest.importorskip("torch_pruning")
    layers = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Flatten()]
    model = seeded(lambda: nn.Sequential(*layers, nn.Linear(384, 3)), 0).eval()
    data = (TINY, torch.arange(len(TINY)) % 3)
    pattern = "1"
    if method == "pruned":  # a depth-wise convolution loses channels with the layer before it
        pattern = "[01]"
    made = off.convert(model, {pattern: method}, example=TINY, data=data)
    assert made(TINY).shape == (6, 3)
    if method == "pruned":
        assert made[1].groups == made[1].out_channels == 3
    else:
        assert type(made[1]) is not nn.Conv2d


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("ghost?ratio=100", "ratio must be at most 8, the number of channels, got 100"),
        ("low_rank?rank=0", "rank must be a whole number of at least 1, got 0"),
        ("low_rank?energy=0", "energy must be above 0 and at most 1, got 0"),
        ("tucker?rank_in=0&rank_out=2", "rank_in must be a whole number of at least 1, got 0"),
        ("tucker?rank_in=2&rank_out=0", "rank_out must be a whole number of at least 1, got 0"),
        ("pad?kernels=0", "kernels must be a whole number of at least 1, got 0"),
        ("pruned?ratio=1", "ratio must be above 0 and below 1, got 1"),
        ("pruned?round_to=64", "leaves none of the 8 channels of 'layer1.0.conv1'"),
        ("g_ghost?ratio=1", "ratio must be above 0 and below 1, got 1"),
        ("g_ghost?ratio=0.999", "which keeps 0 in multiples of 1"),
    ],
)
def test_a_ratio_that_leaves_no_channel_is_refused(method, says):
    pattern = "layer1" if method.startswith("g_ghost") else "layer1.*.conv1"
    problem = refused(method, seeded(Small, 0).eval(), pattern, TINY)
    assert isinstance(problem, InvalidArgument)
    assert says in str(problem)


@pytest.mark.parametrize("method", ["ghost?ratio=3", "low_rank?rank=2", "tucker?energy=0.4"])
def test_widths_that_nothing_divides_are_no_problem(method):
    """Seven channels to eleven, on an image of five by nine with a stride of two."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(7, 11, 3, stride=2)), 0).eval()
    x = torch.randn(2, 7, 5, 9)
    made = off.convert(model, {"0": method}, example=x)
    assert made(x).shape == model(x).shape == (2, 11, 2, 4)


def test_shapes_that_do_not_fit_are_refused_on_the_example():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    problem = refused("skip", model.eval(), "1", TINY)
    assert "the converted model fails on the example: " in str(problem)
    problem = refused("ghost", model.eval(), "1", TINY[:, :2])
    assert "the converted model fails on the example: " in str(problem)


def test_costs_before_and_after_need_the_original():
    made, x = converted("ghost", False)
    columns = off.inspect(made, x, original=seeded(Small, 0).eval()).changes
    assert [one.name for one in columns][-1] == ""
    for change in columns:
        for cost in (change.before, change.after):
            assert cost.parameters > 0
            assert cost.stored_bytes >= 4 * cost.parameters
            assert cost.bit_operations == 32 * 32 * cost.macs > 0
            assert cost.ms is not None
            assert cost.ms > 0
    other = nn.Sequential(nn.Conv2d(1, 2, 3)).eval()
    with pytest.raises(InvalidArgument, match="original must be the model before it was converted"):
        off.inspect(made, x, original=other)
