"""A comparison of made-up traces: figures as they are computed, no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from offramp.comparing.cells import plain_of
from offramp.comparing.comparing import Comparison, Result
from offramp.comparing.figures import Figures, Point, figures_of, figures_of_plain
from offramp.comparing.settings import Method, Settings
from offramp.plans.trace import Trace
from small import Stages, trace_of

MACS = (1.0, 3.0, 9.0)
SKILL = (0.6, 0.8, 0.93)
NASTY = "<b>2</b>"


def settings_of(*methods: Method, **options: Any) -> Settings:
    """Settings as a file would give them."""
    asked = {
        "budgets": (0.2, 0.5, 0.75, 1.0),
        "at_most": 0.1,
        "wall_clock": True,
        "splits": 3,
        **options,
    }
    return Settings(methods=methods, calibration="made[0:300]", test="made[300:]", **asked)


def method_of(name: str, **options: Any) -> Method:
    """A method that was trained on made-up rows."""
    return Method(
        name, **{"model": "made:up", "at": "a,b", "recipe": "joint", "train": "made", **options}
    )


def traces(seed: int, shift: float = 0.0, rows: int = 300) -> tuple[Trace, Trace]:
    """Rows to calibrate and rows to test of one network."""
    skill = [min(0.99, each + shift) for each in SKILL]
    whole = trace_of(2 * rows, skill=skill, macs=MACS, seed=seed)
    return whole[:rows], whole[rows:]


def bench(exits: tuple[str, ...]) -> dict[str, Any]:
    """What `bench` would say: an exit costs one millisecond more than the one before it."""

    def line(batch: int, left: list[int], ms: float) -> dict[str, Any]:
        ratio = {"value": ms / 5, "low": ms / 5 - 0.1, "high": ms / 5 + 0.1}
        same = {"value": 1.01, "low": 0.98, "high": 1.03}
        return {
            "batch": batch,
            "left": left,
            "run_ms": ms,
            "plain_ms": 5.0,
            "over_plain": ratio,
            "same": same,
        }

    ones = [
        line(1, [int(index == one) for index in range(len(exits))], 1.0 + one)
        for one in range(len(exits))
    ]
    return {"exits": list(exits), "threads": 1, "lines": [*ones, line(64, [16] * len(exits), 3.0)]}


def comparison(
    methods: int = 2, seeds: int = 2, gates: tuple[str, ...] = ("own", NASTY), **options: Any
) -> Comparison:
    """Methods under gates with seeds, beside two static networks."""
    cut = [method_of(f"method-{n}", seeds=tuple(range(seeds)), gates=gates) for n in range(methods)]
    static = [
        method_of(name, static=True, seeds=(0,), recipe=None) for name in ("smaller", "larger")
    ]
    settings = settings_of(*cut, *static, **options)
    results = []
    unit = plain_of(traces(0)[1])
    known = {seed: _figures(settings, seed) for seed in range(seeds)}
    for number, method in enumerate(cut):
        for seed in method.seeds:
            for index, gate in enumerate(gates):
                figures = _moved(known[seed], 0.01 * number - 0.02 * index)
                timed = None if seed or index else bench(figures.exits)
                results.append(Result(method.name, seed, gate, False, figures, 10.0 + seed, timed))
    for index, method in enumerate(static):
        alone = trace_of(300, skill=(0.7 + 0.1 * index,), macs=(3.0 + 3 * index,), seed=index)
        results.append(Result(method.name, 0, "own", True, figures_of_plain(alone)))
    return Comparison(settings, unit, tuple(results))


def _figures(settings: Settings, seed: int) -> Figures:
    return figures_of(
        *traces(seed), settings, plain_of(traces(0)[1]), splits=0 if seed else settings.splits
    )


def _moved(figures: Figures, by: float) -> Figures:
    """The same with other accuracies on the frontier and within budgets: searching for all of them
    would take long.
    """

    def point(one: Point) -> Point:
        return replace(one, accuracy=one.accuracy + by)

    budgets = [replace(each, point=each.point and point(each.point)) for each in figures.budgets]
    return replace(figures, frontier=tuple(map(point, figures.frontier)), budgets=tuple(budgets))


def net() -> nn.Module:
    """A small network for digits, to be named `made_up:net` in a settings file."""
    return Stages(classes=10).eval()


DIGITS = """
train = "digits[0:200]"
calibration = "digits[700:1000]"
test = "digits[1000:1300]"
model = "made_up:net"
preprocess = "offramp.models.digits:preprocess"
at = "stem,blocks.0"
batch-size = 50
budgets = [0.7, 1.0]
"""


def file_of(folder: Path, *tables: str, shared: str = DIGITS) -> Path:
    """A settings file of shared flags and a table for each method."""
    file = folder / "methods.toml"
    file.write_text("\n".join([shared, *tables]))
    return file


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written, and what."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
    }
