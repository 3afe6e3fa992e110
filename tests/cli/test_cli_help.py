"""The set of commands and flags is frozen, and docs/reference/command-line.md says what --help
says.
"""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from offramp.cli import app
from typed import offramp

GIVEN = "--model --preprocess-of --gate-of"
FLAGS = {
    "ladder": "--model --weights --preprocess --name --gate --temperature --answer --example "
    "--output -o",
    "inspect": "--example --weights --preprocess --length",
    "convert": "--layer --output -o --example --data --weights --preprocess",
    "search": "--choice --development --output -o --budget --limit --unit --task --other-task --at "
    "--exit --gate --weights --preprocess --head --steps --paths --batch-size --rate --augment "
    "--population --generations --seed --folder --resume",
    "cut": "--example --output -o --at --parts --labelled --weights --preprocess --exit --exit-of "
    "--gate --length --skip",
    "adopt": "--example --output -o --exits --weights --preprocess --gate --length",
    "route": "--example --output -o",
    "resolutions": "--example --output -o --sizes --weights --preprocess --gate",
    "unrolled": "--example --output -o --weights --preprocess",
    "fit": f"--output -o --recipe --with --development --batch-size --seed --augment --views "
    f"--precision --folder "
    f"--cache --resume --track --original --original-weights --overwrite {GIVEN}",
    "record": f"--output -o --batch-size --keep --timed --keep-probe-rows --engine --settings "
    f"{GIVEN}",
    "calibrate": "--output -o --risk --at-most --confidence --budget --reference --unit --batch "
    "--bound --testing "
    "--search --max-exit --rows --repeats --drop-seen --how-many",
    "check": "--risk --at-most --confidence --rows --repeats --drop-seen --same-rows --threshold",
    "run": f"--output -o --batch-size --deadline-ms --engine --threshold {GIVEN}",
    "bench": f"--batch --repeats --threads --engine --threshold {GIVEN}",
    "export": f"--output -o --one-file --example --threshold {GIVEN}",
    "report": "--output -o --data --title --other --rows --threshold",
    "compare": "--output -o",
    "demo": "--output -o",
    "doctor": "",
}


def commands():
    return typer.main.get_command(app).commands


def flags(command) -> set[str]:
    return {flag for option in command.params for flag in option.opts if flag.startswith("-")}


def test_the_commands_are_frozen():
    assert list(commands()) == list(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_are_frozen(name):
    assert flags(commands()[name]) == {*FLAGS[name].split(), "--json"}


@pytest.mark.parametrize("name", FLAGS)
def test_every_page_has_a_paragraph_and_an_example(name):
    said = offramp(name, "--help").stdout
    head, example = said.split("Example:\n", 1)
    assert len(head.split("\n\n")) >= 3
    assert example.lstrip().startswith(f"offramp {name}")
    if name == "compare":  # a file is shown below the command
        return
    for command in example.replace("\\\n", " ").split("\n\n")[0].strip().splitlines():
        assert shlex.split(command)[0] == "offramp", command


def test_no_command_is_help():
    assert "Commands:" in offramp().output


def test_version():
    from offramp import __version__

    assert offramp("--version").stdout == f"offramp {__version__}\n"


def test_docs_help_is_what_help_says():
    maker = _maker()
    written = maker.PAGE.read_text(encoding="utf-8")
    fresh = maker.page()
    if written.splitlines()[0] != fresh.splitlines()[0]:
        pytest.skip("docs/reference/command-line.md was made with another version of typer")
    assert written == fresh, "run: python docs/generate/command_line.py"


def _maker() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "generate" / "command_line.py"
    spec = importlib.util.spec_from_file_location("docs_help", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
