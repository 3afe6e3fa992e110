"""Members of a ladder that are no torch modules: estimators, functions and ONNX files."""

from __future__ import annotations

import copy
import functools
import threading

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadData, BadFile, BadNetwork, InvalidArgument, Mismatch
from offramp.members._identity import digest_of
from offramp.members.estimator import Estimator
from offramp.members.function import Function
from offramp.members.onnx_file import OnnxFile

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(240, 6)).astype(np.float32)
Y = (X[:, 0] + 0.5 * X[:, 1] > 0).astype(int) + (X[:, 2] > 1)


@functools.cache
def forest(seed=0):
    ensemble = pytest.importorskip("sklearn.ensemble")
    return ensemble.RandomForestClassifier(8, random_state=seed).fit(X, Y)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 3).eval()


def twice(x):
    return np.stack([x[:, 0], x[:, 1], 2 * x[:, 2]], 1)


# estimators


def test_probabilities_become_their_logarithm_and_zero_stays_finite():
    member = Estimator(forest())
    logits = member(torch.from_numpy(X))
    wanted = forest().predict_proba(X)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert (wanted == 0).any()
    np.testing.assert_allclose(logits.exp().numpy(), np.maximum(wanted, 1e-7), rtol=1e-5)


def test_images_are_given_as_vectors():
    assert torch.equal(
        Estimator(forest())(torch.from_numpy(X.reshape(-1, 2, 3))),
        Estimator(forest())(torch.tensor(X)),
    )


def test_a_decision_of_two_classes_becomes_two_logits():
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.RidgeClassifier().fit(X, (Y > 0).astype(int))
    logits = Estimator(model)(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(
        logits[:, 1] - logits[:, 0], model.decision_function(X), rtol=1e-5, atol=1e-6
    )


def test_classes_in_another_order_or_never_seen():
    ensemble = pytest.importorskip("sklearn.ensemble")
    names = np.array(["cat", "dog", "eel"])[Y]
    some = names != "eel"
    model = ensemble.RandomForestClassifier(4, random_state=0).fit(X[some], names[some])
    with pytest.raises(InvalidArgument, match="classes 0 to C-1"):
        Estimator(model)
    found = Estimator(model, classes=["dog", "eel", "cat"])(torch.from_numpy(X)).exp().numpy()
    wanted = model.predict_proba(X)
    np.testing.assert_allclose(found[:, [2, 0]], np.maximum(wanted, 1e-7), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], 1e-7, rtol=1e-5)
    with pytest.raises(InvalidArgument, match="every class"):
        Estimator(model, classes=["cat", "eel"])


def test_an_estimator_that_is_not_fitted_is_refused():
    ensemble = pytest.importorskip("sklearn.ensemble")
    with pytest.raises(InvalidArgument, match="must be fitted"):
        Estimator(ensemble.RandomForestClassifier())
    with pytest.raises(InvalidArgument, match="predict_proba or decision_function"):
        Estimator(ensemble.RandomForestRegressor())


def test_fitting_the_original_again_changes_nothing_here():
    ensemble = pytest.importorskip("sklearn.ensemble")
    model = ensemble.RandomForestClassifier(4, random_state=0).fit(X, Y)
    member = Estimator(model)
    before = member(torch.from_numpy(X))
    model.fit(X, 2 - Y)
    assert torch.equal(member(torch.from_numpy(X)), before)


def test_rows_that_do_not_fit_are_refused_in_one_sentence():
    with pytest.raises(BadData, match=r"RandomForestClassifier\) fails on rows of shape \(3, 5\)"):
        Estimator(forest())(torch.zeros(3, 5))


# identities


def test_the_same_fit_has_the_same_identity_and_another_fit_another():
    ensemble = pytest.importorskip("sklearn.ensemble")
    again = ensemble.RandomForestClassifier(8, random_state=0).fit(X, Y)
    assert Estimator(forest()).digest == Estimator(again).digest
    assert Estimator(forest()).digest == Estimator(copy.deepcopy(forest())).digest
    assert Estimator(forest()).digest != Estimator(forest(1)).digest
    changed = copy.deepcopy(forest())
    changed.estimators_[0].tree_.value[0] += 1e-3
    assert Estimator(forest()).digest != Estimator(changed).digest


def made_by(weights, shift=0.0):
    def call(x):
        return x @ weights + shift

    return call


def test_a_function_is_its_code_and_what_it_captures():
    weights = np.eye(6, 3, dtype=np.float32)
    one = Function(made_by(weights)).digest
    assert one == Function(made_by(weights.copy())).digest
    assert one != Function(made_by(weights * 2)).digest
    assert one != Function(made_by(weights, 1.0)).digest
    assert one != Function(made_by(weights), gives="probabilities").digest
    assert Function(lambda x: x + 1).digest != Function(lambda x: x + 2).digest


SCALE = 1.0


def scaled(x):
    return twice(x) * SCALE


def test_a_function_is_also_the_globals_that_it_reads(monkeypatch):
    before = Function(scaled).digest
    monkeypatch.setattr(f"{__name__}.SCALE", 2.0)
    assert Function(scaled).digest != before


def test_what_cannot_be_hashed_needs_an_identity():
    lock = threading.Lock()

    def call(x):
        with lock:
            return twice(x)

    with pytest.raises(InvalidArgument, match="identity='name and version'"):
        Function(call)
    assert Function(call, identity="mine 1").digest == Function(twice, identity="mine 1").digest
    assert Function(call, identity="mine 1").digest != Function(call, identity="mine 2").digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ("1", 1),
        ([1, [2]], [[1], 2]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (np.float32([1]), np.float64([1])),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (0.0, -0.0),
        ((1,), [1]),
        (b"ab", "ab"),
    ],
)
def test_digests_tell_values_apart(one, other):
    assert digest_of(one) == digest_of(copy.deepcopy(one))
    assert digest_of(one) != digest_of(other)


def test_a_digest_ignores_the_bytes_between_fields():
    kind = np.dtype([("a", np.int8), ("b", np.int64)], align=True)
    raw = np.zeros(kind.itemsize, np.uint8)
    other = raw.copy()
    other[2] = 7  # between a and b
    assert digest_of(raw.view(kind)) == digest_of(other.view(kind))


def test_a_digest_of_what_holds_itself():
    loop = [1]
    loop.append(loop)
    assert digest_of(loop) == digest_of(copy.deepcopy(loop))


# functions


def test_single_rows_where_a_function_takes_no_batch():
    seen = []

    def one(x):
        seen.append(len(x))
        return twice(x)

    member = Function(one, one_by_one=True, identity="one")
    assert torch.equal(member(torch.from_numpy(X[:3])), torch.from_numpy(twice(X[:3])))
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "gives", "sentence"),
    [
        (
            lambda x: x[:, 0],
            None,
            r"must give numbers \[4, C\] of at least two classes, got float32 \[4\]",
        ),
        (lambda x: twice(x)[:2], None, "must give numbers"),
        (lambda x: np.array([["a", "b"]] * len(x)), None, "must give numbers"),
        (lambda x: np.full((len(x), 4), 0.25), None, "look like probabilities"),
        (lambda x: np.full((len(x), 4), 0.5), "probabilities", "sums to 2"),
    ],
)
def test_what_is_no_logits_is_refused(call, gives, sentence):
    with pytest.raises(BadNetwork, match=sentence):
        Function(call, gives=gives)(torch.from_numpy(X[:4]))


def test_logits_that_look_like_probabilities_are_taken_when_said():
    found = Function(lambda x: np.full((len(x), 4), 0.25), gives="logits")(torch.from_numpy(X[:4]))
    assert found.tolist() == [[0.25] * 4] * 4


def test_named_inputs_come_by_name():
    net = off.ladder(
        {
            "a": Function(lambda left, right: twice(left)),
            "b": Function(lambda left, right: twice(right)),
        }
    )
    first, second = net.eval()({"left": X[:4], "right": X[4:8]})
    assert torch.equal(first, torch.from_numpy(twice(X[:4])))
    assert torch.equal(second, torch.from_numpy(twice(X[4:8])))


# in a ladder


@pytest.fixture(scope="module")
def mixed():
    net = off.ladder({"small": linear(), "forest": forest()}).eval()
    return net, off.record(net, (X, Y), progress=False)


def test_a_ladder_with_an_estimator_is_priced_in_milliseconds_and_says_so(mixed):
    _, trace = mixed
    assert trace.prices.uncounted == ("forest",)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.9)
    assert plan.price.unit == "ms"
    assert "the MACs of forest are not known" in str(plan)
    assert "nan" not in str(plan)
    assert "nan" not in str(trace.evaluate(plan))
    assert {price.unit for price in trace.evaluate(plan).prices} == {"ms"}
    assert off.calibrate(trace, budget=1.0).price.mean > 0
    with pytest.raises(InvalidArgument, match="use unit='ms'"):
        off.calibrate(trace, at_most=0.9, unit="macs")


def test_without_milliseconds_there_is_no_price(mixed):
    net, _ = mixed
    trace = off.record(net, (X, Y), timed=False, progress=False)
    for aim in ({"at_most": 0.9}, {"budget": 0.5}):
        with pytest.raises(InvalidArgument, match="record with timed=True"):
            off.calibrate(trace, **aim)
    assert trace.evaluate(off.Plan.by_hand({"small": 1.0})).prices == ()


def test_a_wrapper_in_which_nothing_can_be_counted_has_no_macs_either():
    class Outside(nn.Module):
        def forward(self, x):
            return torch.from_numpy(forest().predict_proba(x.numpy())).float()

    trace = off.record(
        off.ladder({"small": linear(), "outside": Outside()}).eval(), X, progress=False
    )
    assert trace.prices.uncounted == ("outside",)
    assert off.calibrate(trace, at_most=0.9).price.unit == "ms"


def test_running_answers_as_the_members_do(mixed):
    net, trace = mixed
    plan = off.Plan.by_hand({"small": float(np.median(trace.scores[:, 0]))})
    found = off.run(net, plan, X)
    wanted = trace.replay(plan)
    assert found.exit.tolist() == wanted.exit.tolist()
    assert found.logits.argmax(1).tolist() == wanted.answer.tolist()
    assert 0 < found.exit.sum() < len(X)


def test_a_plan_of_another_estimator_is_refused(mixed):
    net, trace = mixed
    plan = off.calibrate(trace, at_most=0.9)
    off.open(net, plan)
    other = off.ladder({"small": linear(), "forest": forest(1)}).eval()
    with pytest.raises(Mismatch, match="the plan is for network"):
        off.open(other, plan)


def test_saving_needs_the_estimator_again(mixed, tmp_path):
    net, _ = mixed
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match="'small' was built by its user"):
        off.load(tmp_path / "net")
    with pytest.raises(InvalidArgument, match="'forest' was built by its user"):
        off.load(tmp_path / "net", {"small": linear(1)})
    with pytest.raises(InvalidArgument, match="'forest' must be the one that was saved"):
        off.load(tmp_path / "net", {"small": linear(1), "forest": forest(1)})
    with pytest.raises(InvalidArgument, match="got a int"):
        off.load(tmp_path / "net", {"small": linear(1), "forest": 5})
    again = off.load(tmp_path / "net", {"small": linear(1), "forest": forest()})
    assert again.fingerprint() == net.fingerprint()
    assert torch.equal(again(X)[1], net(X)[1])


def test_export_and_compiling_engines_refuse_in_one_sentence(mixed, tmp_path):
    pytest.importorskip("onnxruntime")
    net, _ = mixed
    plan = off.Plan.by_hand({"small": 1.0})
    with pytest.raises(
        BadNetwork, match=r"'forest' is a scikit-learn estimator .* cannot be written as a graph"
    ):
        off.export(net, plan, tmp_path / "out", example=X[:4])
    with pytest.raises(BadNetwork, match="Use engine='torch'"):
        off.open(net, plan, engine="onnxruntime")


# ONNX files


def written(path, outputs=("logits",), batch=None, external=False):
    """y = x W as ONNX, by hand: [B, 6] -> [B, 3], and its softmax."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weights = GENERATOR.normal(size=(6, 3)).astype(np.float32)
    tensor = numpy_helper.from_array(weights, "w")
    if external:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="other.bin")
        tensor.ClearField("raw_data")
    nodes = [helper.make_node("MatMul", ["x", "w"], [outputs[0]])]
    if len(outputs) > 1:
        nodes.append(helper.make_node("Softmax", [outputs[0]], [outputs[1]]))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch or "B", 3])
        for name in outputs
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or "B", 6])
    graph = helper.make_graph(nodes, "g", [given], infos, [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return weights


def test_an_onnx_file_answers_and_is_stored_with_the_network(tmp_path):
    pytest.importorskip("onnxruntime")
    weights = written(tmp_path / "large.onnx")
    net = off.ladder({"small": linear(), "large": tmp_path / "large.onnx"}).eval()
    np.testing.assert_allclose(net(X)[1].numpy(), X @ weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        net(X.astype(np.float64)[:2].astype(np.float32))[1].numpy(), X[:2] @ weights, rtol=1e-4
    )
    off.save(net, tmp_path / "net")
    (tmp_path / "large.onnx").unlink()
    again = off.load(tmp_path / "net", {"small": linear(1)})
    assert again.fingerprint() == net.fingerprint()
    assert torch.equal(again(X)[1], net(X)[1])
    off.save(again, tmp_path / "net")
    assert off.load(tmp_path / "net", {"small": linear(1)}).fingerprint() == net.fingerprint()
    assert torch.equal(copy.deepcopy(again)(X)[1], net(X)[1])
    written(tmp_path / "other.onnx")
    assert (
        off.ladder({"small": linear(), "large": tmp_path / "other.onnx"}).eval().fingerprint()
        != net.fingerprint()
    )
    with pytest.raises(InvalidArgument, match="'large' must be the one that was saved"):
        off.load(tmp_path / "net", {"small": linear(1), "large": tmp_path / "other.onnx"})


def test_an_onnx_file_with_a_fixed_batch(tmp_path):
    pytest.importorskip("onnxruntime")
    weights = written(tmp_path / "four.onnx", batch=4)
    for count in (0, 1, 4, 6):
        found = OnnxFile(tmp_path / "four.onnx").predict([X[:count]], {})
        assert len(found) == count
        if count:
            np.testing.assert_allclose(found, X[:count] @ weights, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_with_several_outputs(tmp_path):
    pytest.importorskip("onnxruntime")
    weights = written(tmp_path / "two.onnx", outputs=("raw", "soft"))
    with pytest.raises(InvalidArgument, match="one with output="):
        OnnxFile(tmp_path / "two.onnx")
    with pytest.raises(InvalidArgument, match="output must be one of"):
        OnnxFile(tmp_path / "two.onnx", output="none")
    soft = OnnxFile(tmp_path / "two.onnx", output="soft", gives="probabilities")
    raw = OnnxFile(tmp_path / "two.onnx", output="raw")
    assert soft.digest != raw.digest
    assert soft.spec == "onnx:?gives=probabilities&output=soft"
    wanted = torch.from_numpy(X @ weights).softmax(1)
    np.testing.assert_allclose(soft(torch.from_numpy(X)).exp(), wanted, rtol=1e-3, atol=1e-6)


def test_an_onnx_file_must_be_whole(tmp_path):
    pytest.importorskip("onnxruntime")
    written(tmp_path / "outside.onnx", external=True)
    with pytest.raises(BadFile, match="contain its weights"):
        OnnxFile(tmp_path / "outside.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BadFile):
        OnnxFile(tmp_path / "broken.onnx")
    with pytest.raises(BadFile, match="cannot read"):
        OnnxFile(tmp_path / "missing.onnx")


def test_onnx_files_and_estimators_by_name(tmp_path):
    pytest.importorskip("onnxruntime")
    from offramp.building.factories import make_model, model_from_file

    weights = written(tmp_path / "large.onnx")
    made = make_model(f"onnx:{tmp_path / 'large.onnx'}?gives=logits")
    np.testing.assert_allclose(made(torch.from_numpy(X)).numpy(), X @ weights, rtol=1e-4, atol=1e-5)
    assert isinstance(make_model(f"{__name__}:forest"), Estimator)
    with pytest.raises(InvalidArgument, match="a file may not name code to run"):
        model_from_file(f"onnx:{tmp_path / 'large.onnx'}", "large")
    with pytest.raises(InvalidArgument, match="no options but"):
        make_model("onnx:?size=3")


def test_an_onnx_file_at_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from typer.testing import CliRunner

    from offramp.cli import app

    monkeypatch.chdir(tmp_path)
    written(tmp_path / "large.onnx")
    np.savez("rows.npz", x=X)
    first = f"{__name__}:linear"
    for words in (
        ["ladder", "--model", first, "--model", "onnx:large.onnx", "-o", "net"],
        ["record", "net", "npz:rows.npz", "--model", f"linear={first}", "-o", "trace.npz"],
        ["calibrate", "trace.npz", "--at-most", "0.9", "-o", "plan.json"],
        ["run", "net", "plan.json", "npz:rows.npz", "--model", f"linear={first}"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    plan = off.Plan.load("plan.json")
    assert plan.topology.exits == ("linear", "large")
    assert plan.price.unit == "ms"
    done = CliRunner().invoke(
        app, ["export", "net", "plan.json", "-o", "out", "--model", f"linear={first}"]
    )
    assert done.exit_code == 2
    assert "cannot be written as a graph" in done.output


# what else is refused


@pytest.mark.parametrize("thing", [5, "resnet", nn.Linear, None])
def test_what_is_no_member_is_refused(thing):
    with pytest.raises(BadNetwork, match=r"must be a torch\.nn\.Module"):
        off.ladder({"a": linear(), "b": thing})


def test_a_url_needs_its_version():
    with pytest.raises(InvalidArgument, match="version"):
        off.ladder({"a": linear(), "b": "http://127.0.0.1:1/infer"})
