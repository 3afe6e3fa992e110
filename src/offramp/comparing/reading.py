"""Read a settings file of `compare` into Settings, and check it.

Keys must be flags, values must have the types of the fields, and methods must be possible.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from offramp._support.arguments import require_path, words
from offramp._support.files import read_text
from offramp._support.find import unknown
from offramp.building.placement.flags import AUTO, exits_at, require_placement_flags
from offramp.comparing.settings import Method, Settings
from offramp.errors import BadFile, InvalidArgument

MOST_BYTES = 1 << 20  # of a settings file
MOST_NUMBER = 1e300  # a float beyond it is not meant
NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}
FORKS = ("skip", "sizes", "unrolled")  # keys of networks with forks


def read_settings(path: str | Path) -> Settings:
    """Settings from a TOML file.

    Args:
        path: of the file.

    Returns:
        Settings that have been checked as far as possible without building anything.

    Raises:
        BadFile: the file cannot be read, or is not TOML.
        UnknownName: a key is not a flag. The message has the nearest ones.
        InvalidArgument: a value is wrong.
    """
    path = require_path("file", path)
    where = str(path)
    body = _toml_of(path)
    tables = body.pop("method", None)
    if not _are_tables(tables):
        raise InvalidArgument(
            f"{where} must have a table for each method, such as [method.hinge] with recipe = "
            "'hinge', got none"
        )

    # A key of the file is a setting of the comparison, or a default for all methods.
    setting_keys = _fields_by_key(Settings, "methods")
    method_keys = _fields_by_key(Method, "name")
    values = dict[str, Any]()
    shared = dict[str, Any]()
    for key, value in body.items():
        if key not in setting_keys and key not in method_keys:
            raise unknown(key, [*setting_keys, *method_keys], f"flag in {where}")
        if key in method_keys:
            shared[key] = value
    methods = list[Method]()
    for name, table in tables.items():
        methods.append(_method(name, shared, table, where))
    for key, value in body.items():
        if key in setting_keys:
            field = setting_keys[key]
            values[field] = _value(Settings, field, value, key)
    for key in ("calibration", "test"):
        if key not in values:
            raise InvalidArgument(
                f"{where} must have {key}, such as {key} = 'cifar10:data[1000:5000]'"
            )
    settings = Settings(methods=tuple(methods), **values)

    _require_budgets(settings, "wall_clock_budget" in values, where)
    settings = replace(settings, methods=_with_starts(settings.methods, where))
    for method in settings.methods:
        _require_method(settings, method, f"[method.{method.name}] of {where}")
    cut = [method for method in settings.methods if not method.static and not method.members]
    if not cut:
        raise InvalidArgument(
            f"{where} must have a method that is cut: its plain network is the unit of cost"
        )
    return settings


def _toml_of(path: str | Path) -> dict[str, Any]:
    """The contents of a TOML file. Raises BadFile."""
    try:
        return tomllib.loads(read_text(path, most=MOST_BYTES).removeprefix("\ufeff"))
    except RecursionError as problem:  # thousands of brackets
        reason = "it is nested too deeply"
        cause: Exception = problem
    except ValueError as problem:  # also a number of 5,000 digits
        reason = " ".join(str(problem).split())
        cause = problem
    raise BadFile(
        f"{path} must be TOML, got a file that cannot be read ({reason[:200]})"
    ) from cause


def _are_tables(value: object) -> bool:
    """Whether a value is a table of tables, with at least one."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(table, dict) for table in value.values())


def _method(name: str, shared: Mapping[str, Any], table: Mapping[str, Any], where: str) -> Method:
    """A method from its table and the flags that all methods share."""
    known = _fields_by_key(Method, "name")
    for key in table.keys() - known.keys():
        raise unknown(key, known, f"flag in [method.{name}] of {where}")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InvalidArgument(
            f"the name of a method of {where} must have letters, digits, - and _ only, got {name!r}"
        )
    # A method's own model or cuts also replace the shared flags that belong to another model or to
    # other cuts.
    replaced = set[str]()
    if "model" in table or "start" in table:
        replaced |= {"weights"}
    if "start" in table:
        replaced |= {"model"}
    if "at" in table or "parts" in table:
        replaced |= {"at", "parts", "exit-of"}
        if table.get("at") != AUTO:
            replaced |= {"labelled"}
    has_forks = bool(table.keys() & set(FORKS))
    if has_forks and "at" not in table and "parts" not in table:
        replaced |= {"at", "parts", "exit-of", "labelled", "gate"}
    flags = dict[str, Any]()
    for key, value in shared.items():
        if key not in replaced:
            flags[key] = value
    flags.update(table)
    values = dict[str, Any]()
    for key, value in flags.items():
        values[known[key]] = _value(Method, known[key], value, key)
    return Method(name, **values)


def _with_starts(methods: Sequence[Method], where: str) -> tuple[Method, ...]:
    """The methods, with the model and preprocessing of another method where one starts from it."""
    by_name: dict[str, Method] = {}
    for method in methods:
        here = f"[method.{method.name}] of {where}"
        if method.start is not None:
            if method.model is not None or method.weights is not None:
                raise InvalidArgument(
                    f"{here} must have start or a model with weights, got start "
                    f"{method.start!r} and the other"
                )
            first = by_name.get(method.start)
            if first is None or first.members:
                names = [name for name, other in by_name.items() if not other.members]
                raise InvalidArgument(
                    f"start of {here} must be an earlier method that is not a ladder "
                    f"({', '.join(names) or 'none'}), got {method.start!r}"
                )
            method = replace(method, model=first.model)
            if method.preprocess == "auto":
                method = replace(method, preprocess=first.preprocess)
        by_name[method.name] = method
    return tuple(by_name.values())


def _fields_by_key(kind: type, excluded: str) -> dict[str, str]:
    """The field of each key of the file. A key is a flag: `batch-size` for `batch_size`."""
    by_key = dict[str, str]()
    for field in fields(kind):
        if field.name == excluded:
            continue
        key = field.name.replace("_", "-")
        if field.name == "arguments":
            key = "with"  # the name of the flag of fit
        by_key[key] = field.name
    return by_key


def _value(kind: type, name: str, value: Any, key: str) -> Any:
    """A value of the file in the type of its field.

    Args:
        kind: the dataclass of the field.
        name: of the field.
        value: from TOML.
        key: of the file, for the message.

    Raises:
        InvalidArgument: the value has another type.
    """
    hint = typing.get_type_hints(kind)[name]
    options: tuple[Any, ...] = (hint,)
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
    for option in options:
        if typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            if isinstance(value, list) and _are_all(value, inner):
                return tuple(value)
        elif _is(value, option):
            if option is float:
                return float(value)
            return value
    words = [_word(option) for option in options if option is not type(None)]
    raise InvalidArgument(f"{key} must be {' or '.join(words)}, got {value!r}")


def _are_all(values: list[Any], kind: type) -> bool:
    """Whether all values of a list have a type."""
    return all(_is(value, kind) for value in values)


def _is(value: Any, kind: type) -> bool:
    """Whether a value of TOML has a type. A bool is not a number, and a whole number is a float."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        # The comparison is False for NaN, so neither NaN nor infinity passes.
        return isinstance(value, (int, float)) and abs(value) <= MOST_NUMBER
    return isinstance(value, kind)


def _word(option: Any) -> str:
    """A type in words."""
    if typing.get_origin(option) is tuple:
        return f"a list of {PLURALS[typing.get_args(option)[0]]}"
    return NAMES[option]


def _require_budgets(settings: Settings, chosen: bool, where: str) -> None:
    """Raise InvalidArgument for budgets that are not possible.

    `chosen` is True if the file itself has the budget whose plans are timed.
    """
    budgets = settings.budgets
    if not budgets or min(budgets) <= 0 or len(set(budgets)) < len(budgets):
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
    """Raise InvalidArgument for a method that cannot be made, for any meaning of its names."""
    seeds = method.seeds
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InvalidArgument(
            f"the seeds of {here} must be numbers of at least 0, each once, got "
            f"{list(method.seeds)}"
        )
    if not method.gates or len(set(method.gates)) < len(method.gates):
        raise InvalidArgument(
            f"the gates of {here} must be names or 'own', each once, got {list(method.gates)}"
        )
    for member in method.members:
        if settings.method(member).members:
            raise InvalidArgument(
                f"members of {here} must not be ladders, got {member!r}. Name the methods of its "
                "members"
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
        raise InvalidArgument(f"{here} has a recipe, so it must have rows that train (train = ...)")


def _require_forks(method: Method, here: str) -> None:
    """Raise InvalidArgument for a method with forks that has other flags of cuts too."""
    forks = [name for name in FORKS if getattr(method, name)]
    if len(forks) > 1:
        raise InvalidArgument(f"{here} must have one of {', '.join(FORKS)}, got {forks}")
    for name in ("at", "parts", "static", "labelled"):
        if getattr(method, name):
            raise InvalidArgument(f"{here} must have {forks[0]} or {name}, got both")
    if method.gates != ("own",):
        raise InvalidArgument(
            f"the gates of {here} must be 'own', because gates that choose among ways are trained "
            f"with them, got {list(method.gates)}"
        )
    for size in words(method.sizes) or ():
        if not size.isdecimal():
            raise InvalidArgument(f"sizes of {here} must be pixels, such as '16,24,32'")
