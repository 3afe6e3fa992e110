"""A verb has one name for a thing: an option of the command line is the argument of the same name
in Python.
"""

from __future__ import annotations

import inspect

import pytest
import typer.main

import offramp
from offramp.cli import app

COMMANDS = typer.main.get_command(app).commands
OTHERS = {"demo", "doctor"}  # no verbs: they have no function in Python
VERBS = [name for name in COMMANDS if name not in OTHERS]

# Options that are no argument of the verb in Python, and why.
EVERYWHERE = {
    "json": "how the command line prints",
    "output": "where it is written: in Python the argument behind what is read (export, report, "
    "compare), or save",
    "threshold": "a plan is changed by plan.changed(thresholds=...) or made by Plan.by_hand",
    "rows": "a part of a trace is trace[a:b]",
    "model": "a model of a saved network, given again: off.load(folder, {name: model})",
    "preprocess_of": "its preprocessing: off.load(folder, {name: (model, preprocess)})",
    "gate_of": "a gate of the user's own: off.load(folder, gates={node: gate})",
}
EXCEPTIONS = {
    ("ladder", "model"): "one of the models: off.ladder({name: (model, preprocess)})",
    ("ladder", "weights"): "off.make_model(spec, weights)",
    ("ladder", "preprocess"): "one of the pairs: off.ladder({name: (model, preprocess)})",
    ("ladder", "name"): "one of the keys: off.ladder({name: (model, preprocess)})",
    ("cut", "weights"): "off.make_model(spec, weights)",
    ("convert", "weights"): "off.make_model(spec, weights)",
    (
        "convert",
        "preprocess",
    ): "rows for the example go through it: off.convert takes what the model takes",
    ("convert", "layer"): "one of the keys: off.convert(model, {pattern: method})",
    ("search", "weights"): "off.make_model(spec, weights)",
    ("search", "other_task"): "one of the keys of data: off.search(model, choices, {name: rows})",
    ("search", "gate"): "an argument of the result: off.search(...).network(gate=gate)",
    ("fit", "original"): "an argument of the recipe recover: original=model",
    ("fit", "original_weights"): "off.make_model(spec, weights)",
    ("adopt", "weights"): "off.make_model(spec, weights)",
    ("inspect", "weights"): "off.make_model(spec, weights)",
    ("resolutions", "weights"): "off.make_model(spec, weights)",
    ("unrolled", "weights"): "off.make_model(spec, weights)",
    ("cut", "exit"): "the exit of all cuts: off.cut(..., exits=exit)",
    ("cut", "exit_of"): "the exit of one cut: off.cut(..., exits={layer: exit})",
    (
        "fit",
        "with",
    ): "an argument of the recipe: recipe='joint?epochs=5', or an object of its class",
    (
        "fit",
        "overwrite",
    ): "whether --output may be NETWORK itself: in Python fit changes the network that it is given",
    ("calibrate", "how_many"): "no calibration: off.rows_needed(level, confidence)",
    ("run", "batch_size"): "in Python x is one batch",
    ("run", "deadline_ms"): "runner = off.open(..., timing_rows=rows); runner(x, deadline_ms=...)",
}


def options(command) -> dict[str, bool]:
    """Names of the options as Python spells them, and whether each may be repeated."""
    found = {}
    for option in command.params:
        long = [flag for flag in option.opts if flag.startswith("--")]
        if long:
            found[long[0].removeprefix("--").replace("-", "_")] = bool(option.multiple)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_called_the_same_in_python(verb):
    assert callable(getattr(offramp, verb))


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_has_the_name_of_its_argument(verb):
    arguments = inspect.signature(getattr(offramp, verb)).parameters
    for name, repeated in options(COMMANDS[verb]).items():
        if name in EVERYWHERE or (verb, name) in EXCEPTIONS:
            continue
        # one --batch of batches, one --other of others
        plural = f"{name}es" if name.endswith("h") else f"{name}s"
        assert name in arguments or (repeated and plural in arguments), (
            f"--{name} of {verb} is none of {[*arguments]}"
        )


def test_no_exception_is_out_of_date():
    for verb, name in EXCEPTIONS:
        assert name in options(COMMANDS[verb]), f"--{name} of {verb} is gone"
        assert name not in inspect.signature(getattr(offramp, verb)).parameters, (
            f"{verb} has {name} in Python now"
        )
    used = {name for verb in VERBS for name in options(COMMANDS[verb])}
    assert set(EVERYWHERE) <= used
