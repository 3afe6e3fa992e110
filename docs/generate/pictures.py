"""Draw docs/images/frontier.png and docs/images/report.png from real data.

python docs/generate/pictures.py DATA

DATA is the folder that `python benchmarks/fetch.py DATA all` fills.

The frontier: the ladder of ResNet-20 and ResNet-56 on CIFAR-10. Every budget's plan is chosen on
rows 1,000-4,999 and drawn on rows 5,000-9,999. Three networks alone are beside it. The report: of
the certified plan of the README, as a browser with Chromium shows it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import offramp as off

IMAGES = Path(__file__).parents[1] / "images"
BUDGETS = [0.33, 0.35, 0.37, 0.39, 0.41, 0.44, 0.48, 0.54, 0.62, 0.75, 0.9, 1.05]
MODELS = ("resnet20", "resnet32", "resnet56")
SIZE = (1280, 1500)


def main(data: str) -> None:
    """Record, calibrate, draw."""
    models = {}
    for name in MODELS:
        model = off.make_model(f"offramp:{name}", f"{data}/weights/cifar10_{name}.safetensors")
        models[name] = (model, off.make_preprocess(f"offramp:{name}"))
    rows = f"cifar10:{data}/cifar10"
    trace = off.record(off.ladder(models), f"{rows}[5000:]", timed=False)
    pair = off.ladder({name: models[name] for name in ("resnet20", "resnet56")})
    pair_trace = off.record(pair, rows, timed=False)
    plan = off.calibrate(pair_trace[1000:5000], risk="accuracy_gap", at_most=0.005)
    frontier(pair_trace, plan, alone(trace))
    page = Path(tempfile.mkdtemp()) / "report.html"
    off.report(pair_trace[5000:], plan, page, data=f"{rows}[5000:]")
    screenshot(page, IMAGES / "report.png")


def alone(trace: off.Trace) -> dict[str, tuple[float, float]]:
    """Cost as a share of ResNet-56, and accuracy on the test rows, of each network alone."""
    points = {}
    for name in MODELS:
        # all rows are answered here, and no gate is run
        found = trace.evaluate(off.Plan(thresholds={}, max_exit=name))
        points[name] = (found.prices[0].mean / found.prices[0].plain, found.accuracy)
    return points


def frontier(
    trace: off.Trace, certified: off.Plan, networks: dict[str, tuple[float, float]]
) -> None:
    """Accuracy against cost: budgets, the certified plan, networks alone."""
    calibration = trace[1000:5000]
    test = trace[5000:]
    costs = []
    accuracies = []
    for budget in BUDGETS:
        found = test.evaluate(off.calibrate(calibration, budget=budget))
        costs.append(found.prices[0].mean / found.prices[0].plain)
        accuracies.append(100 * found.accuracy)
    found = test.evaluate(certified)
    mean = found.prices[0].mean / found.prices[0].plain
    _, axes = plt.subplots(figsize=(7, 4), dpi=150)
    axes.plot(
        costs,
        accuracies,
        marker="o",
        markersize=4,
        color="#00796b",
        label="ladder of ResNet-20 and ResNet-56",
    )
    axes.plot(
        [mean],
        [100 * found.accuracy],
        "*",
        markersize=15,
        color="#e65100",
        label="certified: gap <= 0.5 points",
    )
    for name, (cost, share) in networks.items():
        axes.plot([cost], [100 * share], "s", color="#546e7a")
        if cost > 0.9:
            side = {"xytext": (-8, 6), "ha": "right"}
        else:
            side = {"xytext": (8, -3), "ha": "left"}
        axes.annotate(
            f"{name} alone", (cost, 100 * share), textcoords="offset points", fontsize=8, **side
        )
    axes.set_xlabel("mean cost of an image, as a share of ResNet-56 (multiply-adds)")
    axes.set_ylabel("accuracy, %")
    axes.set_title("CIFAR-10, 5,000 test images that chose nothing", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    plt.tight_layout()
    plt.savefig(IMAGES / "frontier.png")


def screenshot(page: Path, picture: Path) -> None:
    """The top of a page as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium: install it to draw report.png")
    window = f"--window-size={SIZE[0]},{SIZE[1]}"
    wait = "--virtual-time-budget=8000"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        window,
        wait,
        f"--screenshot={picture}",
    ]
    subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)
    Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE).save(picture, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
