"""An exported folder answers as `off.run` does, by itself, and says what it is."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from compiled import CASES, SIZES, middling
from offramp._support.files import digest_file, read_json, write_json
from offramp.deploy import run as program
from offramp.errors import BadFile, BadNetwork, InvalidArgument, Mismatch, MissingExtra
from offramp.networks.nodes import Gate
from offramp.plans.plan import BAND, Plan, choose
from small import INF_MARK, NAN_MARK, cut_of, images_of, ladder_of, rows_of, spoiled

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def opened(folder):
    """run.py of a folder as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"run_{folder.name}", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(x):
    if isinstance(x, dict):
        return {name: value.numpy() for name, value in x.items()}
    return x.numpy()


def require_same(got, want):
    assert got["exit"].tolist() == want.exit.tolist()
    assert got["why"].tolist() == want.why.tolist()
    assert got["flagged"].tolist() == want.flagged.tolist()
    assert got["logits"].shape[0] == len(want.logits)
    if len(want.logits):
        np.testing.assert_allclose(got["logits"], want.logits.numpy(), atol=BAND, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_run_does(case, one_file, tmp_path):
    make, rows = CASES[case]
    net = make()
    plan = middling(net, rows(64))
    off.export(net, plan, tmp_path / "f", example=rows(4), one_file=one_file)
    module = opened(tmp_path / "f")
    eager = off.open(net, plan)
    left = set()
    for size in SIZES:
        require_same(module.run(arrays(rows(size)), threads=1), want := eager(rows(size)))
        left |= set(want.exit.tolist())
    assert left == set(range(len(net.topology.exits)))
    assert module.run(arrays(rows(0)))["logits"].shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [False, True])
def test_random_plans_over_ties_nan_and_infinities(one_file, tmp_path):
    """Whole numbers: logits are exact, scores tie, and thresholds stand on them; the plan alone is
    exchanged.
    """
    net = ladder_of(3, make=spoiled, seed=3)
    x = rows_of(64, whole=True, seed=1)
    x[3::9, 0], x[5::9, 0] = NAN_MARK, INF_MARK
    scores = {name: score.detach() for name, _, score in net.walk(x) if score is not None}
    off.export(
        net,
        Plan.by_hand(dict.fromkeys(net.topology.gates, 0.0)),
        tmp_path / "f",
        example=x[:4],
        one_file=one_file,
    )
    rng = np.random.default_rng(0)
    seen = set()
    for number in range(60):
        drawn = {
            gate: float(rng.choice([*score[score.isfinite()], -math.inf, math.inf]))
            for gate, score in scores.items()
        }
        plan = Plan.by_hand(drawn)
        plan.save(tmp_path / "f" / "plan.json")
        signed_again(tmp_path / "f")
        module = opened(tmp_path / "f")
        picks = rng.permutation(64)[: [0, 1, 2, 7, 64][number % 5]]
        closed = [gate for gate, value in drawn.items() if value == math.inf]
        found = module.run(x[picks].numpy(), threads=1)
        want = off.open(net, plan)(x[picks])
        if closed:  # a closed gate still scores here, so that more rows are flagged
            assert found["exit"].tolist() == want.exit.tolist()
            assert found["why"].tolist() == want.why.tolist()
        else:
            require_same(found, want)
        seen |= set(found["exit"].tolist())
    assert seen == {0, 1, 2}


def test_choose_is_the_package_s():
    values = np.float32(
        [-np.inf, -1, 0, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1, np.inf, np.nan]
    )
    for threshold in values[:-1]:
        want = choose(values[:, None], np.float32([threshold]))
        assert program.choose(values[:, None], [threshold]).tolist() == want.tolist()
    pairs = np.float32(np.meshgrid(values, values)).reshape(2, -1).T  # [N, 2], a gate of three ways
    for limits in pairs[~np.isnan(pairs).any(1)]:
        assert program.choose(pairs, limits).tolist() == choose(pairs, limits).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        Plan.by_hand({}),
        Plan.by_hand({"blocks.0": 0.2}, max_exit="blocks.0"),
        Plan.by_hand({"blocks.0": 0.2}),
    ],
)
def test_only_what_the_plan_runs_is_written(plan, tmp_path):
    net = cut_of()
    x = images_of(9)
    off.export(net, plan, tmp_path / "f")
    about = json.loads((tmp_path / "f" / "manifest.json").read_text())
    # what lies between is in the next graph
    nodes = [list(stage.nodes) for stage in plan.schedule(net.topology).joined()]
    assert [stage["nodes"] for stage in about["stages"]] == nodes
    assert about["gates"] == [
        gate for gate in net.topology.gates if gate in plan.open_gates() and gate != plan.max_exit
    ]
    require_same(opened(tmp_path / "f").run(x.numpy()), off.run(net, plan, x))


def signed_again(folder, change=lambda body: None):
    """Write the manifest as if the files had been exported as they are now; `change` edits its
    body.
    """
    _, body = read_json(folder / "manifest.json", "export", 3)
    body["files"] = {name: digest_file(folder / name) for name in body["files"]}
    change(body)
    write_json(folder / "manifest.json", "export", 3, body)


def promised(net, engine):
    trace = off.record(
        net,
        (rows_of(600), torch.zeros(600, dtype=torch.int64)),
        timed=False,
        engine=engine,
        progress=False,
    )
    return off.calibrate(trace, risk="disagreement", at_most=0.9)


def test_a_promise_goes_along_with_its_own_engine_alone(tmp_path):
    net = ladder_of(2)
    kept = off.export(net, plan := promised(net, "onnxruntime"), tmp_path / "a")
    assert kept.note is None
    assert Plan.load(tmp_path / "a" / "plan.json").promise == plan.promise is not None
    lost = off.export(net, promised(net, "torch"), tmp_path / "b")
    assert "record with engine='onnxruntime'" in str(lost)
    assert Plan.load(tmp_path / "b" / "plan.json").promise is None
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["promise"] is None
    with pytest.raises(Mismatch, match="the plan is for"):
        off.export(ladder_of(2, seed=1), plan, tmp_path / "c")
    assert not (tmp_path / "c").exists()


class Strange(Gate):
    def score(self, seen):
        return torch.special.bessel_j0(seen.own).sum(-1)

    def config(self):
        return {"name": "tests:Strange"}


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path, monkeypatch):
    plan = Plan.by_hand({"small": 0.4})
    with pytest.raises(BadNetwork, match=r"segment 'small' cannot be written as ONNX: .*bessel_j0"):
        off.export(ladder_of(2, gate=Strange()), plan, tmp_path / "f", example=rows_of(4))
    with pytest.raises(InvalidArgument, match="example must be a batch of rows"):
        off.export(ladder_of(2), plan, tmp_path / "f")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"offramp\[onnxruntime\]"):
        off.export(ladder_of(2), plan, tmp_path / "f", example=rows_of(4))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "letter.txt").write_text("dear")
    with pytest.raises(BadFile, match="was not written by offramp"):
        off.export(ladder_of(2), plan, tmp_path / "f", example=rows_of(4))
    assert [file.name for file in tmp_path.rglob("*")] == ["f", "letter.txt"]


def call(folder, *words):
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_has_seen_enough_is_no_error_and_one_file_says_nothing(tmp_path):
    net = ladder_of(2)
    x = rows_of(30_000)
    off.export(net, Plan.by_hand({"small": 0.5}), tmp_path / "f", example=x[:4], one_file=True)
    np.save(tmp_path / "x.npy", x.numpy())
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "f" / "run.py"), str(tmp_path / "x.npy")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"row,answer,exit,flagged\n"
        assert process.stdout.readline().startswith(b"0,")
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_program_by_itself(tmp_path):
    """Arrays, images, and what goes wrong: one sentence, exit code 2, nothing half-written."""
    Image = pytest.importorskip("PIL.Image")
    make, rows = CASES["mean and preprocessing, a cut member"]
    net = make()
    x = rows(6)
    plan = middling(net, rows(64))
    off.export(net, plan, tmp_path / "f", example=x)
    np.save(tmp_path / "x.npy", x.numpy())
    done = call(tmp_path / "f", tmp_path / "x.npy", "-o", tmp_path / "y.npz")
    assert done.returncode == 0, done.stderr
    want = off.run(net, plan, x)
    with np.load(tmp_path / "y.npz") as found:
        require_same(found, want)
    head, *lines = [line.split(",") for line in done.stdout.splitlines()]
    assert head == ["row", "answer", "exit", "flagged"]
    assert [line[2] for line in lines] == [net.topology.exits[index] for index in want.exit]
    files = [tmp_path / f"{row}.png" for row in range(6)]
    for file, pixels in zip(files, x[:, 0].numpy(), strict=True):
        Image.fromarray(pixels).save(file)
    assert call(tmp_path / "f", *files).stdout == done.stdout
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: turned as it was when rows were recorded
    Image.fromarray(x[0, 0].numpy()[::-1, ::-1].copy()).save(files[0], exif=exif)
    assert call(tmp_path / "f", *files).stdout == done.stdout
    np.save(tmp_path / "floats.npy", x.numpy().astype(np.float32))
    np.save(tmp_path / "wide.npy", x.numpy().repeat(2, axis=3))
    np.savez(tmp_path / "named.npz", images=x.numpy())
    before = sorted(tmp_path.iterdir())
    for name, says in (
        ("floats.npy", "uint8"),
        ("wide.npy", "16"),
        ("named.npz", "x/images"),
        ("gone.npy", "gone"),
    ):
        wrong = call(tmp_path / "f", tmp_path / name, "-o", tmp_path / "z.npz")
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1), (
            wrong.stderr
        )
        assert says in wrong.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_it_needs_neither_torch_nor_offramp(tmp_path):
    off.export(ladder_of(2), Plan.by_hand({"small": 0.4}), tmp_path / "f", example=rows_of(4))
    code = (
        "import sys; import run\n"
        "import numpy as np; run.run(np.zeros((3, 4), np.float32))\n"
        "assert not {'torch', 'offramp', 'onnx'} & {name.split('.')[0] for name in sys.modules}, "
        "'imports'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "f",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "f" / "run.py").read_text().splitlines()
    assert max(map(len, lines)) <= 100


def test_weights_that_changed_are_exported_as_they_are_now(tmp_path):
    net = ladder_of(2)
    x = rows_of(5)
    off.export(net, Plan.by_hand({}), tmp_path / "f", example=x)
    with torch.no_grad():
        net.backbone["middle"][0].weight.mul_(2)
    off.export(net, Plan.by_hand({}), tmp_path / "f", example=x)
    require_same(opened(tmp_path / "f").run(x.numpy()), off.run(net, Plan.by_hand({}), x))


class Masked(nn.Module):
    """Finite logits whose sum is not."""

    def forward(self, x):
        return torch.cat([x, torch.full_like(x[:, :2], torch.finfo(torch.float32).min)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("threshold", [{}, {"small": 0.5}])
def test_finite_logits_whose_sum_is_not_are_not_flagged(one_file, threshold, tmp_path):
    net = off.ladder({"small": Masked(), "large": Masked()}).eval()
    x = rows_of(7)
    x[2, 1] = math.nan
    plan = Plan.by_hand(threshold)
    off.export(net, plan, tmp_path / "f", example=x[:4], one_file=one_file)
    require_same(opened(tmp_path / "f").run(x.numpy(), threads=1), want := off.run(net, plan, x))
    assert want.flagged.nonzero().flatten().tolist() == [2]
