"""`offramp demo` and `offramp doctor`: a first look, and the state of this machine."""

from __future__ import annotations

import inspect
import os
import platform
import re
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp._support.machine import processor
from offramp.cli.options import AsJson
from offramp.cli.printing import answer, note, table

if TYPE_CHECKING:
    from offramp.cli.demonstration import Story

Folder = Annotated[
    str, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write into.")
]

PACKAGES = ("offramp", "torch", "numpy", "scipy", "safetensors", "rich", "typer")


def demo(output: Folder = "offramp-demo", as_json: AsJson = False) -> None:
    """The whole job on scikit-learn's digits, in under a minute.

    Two small nets are trained on the spot; then come a promise, a saving and a page.
    Each step is printed as the command that does it; all files stay in the folder.

    Example:
      offramp demo -o offramp-demo/
    """
    from offramp.calibration.checking import verdict
    from offramp.cli.demonstration import AT_MOST
    from offramp.cli.demonstration import demo as run_demo

    try:
        story = run_demo(output, say=_say)
    except KeyboardInterrupt as problem:
        note(f"offramp: interrupted; every file in {output} is complete")
        raise typer.Exit(130) from problem
    # The verdict is that of `offramp check` on the test rows.
    word, sentence = verdict(story.evaluation.risk, AT_MOST)
    body = {**story.to_json(), "verdict": word}
    answer(body, as_json, "", str(story.plan), _table(story), sentence, "", *_next(story))


def _say(line: str) -> None:
    """Print a line of the demo: a comment as it is, a command after a prompt."""
    if line.startswith("#"):
        note(line)
    else:
        note(f"$ {line}")


def _table(story: Story) -> Any:
    """The plain network and the network under the plan, side by side."""
    evaluation = story.evaluation  # on test rows
    rows = [
        ("accuracy", f"{evaluation.plain_accuracy:.2%}", f"{evaluation.accuracy:.2%}"),
        (evaluation.risk.risk, "-", f"{evaluation.risk.value:.2%}"),
    ]
    for name, share in zip(evaluation.exits, evaluation.shares, strict=True):
        rows.append((f"leave at {name}", "-", f"{share:.1%}"))

    macs = evaluation.prices[0]
    for label, cost in (("mean cost", macs.mean), ("worst case", macs.worst)):
        under_plan = f"{cost:,.0f} ({cost / macs.plain:.2f})"
        rows.append((f"{label}, MACs per row", f"{macs.plain:,.0f}", under_plan))

    # Batch 1 has a line for each exit, larger batches one each.
    for line in story.bench.lines:
        counts = []  # of the rows that leave at each exit
        for count, name in zip(line.left, story.bench.exits, strict=True):
            if count:
                counts.append(f"{count} at {name}")
        label = f"ms, batch {line.batch}: {' and '.join(counts)}"
        under_plan = f"{line.run_ms:.3f} ({line.over_plain.value:.2f})"
        rows.append((label, f"{line.plain_ms:.3f}", under_plan))
    return table(
        f"{evaluation.rows:,} test rows, one thread", "plain network", "under the plan", rows=rows
    )


def _next(story: Story) -> list[str]:
    """Commands to try after the demo."""
    folder = story.folder
    return [
        f"The page: {story.report}",
        "",
        "Next, try:",
        f"  offramp check {folder}/plan.json {folder}/test.npz",
        f"  offramp calibrate {folder}/calibration.npz --risk accuracy_gap --at-most 0.05 -o "
        f"{folder}/other.json",
        f"  offramp run {folder}/network {folder}/plan.json 'digits[701:1797:2]' -o "
        f"{folder}/answers.csv",
        "  offramp ladder --help",
    ]


def doctor(as_json: AsJson = False) -> None:
    """What this machine has, and what to install.

    Versions, processor, extras, and what can be named at the command line: models, gates, layers,
    data.

    Example:
      offramp doctor
    """
    # 1. Collect everything, for --json.
    versions = _versions()
    machine = _machine()
    extras = _extras()
    shelves = _shelves()
    body = {"versions": versions, "machine": machine, "extras": extras, "shelves": shelves}

    # 2. Write a list of lines for each part.
    version_lines = ["versions"]
    for name, version in versions.items():
        version_lines.append(_line(name, version or "missing"))
    machine_lines = ["machine"]
    for name, value in machine.items():
        machine_lines.append(_line(name, str(value)))
    extra_lines = ["extras"]
    for name, missing in extras.items():
        state = "installed"
        if missing:
            state = f"missing {', '.join(missing)}: pip install 'offramp[{name}]'"
        extra_lines.append(_line(name, state))
    shelf_lines = ["shelves"]
    for name, members in shelves.items():
        shelf_lines.append(_line(name, ", ".join(members)))
    lines = [*version_lines, *machine_lines, *extra_lines, *shelf_lines]
    answer(body, as_json, "\n".join(lines))


def _line(name: str, text: str) -> str:
    """A line of a list: a name and a value in two columns."""
    return f"  {name:<12} {text}"


def _versions() -> dict[str, str | None]:
    """The versions of Python and of the main packages; None if one is missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = _version(name)
    return versions


def _version(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, object]:
    """System, processor, cores, threads and GPU."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": gpu,
    }


def _extras() -> dict[str, list[str]]:
    """The missing packages of each extra, from the project's own metadata."""
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("offramp") or ():
        # Such as: timm>=1.0; extra == "timm"
        match = re.match(r"([A-Za-z0-9_.\-]+).*extra\s*==\s*['\"](\w+)['\"]", line)
        if not match:
            continue
        package, extra = match.groups()
        if package == "offramp":  # an extra that is made of others
            continue
        missing = extras.setdefault(extra, [])
        if not _version(package):
            missing.append(package)
    return extras


def _shelves() -> dict[str, list[str]]:
    """The names that the command line knows, by kind."""
    from offramp._support.find import files, find, names
    from offramp.building.converting import methods
    from offramp.data import specs

    def functions(shelf: str) -> list[str]:
        """The names of functions. Classes have names too, but only saved networks use them."""
        return [name for name in names(shelf) if inspect.isfunction(find(shelf, name))]

    return {
        "models": [f"offramp:{name}" for name in functions("models")],
        "hubs": [f"{name}:NAME" for name in files("hubs")],
        "gates": functions("gates"),
        "exits": functions("exits"),
        "layers": methods(),
        "recipes": files("recipes"),
        "augments": names("augments"),
        "engines": files("engines"),
        "data": specs.names(),
    }
