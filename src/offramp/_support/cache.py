"""Files that only save time: made again whenever they are missing, damaged or of another version.

They are below `$XDG_CACHE_HOME/offramp`, or `~/.cache/offramp`. A file is its own proof: the first
line names what it is and the SHA-256 of the rest. Where nothing can be written, nothing is kept,
and nobody is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

MOST_BYTES = 2 * 2**30  # of all files together; the oldest go first
PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where the files are."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "offramp"


def read(key: str, *, private: bool = False) -> bytes | None:
    """What is kept under a key; None where that is nothing, or is not what was written.

    Args:
        key: that it was written under.
        private: None also where another user could have written the file. Ask for it before you run
            what the file holds: a digest is no proof against someone who computes it anew.
    """
    try:
        content = _file(key).read_bytes()
    except OSError:
        return None
    if private and not _is_private(_file(key)):
        return None
    head, _, body = content.partition(b"\n")
    if head != _head(key, body):
        return None
    with contextlib.suppress(OSError):
        os.utime(_file(key))  # the oldest are those that nobody has read for longest
    return body


def write(key: str, body: bytes) -> None:
    """Keep bytes under a key, where that is possible. Readers see all of them or none."""
    path = _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_head(key, body) + b"\n" + body)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        _trim(path.parent)
    except OSError:  # a read-only folder, a full disk: it is only a cache
        return


@cache
def edition() -> str:
    """A digest of this package's own sources: another edition writes other files."""
    mark = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        state = file.stat()
        mark.update(f"{file.relative_to(PACKAGE)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return mark.hexdigest()


def _file(key: str) -> Path:
    return folder() / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")


def _is_private(path: Path) -> bool:
    """Whether only this user can write a file, and put another one in its place."""
    if not hasattr(os, "geteuid"):  # Windows has other means, which we do not read
        return False
    for place in (path, path.parent):
        state = place.stat()
        if state.st_uid != os.geteuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
    return True


def _head(key: str, body: bytes) -> bytes:
    whose = hashlib.sha256(key.encode()).hexdigest()
    return f"offramp cache {whose} {hashlib.sha256(body).hexdigest()}".encode()


def _trim(path: Path) -> None:
    """Remove the files that nobody has read for longest, until the rest is small enough."""
    states = sorted(
        ((file.stat(), file) for file in path.glob("*.bin")), key=lambda pair: -pair[0].st_mtime
    )
    total = 0
    for state, file in states:
        total += state.st_size
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)
