"""What is refused before anything is trained: names of nothing, cuts that no model has, rows in two
roles.
"""

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
    """Resolve every name in a file. Raises UnknownName with the nearest names, InvalidArgument,
    MissingExtra.
    """
    risk = find_risk(settings.risk)
    require_repeats(settings.repeated_rows)
    require_confidence(settings.confidence)
    if settings.at_most is not None:
        require("at-most", settings.at_most, low=risk.low, below=risk.high)
    engine_of(settings.engine)
    for method in settings.methods:
        try:
            _require_names(method)
        except InvalidArgument as problem:
            raise type(problem)(f"[method.{method.name}]: {problem}") from problem


def _require_names(method: Method) -> None:
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
    """Find a model's factory; those of hubs are looked up when they are built, before anything is
    trained too.
    """
    base, _ = split_spec(spec)  # without conversions
    if base.partition(":")[0] not in files("hubs"):
        model_factory(base)


def require_models(settings: Settings, methods: Sequence[Method]) -> None:
    """Build the models that are still to be cut, convert them, and look for their cuts. Raises
    InvalidArgument, BadFile for weights.
    """
    for model, weights in dict.fromkeys(
        (each.model, each.weights) for each in methods if not each.members
    ):
        assert model is not None
        with torch.random.fork_rng([]):
            made = make_model(model, weights)
        plain = {name for name, _ in made.named_modules(remove_duplicate=False)}
        for method in methods:
            if (method.model, method.weights) != (model, weights) or method.members:
                continue
            modules = plain
            if method.layer:
                changed = _converted(settings, method, made)
                modules = {name for name, _ in changed.named_modules(remove_duplicate=False)}
            if method.static or _begins_converted(settings, method):
                continue
            for name in method.cuts:
                if name not in modules:
                    raise InvalidArgument(
                        f"[method.{method.name}]: at must name modules that `offramp inspect` "
                        f"lists, got {name!r}, which {model} does not have"
                    )


def _converted(settings: Settings, method: Method, model: nn.Module) -> nn.Module:
    """The model of a method with its cheaper layers. Raises InvalidArgument where that fails.

    If the method starts with another one's model, this one stands for it: they have the same
    modules, unless that one was converted too.
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
    """Look for the inputs whose length is free among those of the example. Raises
    InvalidArgument.
    """
    for method in methods:
        try:
            free_of(method, settings)
        except InvalidArgument as problem:
            raise InvalidArgument(f"[method.{method.name}]: {problem}") from problem


def require_apart(settings: Settings, methods: Sequence[Method], *, progress: bool) -> None:
    """Read all rows once, and raise OverlappingRows where one is in two roles: training,
    calibration or test.

    Not if such rows are to be left out.
    """
    if settings.drop_seen:
        return
    known: dict[str, SeenRows] = {}

    def seen(data: str) -> SeenRows:
        if data not in known:
            known[data] = index_of(rows(data), progress=progress).seen
        return known[data]

    calibration = seen(settings.calibration).digests
    test = seen(settings.test).digests
    seen(settings.calibration).refuse_overlap(test, "test")
    for data in dict.fromkeys(data for each in methods for data in each.training):
        seen(data).refuse_overlap(test, "test")
        seen(data).refuse_overlap(calibration, "calibration")
