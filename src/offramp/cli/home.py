"""`offramp demo` and `offramp doctor`: a first look, and what this machine has."""

from __future__ import annotations

import inspect
import os
import platform
import re
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    from offramp.cli.demonstration import demo as told

    try:
        story = told(output, say=lambda text: note(text if text.startswith("#") else f"$ {text}"))
    except KeyboardInterrupt as problem:
        note(f"offramp: interrupted; every file that stands in {output} is whole")
        raise typer.Exit(130) from problem
    word, sentence = verdict(story.evaluation.risk, AT_MOST)
    body = {**story.to_json(), "verdict": word}
    answer(body, as_json, "", str(story.plan), _table(story), sentence, "", *_next(story))


def _table(story: Story) -> Any:
    found = story.evaluation
    rows = [
        ("accuracy", f"{found.plain_accuracy:.2%}", f"{found.accuracy:.2%}"),
        (found.risk.risk, "-", f"{found.risk.value:.2%}"),
        *(
            (f"leave at {name}", "-", f"{share:.1%}")
            for name, share in zip(found.exits, found.shares, strict=True)
        ),
    ]
    macs = found.prices[0]
    rows += [
        (
            "mean cost, MACs per row",
            f"{macs.plain:,.0f}",
            f"{macs.mean:,.0f} ({macs.mean / macs.plain:.2f})",
        ),
        (
            "worst case, MACs per row",
            f"{macs.plain:,.0f}",
            f"{macs.worst:,.0f} ({macs.worst / macs.plain:.2f})",
        ),
    ]
    for line in story.bench.lines:
        left = " and ".join(
            f"{n} at {name}" for n, name in zip(line.left, story.bench.exits, strict=True) if n
        )
        cells = f"{line.plain_ms:.3f}", f"{line.run_ms:.3f} ({line.over_plain.value:.2f})"
        rows.append((f"ms, batch {line.batch}: {left}", *cells))
    return table(
        f"{found.rows:,} test rows, one thread", "plain network", "under the plan", rows=rows
    )


def _next(story: Story) -> list[str]:
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
    body: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": _machine(),
        "extras": _extras(),
        "shelves": _shelves(),
    }
    versions = [(name, version or "missing") for name, version in body["versions"].items()]
    machine = [(name, str(value)) for name, value in body["machine"].items()]
    extras = [
        (
            name,
            "installed"
            if not missing
            else f"missing {', '.join(missing)}: pip install 'offramp[{name}]'",
        )
        for name, missing in body["extras"].items()
    ]
    shelves = [(name, ", ".join(found)) for name, found in body["shelves"].items()]
    answer(
        body,
        as_json,
        *(
            _lines(head, rows)
            for head, rows in (
                ("versions", versions),
                ("machine", machine),
                ("extras", extras),
                ("shelves", shelves),
            )
        ),
    )


def _lines(head: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([head, *(f"  {name:<12} {text}" for name, text in rows)])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, object]:
    import torch

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _extras() -> dict[str, list[str]]:
    """Extra -> the packages of it that are not installed; from the project's own metadata."""
    extras: dict[str, list[str]] = {}
    for line in metadata.requires("offramp") or ():
        match = re.match(r"([A-Za-z0-9_.\-]+).*extra\s*==\s*['\"](\w+)['\"]", line)
        if match and match[1] != "offramp":
            extras.setdefault(match[2], []).extend([] if _version(match[1]) else [match[1]])
    return extras


def _shelves() -> dict[str, list[str]]:
    """What can be named at the command line."""
    from offramp._support.find import files, find, names
    from offramp.building.converting import methods
    from offramp.data import specs

    def functions(shelf: str) -> list[str]:
        """Those of the names that make something; the others are classes, which saved networks
        name.
        """
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
