"""The figures of networks with forks, and a page on which they stand beside early exits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import offramp as off
from forked import CLASSES, WIDTH, Columns, WholeNumbers, three
from made_up import comparison, file_of, method_of, settings_of
from offramp.calibration.calibrating import calibrate
from offramp.comparing.comparing import Result, measure
from offramp.comparing.costing import size_of
from offramp.comparing.curves import with_first_exit
from offramp.comparing.figures import plain_of
from offramp.comparing.forked import figures_of_forks
from offramp.comparing.page import write_page
from offramp.comparing.spreadsheets import write_spreadsheets
from offramp.plans.trace import Trace
from routes import Answer

SETTINGS = settings_of(budgets=(0.3, 0.8, 1.0), at_most=0.5, repeated_rows="independent")


def recorded(net, count: int = 400, **options) -> tuple[Trace, Trace]:
    """Rows to calibrate and rows to test."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(-4, 5, (count, WIDTH), generator=draw).float()  # sums are exact
    y = torch.randint(0, CLASSES, (count,), generator=draw)
    trace = off.record(net, (x, y), timed=False, progress=False, **options)
    return trace[: count // 2], trace[count // 2 :]


def dialled() -> off.Network:
    """Five units that can be skipped: 32 paths."""
    steps = [("stem", WholeNumbers(WIDTH, 0).eval())]
    for number in range(5):
        arms = {f"none{number}": [], f"unit{number}": WholeNumbers(WIDTH, number + 1).eval()}
        steps.append(off.Fork(f"skip{number}", arms, Columns(number)))
    return off.route([*steps, ("head", Answer(9).eval())], example=torch.zeros(2, WIDTH))


def test_the_size_of_a_network_with_forks_is_that_of_all_its_parts():
    """Shared weights count once, and the gate counts."""
    torch.manual_seed(0)
    example = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model = off.make_model("offramp:resnet20")
    gate = "predictor?width=4&side=8&stride=1"
    preprocess = off.make_preprocess("offramp:resnet20")
    net = off.resolutions(model, example, [16, 32], gate=gate, preprocess=preprocess)
    cost = size_of(net, example)
    own = sum(value.numel() for value in model.parameters())
    norms = sum(value.numel() for name, value in model.named_parameters() if "bn" in name)
    (chooser,) = net.gates.values()
    rating = sum(value.numel() for value in chooser.parameters())
    shared = own - norms  # the batch norms of each size are its own
    assert shared + rating < cost.parameters <= own + 2 * norms + rating
    assert 4 * cost.parameters <= cost.stored_bytes < 8 * cost.parameters
    trace = off.record(net, (example, torch.zeros(4).long()), timed=False, progress=False)
    dearest = trace.prices.along(["r32"], unit="macs", batch=1)
    assert 0.5 * dearest < cost.macs <= dearest
    assert cost.bit_operations == 1024 * cost.macs


def test_paths_are_figures_and_plans_are_measured_on_test_rows():
    calibration, test = recorded(three())
    unit = plain_of(test)
    figures = figures_of_forks(calibration, test, SETTINGS, unit, splits=2)
    assert figures.exits == ("middle", "head via small", "head via middle", "head via large more")
    for accuracy, label in zip(figures.alone, test.topology.exit_labels, strict=True):
        assert accuracy == (test.columns[f"answer/{label}"] == test.labels).mean()
    none, *budgets = figures.budgets
    assert (none.point, none.over_splits) == (None, ())  # no path is as cheap
    for budget in budgets:
        plan = calibrate(calibration, risk="error", budget=budget.budget)
        assert budget.point.cost == test.price(plan).mean
        assert budget.point.accuracy == (test.replay(plan).answer == test.labels).mean()
        assert budget.over_splits[0] <= budget.over_splits[1] <= budget.over_splits[2]
    costs = [point.cost for point in figures.frontier]
    assert costs == sorted(costs)
    assert len(costs) > 2
    assert (figures.powers, figures.leaving) == ((), ())
    assert figures.to_json() == type(figures).from_json(figures.to_json()).to_json()


def test_settings_are_figures_from_the_cheapest_on():
    calibration, test = recorded(dialled(), settings=[2.0, 1.0, 0.0, -1.0])
    figures = figures_of_forks(calibration, test, SETTINGS, plain_of(test))
    assert figures.exits == (
        "setting -1",
        "setting 0",
        "setting 1",
        "setting 2",
        "all gates closed",
    )
    assert figures.alone[-1] == (test.answers[:, 0] == test.labels).mean()
    assert [point.cost for point in figures.anytime] == sorted(
        point.cost for point in figures.anytime
    )
    assert all(budget.point is None or budget.point.cost <= figures.plain * 1.01
               for budget in figures.budgets)  # fmt: skip


def test_a_page_has_forks_beside_early_exits(tmp_path):
    pytest.importorskip("plotly")
    early = comparison(methods=1, seeds=1, gates=("own",))
    forked = method_of("forked", seeds=(0,), skip="blocks.*")
    dial = method_of("dial", seeds=(0,), skip="*", settings=(1.0,))
    results = list(early.results)
    for method, net, options in (
        (forked, three(), {}),
        (dial, dialled(), {"settings": [1.0, 0.0]}),
    ):
        traces = recorded(net, **options)
        figures = figures_of_forks(*traces, early.settings, plain_of(traces[1]))
        results.append(Result(method.name, 0, "own", False, figures, 1.0))
    methods = (*early.settings.methods, forked, dial)
    whole = replace(
        early, settings=replace(early.settings, methods=methods), results=tuple(results)
    )
    page = write_page(whole, tmp_path / "index.html").read_text(encoding="utf-8")
    for words in ("3 ways to spend less", "forked", "head via small", "all gates closed"):
        assert words in page
    files = write_spreadsheets(whole, tmp_path)
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert "forked" in text
    assert "dial" in text
    # the chart of first exits has the network with exits alone
    assert with_first_exit(whole) == ["method-0"]
    assert "The first exit and its threshold" in page


@pytest.mark.slow
def test_a_comparison_of_early_exits_and_units_that_rows_skip(tmp_path):
    shared = f"""
train = "npz:{tmp_path}/rows.npz[0:40]"
calibration = "npz:{tmp_path}/rows.npz[40:80]"
test = "npz:{tmp_path}/rows.npz[80:120]"
model = "offramp:resnet20"
preprocess = "none"
seeds = [0]
budgets = [0.9, 1.0]
"""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((120, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=draw.integers(0, 10, 120))
    tables = [
        '[method.early]\nat = "layer2"\nexit = "linear"\nrecipe = "hinge"\n',
        '[method.skip]\nskip = "layer3.*"\nrecipe = "gumbel"\nwith = ["epochs=1"]\n',
        '[method.dial]\nskip = "layer*.*"\nrecipe = "d2nn"\nwith = ["warm=0", "epochs=1"]\n'
        "settings = [0.5, 0.0, -0.5]\n",
        '[method.sized]\nsizes = "4,8"\ngate = "predictor?side=8&width=4&scale=1"\n',
        '[method.act]\nmodel = "offramp:resnet20|layer3=adaptive_depth?per=sample&bias=-1"\n'
        'unrolled = true\nrecipe = "pondered"\nwith = ["epochs=1"]\n',
    ]
    file = file_of(tmp_path, *tables, shared=shared)
    found = measure(file, tmp_path / "out", say=lambda line: None, progress=False)
    assert found.labels() == ["early", "skip", "dial", "sized", "act"]
    assert all(means[-1] is not None for means in found.mean_accuracies().values())
    said: list[str] = []
    again = measure(file, tmp_path / "out", say=said.append, progress=False)
    assert "5 networks, of which 5 are in" in said[0]
    assert again.mean_accuracies() == found.mean_accuracies()
