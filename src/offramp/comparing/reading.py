"""A settings file of `compare` -> Settings: keys as flags, values of the fields' types, methods
that can be made.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from offramp._support.arguments import words
from offramp._support.files import read_text
from offramp._support.find import unknown
from offramp.building.placement.flags import AUTO, exits_at, require_placement_flags
from offramp.comparing.settings import Method, Settings
from offramp.errors import BadFile, InvalidArgument

MOST_BYTES = 1 << 20
MOST_NUMBER = 1e300
FORKS = ("skip", "sizes", "unrolled")  # keys of networks with forks


def read_settings(path: str | Path) -> Settings:
    """Settings from a TOML file.

    Raises BadFile for what is no TOML, UnknownName for a key that is no flag (with the nearest),
    InvalidArgument for values.
    """
    try:
        body = tomllib.loads(read_text(path, most=MOST_BYTES).removeprefix("\ufeff"))
    except (
        ValueError,
        RecursionError,
    ) as problem:  # also a number of 5,000 digits, and as many brackets
        if isinstance(problem, RecursionError):
            reason = "it is nested too deeply"
        else:
            reason = " ".join(str(problem).split())
        raise BadFile(
            f"{path} is no TOML that can be read ({reason[:200]}); change that line"
        ) from problem
    methods = body.pop("method", None)
    if (
        not isinstance(methods, dict)
        or not methods
        or not all(isinstance(each, dict) for each in methods.values())
    ):
        raise InvalidArgument(
            f"{path} must have a table for each method, such as [method.hinge] with recipe = "
            "'hinge', got none"
        )
    own = _keys(Settings, "methods")
    ours = _keys(Method, "name")
    for key in body.keys() - own.keys() - ours.keys():
        raise unknown(key, [*own, *ours], f"flag in {path}")
    shared = {key: value for key, value in body.items() if key in ours}
    made = tuple(_method(name, shared, table, str(path)) for name, table in methods.items())
    given = {
        own[key]: _value(Settings, own[key], value, key)
        for key, value in body.items()
        if key in own
    }
    for key in ("calibration", "test"):
        if key not in given:
            raise InvalidArgument(
                f"{path} must have {key}, such as {key} = 'cifar10:data[1000:5000]'"
            )
    found = Settings(methods=made, **given)
    _require_budgets(found, "wall_clock_budget" in given, str(path))
    found = replace(found, methods=_begun(found.methods, str(path)))
    for method in found.methods:
        _require_method(found, method, f"[method.{method.name}] of {path}")
    if not any(not method.static and not method.members for method in found.methods):
        raise InvalidArgument(
            f"{path} must have a method that is cut: its plain network is the unit of cost"
        )
    return found


def _method(name: str, shared: Mapping[str, Any], table: Mapping[str, Any], where: str) -> Method:
    known = _keys(Method, "name")
    for key in table.keys() - known.keys():
        raise unknown(key, known, f"flag in [method.{name}] of {where}")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InvalidArgument(
            f"the name of a method of {where} must have letters, digits, - and _ only, got {name!r}"
        )
    # What a method says for itself replaces what was shared about another model, or about other
    # places.
    gone = {"weights"} if "model" in table or "start" in table else set[str]()
    if "start" in table:
        gone |= {"model"}
    if "at" in table or "parts" in table:
        gone |= {"at", "parts", "exit-of"} | (set() if table.get("at") == AUTO else {"labelled"})
    if "at" not in table and "parts" not in table and table.keys() & set(FORKS):
        gone |= {"at", "parts", "exit-of", "labelled", "gate"}
    merged = {key: value for key, value in shared.items() if key not in gone} | dict(table)
    return Method(
        name,
        **{known[key]: _value(Method, known[key], value, key) for key, value in merged.items()},
    )


def _begun(methods: Sequence[Method], where: str) -> tuple[Method, ...]:
    """The methods, where one that starts with another's network has the name of its model, and its
    preprocessing.
    """
    found: dict[str, Method] = {}
    for method in methods:
        here = f"[method.{method.name}] of {where}"
        if method.start is not None:
            if method.model is not None or method.weights is not None:
                raise InvalidArgument(
                    f"{here} must have start or a model with weights, got start "
                    f"{method.start!r} and the other"
                )
            first = found.get(method.start)
            if first is None or first.members:
                told = ", ".join(name for name, each in found.items() if not each.members) or "none"
                raise InvalidArgument(
                    f"start of {here} must be an earlier method that is not a ladder "
                    f"({told}), got {method.start!r}"
                )
            if method.preprocess == "auto":
                preprocess = first.preprocess
            else:
                preprocess = method.preprocess
            method = replace(method, model=first.model, preprocess=preprocess)
        found[method.name] = method
    return tuple(found.values())


def _keys(kind: type, but: str) -> dict[str, str]:
    """Flag -> field."""
    names = {
        field.name: field.name.replace("_", "-") for field in fields(kind) if field.name != but
    }
    return {("with" if name == "arguments" else flag): name for name, flag in names.items()}


def _value(kind: type, name: str, value: Any, key: str) -> Any:
    """A value as its field has it. Raises InvalidArgument for another type."""
    hint = typing.get_type_hints(kind)[name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            if isinstance(value, list) and all(_is(each, inner) for each in value):
                return tuple(value)
        elif _is(value, option):
            return float(value) if option is float else value
    words = " or ".join(_word(option) for option in options if option is not type(None))
    raise InvalidArgument(f"{key} must be {words}, got {value!r}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= MOST_NUMBER  # neither NaN nor infinite
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _word(option: Any) -> str:
    if typing.get_origin(option) is tuple:
        return (
            "a list of "
            + {str: "texts", int: "whole numbers", float: "numbers"}[typing.get_args(option)[0]]
        )
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[option]


def _require_budgets(settings: Settings, chosen: bool, where: str) -> None:
    """Raise for budgets that no plan could have. chosen: the file itself says which one is
    timed.
    """
    budgets = settings.budgets
    if not budgets or min(budgets) <= 0 or len({*budgets}) < len(budgets):
        raise InvalidArgument(
            f"the budgets of {where} must be shares of the plain cost above 0, each once, got "
            f"{list(budgets)}"
        )
    if chosen and settings.wall_clock_budget not in budgets:
        raise InvalidArgument(
            f"the wall-clock-budget of {where} must be one of the budgets {list(budgets)}, "
            f"got {settings.wall_clock_budget:g}"
        )


def _require_method(settings: Settings, method: Method, here: str) -> None:
    """Raise for a method that cannot be made, whatever its names stand for."""
    if not method.seeds or min(method.seeds) < 0 or len({*method.seeds}) < len(method.seeds):
        raise InvalidArgument(
            f"the seeds of {here} must be numbers of at least 0, each once, got "
            f"{list(method.seeds)}"
        )
    if not method.gates or len({*method.gates}) < len(method.gates):
        raise InvalidArgument(
            f"the gates of {here} must be names or 'own', each once, got {list(method.gates)}"
        )
    for member in method.members:
        if settings.method(member).members:
            raise InvalidArgument(
                f"{here} stacks {member}, which is a ladder itself; name the methods of its members"
            )
    if method.members:
        return
    if method.model is None:
        raise InvalidArgument(f"{here} must have a model, such as model = 'offramp:resnet20'")
    if method.forks:
        _require_forks(method, here)
    elif method.settings:
        raise InvalidArgument(f"{here}: settings belong to skip, sizes or unrolled")
    elif not method.static:
        try:
            require_placement_flags(method.at, method.parts, method.labelled)
            exits_at(method.at, method.exit, method.exit_of)
        except InvalidArgument as problem:
            raise InvalidArgument(f"{here}: {problem}") from problem
    if method.data is not None and not method.layer:
        raise InvalidArgument(
            f"{here} has data, the rows for layers that use gradients, and must have layer = ..."
        )
    if method.recipe is not None and method.train is None:
        raise InvalidArgument(f"{here} has a recipe and must have the rows that train: train = ...")


def _require_forks(method: Method, here: str) -> None:
    """Raise for a method with forks that is something else as well."""
    given = [name for name in FORKS if getattr(method, name)]
    if len(given) > 1:
        raise InvalidArgument(f"{here} must have one of {', '.join(FORKS)}, got {given}")
    for name in ("at", "parts", "static", "labelled"):
        if getattr(method, name):
            raise InvalidArgument(f"{here} must have {given[0]} or {name}, got both")
    if method.gates != ("own",):
        raise InvalidArgument(
            f"the gates of {here} must be 'own', because gates that choose among ways are trained "
            f"with them, got {list(method.gates)}"
        )
    for size in words(method.sizes) or ():
        if not size.isdecimal():
            raise InvalidArgument(f"sizes of {here} must be pixels, such as '16,24,32'")
