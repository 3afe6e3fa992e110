"""Checks before anything is trained: unknown names, missing modules, and rows in two roles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp._support.arguments import arguments_of, pairs, require, require_confidence
from offramp._support.find import files, find
from offramp.building.factories import (
    exit_factory,
    make_gate,
    make_model,
    make_preprocess,
    model_factory,
)
from offramp.comparing.placement import free_of
from offramp.comparing.settings import OWN, Method, Settings
from offramp.data.rows import rows
from offramp.errors import InvalidArgument
from offramp.fitting.loader import index_of
from offramp.fitting.training import recipe_of
from offramp.guarantees.risks import find_risk
from offramp.plans.draws import require_repeats
from offramp.plans.provenance import SeenRows
from offramp.runtime.engine import engine_of


def require_known(settings: Settings) -> None:
    """Resolve every name in a settings file.

    Args:
        settings: as read.

    Raises:
        UnknownName: a name does not exist. The message has the nearest ones.
        InvalidArgument: an argument of something named is wrong.
        MissingExtra: something named needs a package that is not installed.
    """
    risk = find_risk(settings.risk)
    require_repeats(settings.repeated_rows)
    require_confidence(settings.confidence)
    if settings.at_most is not None:
        require("at-most", settings.at_most, low=risk.low, below=risk.high)
    engine_of(settings.engine)
    # An error in a method names its table in the file.
    for method in settings.methods:
        try:
            _require_names(method)
        except InvalidArgument as problem:
            raise type(problem)(f"[method.{method.name}]: {problem}") from problem


def _require_names(method: Method) -> None:
    """Resolve the names of one method."""
    for gate in (method.gate, *method.gates):
        if gate != OWN:
            make_gate(gate, ())
    if method.members:
        return
    _require_model(method.model or "")
    if method.preprocess != "auto":
        make_preprocess(method.preprocess)
    if not method.static:
        for name in (method.exit, *pairs(method.exit_of, "--exit-of").values()):
            exit_factory(name)
    if method.recipe is not None:
        recipe_of(method.recipe, **arguments_of(method.arguments))
    if method.augment is not None:
        find("augments", method.augment)


def _require_model(spec: str) -> None:
    """Find a model's factory. A hub's model is looked up by `require_models`, which builds it."""
    if spec.partition(":")[0] not in files("hubs"):
        model_factory(spec)


def require_models(methods: Sequence[Method]) -> None:
    """Build the models that are still to be cut, and look for their cuts.

    Args:
        methods: whose networks are not made yet.

    Raises:
        InvalidArgument: a model does not have a module that `at` names.
        BadFile: a file of weights cannot be read.
    """
    # Each model is built once, for all methods that cut it.
    by_model: dict[tuple[str | None, str | None], list[Method]] = {}
    for method in methods:
        if not method.members:
            by_model.setdefault((method.model, method.weights), []).append(method)
    for (spec, weights), sharing in by_model.items():
        assert spec is not None
        with torch.random.fork_rng([]):
            model = make_model(spec, weights)
        modules = dict(model.named_modules(remove_duplicate=False))
        for method in sharing:
            if method.static:
                continue
            for name in method.cuts:
                if name not in modules:
                    raise InvalidArgument(
                        f"[method.{method.name}]: at must name modules that `offramp inspect` "
                        f"lists, got {name!r}, which {spec} does not have"
                    )


def require_lengths(settings: Settings, methods: Sequence[Method]) -> None:
    """Raise InvalidArgument if an input whose length is free is not an input of the example."""
    for method in methods:
        try:
            free_of(method, settings)
        except InvalidArgument as problem:
            raise InvalidArgument(f"[method.{method.name}]: {problem}") from problem


def require_apart(settings: Settings, methods: Sequence[Method], *, progress: bool) -> None:
    """Read all rows once, and check that no row is in two roles.

    The roles are training, calibration and test. With drop-seen such rows are left out later, and
    nothing is checked here.

    Args:
        settings: of the comparison.
        methods: whose rows are read.
        progress: True to show progress bars.

    Raises:
        OverlappingRows: a row is in two roles.
    """
    if settings.drop_seen:
        return
    known: dict[str, SeenRows] = {}  # each file is read once

    def seen(data: str) -> SeenRows:
        if data not in known:
            known[data] = index_of(rows(data), progress=progress).seen
        return known[data]

    calibration = seen(settings.calibration).digests
    test = seen(settings.test).digests
    seen(settings.calibration).refuse_overlap(test, "test")
    training = list[str]()
    for method in methods:
        training.extend(method.training)
    for data in dict.fromkeys(training):  # each once
        seen(data).refuse_overlap(test, "test")
        seen(data).refuse_overlap(calibration, "calibration")
