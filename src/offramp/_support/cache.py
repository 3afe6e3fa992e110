"""A cache of files that only save time. They are made again if they are missing, damaged or of
another version.

The files are in `$XDG_CACHE_HOME/offramp`, or in `~/.cache/offramp`. The first line of a file has
its key and the SHA-256 of the rest. If the folder cannot be written, nothing is cached, without a
message.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from functools import cache
from pathlib import Path

# What is raised if there is no cache: `Path.home` finds no home for a user without an account, as
# in many containers.
NOWHERE = (OSError, RuntimeError)
HOURS = 24  # after which a file that was never finished is removed
MOST_BYTES = 2 * 2**30  # of all files together; the oldest are removed first
PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """The folder of the cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "offramp"
    return Path.home() / ".cache" / "offramp"


def read(key: str, *, private: bool = False) -> bytes | None:
    """Read the bytes of a key; None if there are none, or if they are damaged.

    Args:
        key: that they were written under.
        private: None also if another user could have written the file. Use it before you run what
            the file holds: a digest is no proof against someone who computes it anew.
    """
    try:
        # The owner is asked of the open file: the path may lead to another one a moment later.
        with _file(key).open("rb") as file:
            if private and not _is_private(os.fstat(file.fileno()), folder().stat()):
                return None
            content = file.read()
    except NOWHERE:
        return None
    head, _, body = content.partition(b"\n")
    if head != _head(key, body):
        return None
    with contextlib.suppress(OSError):
        os.utime(_file(key))  # the file is in use, so that `_trim` removes others first
    return body


def write(key: str, body: bytes) -> None:
    """Write the bytes of a key, if that is possible. Readers see all of them or none."""
    try:
        path = _file(key)
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
    except NOWHERE:  # a read-only folder, a full disk: it is only a cache
        return


@cache
def edition() -> str:
    """A digest of this package's own sources. As part of a key it separates the editions."""
    sha256 = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        state = file.stat()
        line = f"{file.relative_to(PACKAGE)} {state.st_size} {state.st_mtime_ns}\n"
        sha256.update(line.encode())
    return sha256.hexdigest()


def _file(key: str) -> Path:
    """The file of a key."""
    return folder() / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")


def _is_private(*states: os.stat_result) -> bool:
    """Whether only this user can write a file, and put another one in its place.

    Args:
        states: of the file and of its folder.
    """
    if not hasattr(os, "geteuid"):  # Windows has other means, which we do not read
        return False
    for state in states:
        if state.st_uid != os.geteuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
    return True


def _head(key: str, body: bytes) -> bytes:
    """The first line of a file: digests of its key and of its content."""
    key_digest = hashlib.sha256(key.encode()).hexdigest()
    body_digest = hashlib.sha256(body).hexdigest()
    return f"offramp cache {key_digest} {body_digest}".encode()


def _trim(path: Path) -> None:
    """Remove the files that were not read for longest, until the others are small enough, and what
    killed processes have left.
    """
    for file in path.glob("*.part"):
        if time.time() - file.stat().st_mtime > HOURS * 3600:
            file.unlink(missing_ok=True)
    files = [(file.stat(), file) for file in path.glob("*.bin")]
    newest_first = sorted(files, key=lambda pair: -pair[0].st_mtime)
    total = 0
    for state, file in newest_first:
        total += state.st_size
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)
