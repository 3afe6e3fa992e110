"""A digest of what an object would compute, without pickling it: plain values, arrays, code, and
what an object is of.

Any object is taken apart as `copy` would do it (`__reduce_ex__`), and what comes out is hashed:
parameters and fitted arrays of an estimator, code and captured values of a function. Two things
cannot be seen: what a module does that is imported, beyond its name and version, and what lies
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


def identity_of(thing: object, said: str | None, what: str) -> bytes:
    """The 32 bytes of an identity.

    Args:
        thing: what computes.
        said: a name and version that its user gave; then nothing else counts.
        what: what it is called in an error.

    Raises:
        InvalidArgument: something in it has no content that can be hashed.
    """
    if said is not None:
        return hashlib.sha256(f"said {said}".encode()).digest()
    try:
        return digest_of(thing)
    except (TypeError, ValueError, RecursionError, AttributeError) as problem:
        raise InvalidArgument(
            f"{what} holds something whose content cannot be told apart ({problem}); say what it "
            f"is with "
            "identity='name and version'"
        ) from problem


def digest_of(thing: object) -> bytes:
    """SHA-256 of an object's content. Raises TypeError for what has none, such as a lock or an open
    file.
    """
    mark = hashlib.sha256()
    _add(mark, thing, {}, [])
    return mark.digest()


def _add(mark: Any, thing: Any, seen: dict[int, int], held: list[Any]) -> None:
    """Hash one object into `mark`; `seen` numbers those met before, `held` keeps them alive so that
    ids stay theirs.
    """
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
        for each in thing:
            _add(mark, each, seen, held)
    elif isinstance(thing, dict):
        mark.update(f"dict {len(thing)};".encode())
        for key, value in thing.items():
            _add(mark, key, seen, held)
            _add(mark, value, seen, held)
    elif isinstance(thing, (set, frozenset)):
        mark.update(
            f"set {len(thing)};".encode() + b"".join(sorted(digest_of(each) for each in thing))
        )
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
    if array.dtype.names:  # field by field: what lies between the fields is whatever was in memory
        for name in array.dtype.names:
            _add_array(mark, array[name], seen, held)
    elif array.dtype.hasobject:
        for each in array.ravel().tolist():
            _add(mark, each, seen, held)
    else:
        mark.update(np.ascontiguousarray(array).tobytes())


def _add_function(mark: Any, function: FunctionType, seen: dict[int, int], held: list[Any]) -> None:
    """Code, defaults, captured values, and the globals that the code names; of library functions
    name and version.
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
        # The third and fourth of a reduction are iterators over the items of a list and of a dict.
        content = list(part) if number in (1, 2) and part is not None else part
        _add(mark, content, seen, held)


def _names(code: CodeType) -> set[str]:
    """The names that code and the functions in it look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _installed(module: str) -> bool:
    """Whether a module is of a package that has a version, rather than the user's own file."""
    return bool(_version(module)) or module.partition(".")[0] in sys.stdlib_module_names


def _version(module: str) -> str:
    package = sys.modules.get(module.partition(".")[0])
    return str(getattr(package, "__version__", ""))
