"""A digest of an object's computation, without pickling it.

An object is taken apart as `copy` would do it (`__reduce_ex__`), and its parts are hashed: the
parameters and fitted arrays of an estimator, the code and captured values of a function. Two things
are not covered: the code of imported modules, of which only name and version count; and anything
outside of Python, such as a file that is read later.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from offramp.errors import InvalidArgument


def identity_of(thing: object, stated: str | None, what: str) -> bytes:
    """The 32 bytes of an identity.

    Args:
        thing: the object that computes.
        stated: a name and version from the user. If there is one, nothing else counts.
        what: a description of the object, for messages.

    Raises:
        InvalidArgument: something in the object has no content that can be hashed.
    """
    if stated is not None:
        # "said" is part of saved identities
        return hashlib.sha256(f"said {stated}".encode()).digest()
    try:
        return digest_of(thing)
    except (TypeError, ValueError, RecursionError, AttributeError) as problem:
        raise InvalidArgument(
            f"{what} has something whose content cannot be hashed ({problem}). Use "
            "identity='name and version'"
        ) from problem


def digest_of(thing: object) -> bytes:
    """SHA-256 of an object's content. Raises TypeError for an object without content, such as a
    lock or an open file.
    """
    mark = hashlib.sha256()
    _add(mark, thing, {}, [])
    return mark.digest()


def _add(mark: Any, thing: Any, seen: dict[int, int], held: list[Any]) -> None:
    """Hash one object into `mark`.

    Args:
        mark: the hash.
        thing: the object.
        seen: numbers of the objects met so far, by their ids. An object that is met again counts by
            its number, which also ends cycles.
        held: these objects, which must stay alive so that no id is used twice.
    """
    # Plain values: equal ones are the same, so they need no number.
    if thing is None or thing is Ellipsis or isinstance(thing, (bool, int, complex)):
        mark.update(f"{type(thing).__name__} {thing!r};".encode())
        return
    if isinstance(thing, float):
        mark.update(b"float " + struct.pack("<d", thing))
        return
    if isinstance(thing, str):
        raw = thing.encode("utf-8", "surrogatepass")
        mark.update(f"str {len(raw)};".encode() + raw)
        return
    if isinstance(thing, (bytes, bytearray, memoryview)):
        raw = bytes(thing)
        mark.update(f"bytes {len(raw)};".encode() + raw)
        return
    if id(thing) in seen:
        mark.update(f"again {seen[id(thing)]};".encode())
        return
    seen[id(thing)] = len(seen)
    held.append(thing)
    # Everything else, by its kind.
    if isinstance(thing, ModuleType):
        mark.update(f"module {thing.__name__} {getattr(thing, '__version__', '')};".encode())
    elif isinstance(thing, type):
        mark.update(
            f"class {thing.__module__} {thing.__qualname__} {_version(thing.__module__)};".encode()
        )
    elif isinstance(thing, (np.ndarray, np.generic)):
        _add_array(mark, np.asarray(thing), seen, held)
    elif isinstance(thing, np.dtype):
        mark.update(f"dtype {thing!r};".encode())
    elif isinstance(thing, (list, tuple)):
        mark.update(f"{type(thing).__name__} {len(thing)};".encode())
        for item in thing:
            _add(mark, item, seen, held)
    elif isinstance(thing, dict):
        mark.update(f"dict {len(thing)};".encode())
        for key, value in thing.items():
            _add(mark, key, seen, held)
            _add(mark, value, seen, held)
    elif isinstance(thing, (set, frozenset)):
        # The order of a set differs from process to process, so its digests are sorted.
        digests = sorted(map(digest_of, thing))
        mark.update(f"set {len(thing)};".encode() + b"".join(digests))
    elif isinstance(thing, FunctionType):
        _add_function(mark, thing, seen, held)
    elif isinstance(thing, CodeType):
        _add_code(mark, thing, seen, held)
    elif isinstance(thing, MethodType):
        mark.update(b"method;")
        _add(mark, thing.__func__, seen, held)
        _add(mark, thing.__self__, seen, held)
    elif isinstance(thing, BuiltinFunctionType) and isinstance(
        thing.__self__, (ModuleType, type(None))
    ):
        mark.update(f"builtin {thing.__module__} {thing.__qualname__};".encode())
    else:
        _add_object(mark, thing, seen, held)


def _add_array(mark: Any, array: Any, seen: dict[int, int], held: list[Any]) -> None:
    mark.update(f"array {array.dtype!r} {array.shape};".encode())
    if array.dtype.names:  # field by field, because the bytes between fields are arbitrary
        for name in array.dtype.names:
            _add_array(mark, array[name], seen, held)
    elif array.dtype.hasobject:
        for item in array.ravel().tolist():
            _add(mark, item, seen, held)
    else:
        mark.update(np.ascontiguousarray(array).tobytes())


def _add_function(mark: Any, function: FunctionType, seen: dict[int, int], held: list[Any]) -> None:
    """Code, defaults, captured values, and the globals that the code names. A library function
    counts by its name and version.
    """
    module = function.__module__ or ""
    if _installed(module):
        mark.update(f"function {module} {function.__qualname__} {_version(module)};".encode())
        return
    mark.update(b"function;")
    _add(mark, function.__code__, seen, held)
    _add(mark, function.__defaults__, seen, held)
    _add(mark, function.__kwdefaults__, seen, held)
    for cell in function.__closure__ or ():
        _add(mark, cell.cell_contents, seen, held)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            mark.update(f"global {name};".encode())
            _add(mark, function.__globals__[name], seen, held)


def _add_code(mark: Any, code: CodeType, seen: dict[int, int], held: list[Any]) -> None:
    # Without file names and line numbers, which do not change the computation.
    mark.update(b"code;")
    for part in (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_argcount):
        _add(mark, part, seen, held)
    for constant in code.co_consts:
        _add(mark, constant, seen, held)


def _add_object(mark: Any, thing: Any, seen: dict[int, int], held: list[Any]) -> None:
    """Class and state of any object that could be copied. Raises TypeError for others."""
    reduced = thing.__reduce_ex__(4)
    mark.update(b"object;")
    held.append(reduced)
    if isinstance(reduced, str):
        mark.update(f"name {reduced};".encode())
        return
    maker, arguments, *rest = reduced
    _add(mark, maker, seen, held)
    _add(mark, arguments, seen, held)
    for number, part in enumerate(rest):
        # The fourth and fifth parts are iterators over the items of a list and of a dict.
        if number in (1, 2) and part is not None:
            part = list(part)
        _add(mark, part, seen, held)


def _names(code: CodeType) -> set[str]:
    """The names that code and the functions in it look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _installed(module: str) -> bool:
    """Whether a module belongs to a package with a version, and is not the user's own file."""
    return bool(_version(module)) or module.partition(".")[0] in sys.stdlib_module_names


def _version(module: str) -> str:
    package = sys.modules.get(module.partition(".")[0])
    return str(getattr(package, "__version__", ""))
