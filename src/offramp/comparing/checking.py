"""Checks before anything is trained: unknown names, missing modules, and rows in two roles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from offramp._support.arguments import arguments_of, pairs, require, require_confidence
from offramp._support.find import files, find
from offramp.building.converting import split_spec
from offramp.building.factories import (
    exit_factory,
    made_for_features,
    make_gate,
    make_model,
    make_preprocess,
    model_factory,
    preprocess_of,
)
from offramp.comparing.converted import converted
from offramp.comparing.placement import free_of
from offramp.comparing.settings import OWN, Method, Settings
from offramp.data.rows import rows
from offramp.errors import InvalidArgument, OfframpError
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
        if gate != OWN and not made_for_features(gate):
            make_gate(gate, ())
    if method.members:
        return
    _require_model(method.model or "")
    if method.preprocess != "auto":
        make_preprocess(method.preprocess)
    if not (method.static or method.forks):
        for name in (method.exit, *pairs(method.exit_of, "--exit-of").values()):
            exit_factory(name)
    if method.recipe is not None:
        recipe_of(method.recipe, **arguments_of(method.arguments))
    if method.augment is not None:
        find("augments", method.augment)


def _require_model(spec: str) -> None:
    """Find a model's factory. A hub's model is looked up by `require_models`, which builds it."""
    base, _ = split_spec(spec)  # without conversions
    if base.partition(":")[0] not in files("hubs"):
        model_factory(base)


def require_models(settings: Settings, methods: Sequence[Method]) -> None:
    """Build the models that are still to be cut, convert them, and look for their cuts.

    Args:
        settings: of the comparison.
        methods: whose networks are not made yet.

    Raises:
        InvalidArgument: a model does not have a module that `at` names, or cannot be converted.
        BadFile: a file of weights cannot be read.
    """
    # Each model is built once, for all methods that use it.
    by_model: dict[tuple[str | None, str | None], list[Method]] = {}
    for method in methods:
        if not method.members:
            by_model.setdefault((method.model, method.weights), []).append(method)
    for (spec, weights), sharing in by_model.items():
        assert spec is not None
        with torch.random.fork_rng([]):
            model = make_model(spec, weights)
        for method in sharing:
            changed = model
            if method.layer:
                changed = _converted(settings, method, model)
            if method.static or _begins_converted(settings, method):
                continue
            modules = dict(changed.named_modules(remove_duplicate=False))
            for name in method.cuts:
                if name not in modules:
                    raise InvalidArgument(
                        f"[method.{method.name}]: at must name modules that `offramp inspect` "
                        f"lists, got {name!r}, which {spec} does not have"
                    )


def _converted(settings: Settings, method: Method, model: nn.Module) -> nn.Module:
    """The model of a method with its cheaper layers. Raises InvalidArgument if that fails.

    If the method starts with another method's model, `model` is used in its place. Both have the
    same modules, unless the other one was converted too.
    """
    if _begins_converted(settings, method):
        return model
    if method.preprocess == "auto":
        preprocess = preprocess_of(method.model or "")
    else:
        preprocess = make_preprocess(method.preprocess)
    try:
        with torch.random.fork_rng([]):
            return converted(model, method, settings, preprocess)
    except OfframpError as problem:
        raise InvalidArgument(f"[method.{method.name}]: {problem}") from problem


def _begins_converted(settings: Settings, method: Method) -> bool:
    """Whether a method starts with a converted model, whose modules are known once it is made."""
    while method.start is not None:
        method = settings.method(method.start)
        if method.layer:
            return True
    return False


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
