"""Files and folders are replaced whole, and only if offramp wrote them.

New content is written to a temporary folder next to the target, until it is complete. Then it
replaces the target in one step. A reader sees the old content or the new one, even if the writer is
killed at any moment.

    .<name>.offramp-<random>.part/    locked by its writer; without a lock it was left behind by a
                                      killed writer
        new                           the new content: a folder, or a folder around one file
        old                           the replaced folder, on systems that cannot exchange two
                                      folders

How a folder replaces another:
    Linux, macOS    both are exchanged in one step (RENAME_EXCHANGE, RENAME_SWAP)
    elsewhere       two renames; a reader who finds no folder puts the old one back (`restored`)

The next writer removes what a killed one left behind. This file does not know what offramp writes.
Callers pass a check (`require_own`), see offramp._support.ownership.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from offramp._support.arguments import require_path
from offramp.errors import BadFile, OfframpError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and what killed writers left stays
    fcntl = None  # type: ignore[assignment]

PART = ".part"
MARK = "offramp-"
LONGEST = 120  # bytes of a target's name in the name of its temporary folder
HEAD = 1 << 16  # bytes at the beginning of a file in which the mark of its writer is looked for
PATIENCE = 10.0  # seconds to wait for the lock of a folder; its holder needs some milliseconds
PAUSE = 0.005  # seconds between two tries to get a lock
RETRIES = 50  # of a reader, while a folder is replaced again and again

RequireOwn = Callable[[Path], None]
T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: str | Path, *, mark: bytes | None = None, what: str = "file") -> Iterator[Path]:
    """Yield a temporary path. It is renamed to `path` when the block ends without an error, and
    removed otherwise.

    If `path` is a link, the file behind it is replaced.

    Args:
        path: the file.
        mark: bytes in the first 64 KB of every file of this kind. An existing file without them is
            refused. None replaces any file.
        what: the kind of the file, for messages, such as "plan".

    Raises:
        BadFile: the file cannot be written, is not a regular file, or is of another kind.
    """
    target = Path(os.path.realpath(require_path("path", path)))
    require_own_file(path, mark, what)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(target) as part:
            (part / "new").mkdir()  # a folder of its own, which the block may lock
            temporary = part / "new" / target.name
            yield temporary
            if temporary.exists():  # a block that wrote nothing replaces nothing
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)
    except OSError as problem:
        raise unwritable(target, problem) from problem


@contextlib.contextmanager
def replacing_folder(path: str | Path, require_own: RequireOwn) -> Iterator[Path]:
    """Yield a temporary folder. It replaces `path` when the block ends without an error.

    Several writers at the same time write to separate folders. The last one to finish wins.

    Args:
        path: the folder. An empty or an earlier folder of offramp is replaced whole.
        require_own: raises BadFile for a folder that must not be replaced.

    Raises:
        BadFile: the folder cannot be written, or `require_own` refuses the existing one.
    """
    target = require_path("folder", path)
    require_own(restored(target, require_own))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(target) as part:
            temporary = part / "new"
            temporary.mkdir()
            yield temporary
            with _locked(target.parent):
                _take_place(temporary, target, require_own)
    except OSError as problem:
        raise unwritable(target, problem) from problem


def restored(folder: Path, require_own: RequireOwn) -> Path:
    """Put a folder back if a writer was killed between two renames.

    Args:
        folder: the folder.
        require_own: raises BadFile for a folder of another kind. It is then not put back.

    Returns:
        The same folder.
    """
    if os.path.lexists(folder) or not folder.parent.is_dir():
        return folder
    with _locked(folder.parent):  # a living writer holds the lock between its renames
        for part in _parts(folder):
            if os.path.lexists(folder):
                break
            with contextlib.suppress(OfframpError, OSError):
                require_own(part / "old")
                os.rename(part / "old", folder)
                _discard(part)
    return folder


def read_whole(folder: Path, read: Callable[[Path], T], require_own: RequireOwn) -> T:
    """Read a folder of several files, so that all of them are old or all of them are new.

    If the folder is replaced during the read, its files may not fit together. It is then read
    again.

    Args:
        folder: the folder.
        read: reads it, and raises OfframpError if the files do not fit together.
        require_own: as for `restored`.

    Returns:
        The result of `read`.
    """
    for _ in range(RETRIES):
        before = _identity(restored(folder, require_own))
        try:
            return read(folder)
        except OfframpError:
            if _identity(folder) == before:
                raise
    return read(folder)


def require_own_file(path: str | Path, mark: bytes | None, what: str) -> None:
    """Raise BadFile for an existing file that offramp did not write. An empty file may be replaced.

    Args:
        path: the file.
        mark: bytes near the beginning of every file of this kind; None for any file.
        what: the kind of the file, for messages.
    """
    target = Path(path)
    try:
        if not target.exists() or target.is_dir():  # the rename refuses a folder later
            return
        if not target.is_file():
            raise BadFile(f"{path} must be a regular file, got a device, a pipe or a socket")
        if mark is None or target.stat().st_size == 0:
            return
        with target.open("rb") as file:
            head = file.read(HEAD)
    except OSError as problem:
        raise unwritable(target, problem) from problem
    if mark not in head:
        raise BadFile(
            f"{path} must be a new file or an earlier {what} of offramp, got something else. Name "
            f"another file, or remove it first"
        )


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Raise BadFile for a path that cannot be written, before the work and not after it.

    Args:
        path: the file or folder.
        folder: whether it is a folder, which may exist already.
    """
    # the nearest folder that exists, in which the file or the folders of the path will be made
    home = path.absolute().parent
    if folder and os.path.lexists(path):
        home = path
    while not os.path.lexists(home):
        home = home.parent
    number: int | None = None
    if path.is_dir() and not folder:
        number = errno.EISDIR
    elif not home.is_dir():
        number = errno.ENOTDIR
    elif not os.access(home, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number is not None:
        raise unwritable(path, OSError(number, os.strerror(number)))


def unwritable(path: Path, problem: OSError) -> BadFile:
    """Make the error for a path that cannot be written."""
    reason = problem.strerror or problem
    return BadFile(f"cannot write {path} ({reason}). Choose a folder that you may write to")


# Temporary folders


@contextlib.contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A temporary folder for a target. It is locked while it is in use, and removed at the end."""
    with _locked(target.parent):
        _remove_dead(target)
        prefix = f".{_stem(target)}.{MARK}"
        part = Path(tempfile.mkdtemp(prefix=prefix, suffix=PART, dir=target.parent))
        handle = _lock_of(part)
    try:
        yield part
    finally:
        with _locked(target.parent):
            _discard(part)
        if handle is not None:
            os.close(handle)


def _remove_dead(target: Path) -> None:
    """Remove the temporary folders of killed writers of a target. They are those without a lock.

    The caller holds the lock of the parent folder. So a folder that its writer has just made, and
    not locked yet, is never seen here.
    """
    for part in _parts(target):
        handle = _lock_of(part)
        if handle is None:  # in use, or the system has no locks
            continue
        only_copy = (part / "old").exists() and not os.path.lexists(target)
        if not only_copy:
            _discard(part)
        os.close(handle)


def _parts(target: Path) -> list[Path]:
    """The temporary folders of a target, the newest first. Their names are offramp's alone."""
    start = f".{_stem(target)}.{MARK}"
    dated = list[tuple[int, Path]]()
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            ours = entry.name.startswith(start) and entry.name.endswith(PART)
            if ours and entry.is_dir(follow_symlinks=False):
                dated.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
    return [path for _, path in sorted(dated, reverse=True)]


def _stem(target: Path) -> str:
    """The name of a target, shortened if the name of its temporary folder would be too long for a
    file system.
    """
    name = target.name
    raw = os.fsencode(name)
    if len(raw) <= LONGEST:
        return name
    return raw[:80].decode("utf-8", "ignore") + hashlib.sha256(raw).hexdigest()[:12]


def _discard(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)


# Locks


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Go on without it if the system has no locks, or if another process
    does not release it in time.
    """
    handle = _lock_of(folder, wait=PATIENCE)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock_of(folder: Path, *, wait: float = 0.0) -> int | None:
    """An open handle that locks a folder until it is closed or its process ends.

    Args:
        folder: the folder.
        wait: seconds to wait for another handle.

    Returns:
        None if the lock cannot be had.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(PAUSE)
                continue
        except OSError:  # a file system without locks
            pass
        os.close(handle)
        return None


# Replacing the target


def _take_place(new: Path, target: Path, require_own: RequireOwn) -> None:
    """Move the folder `new` to `target`. The replaced folder stays in the temporary folder. The
    caller holds the lock.
    """
    require_own(target)
    if not os.path.lexists(target):
        os.rename(new, target)
        return
    if exchange(new, target):
        try:
            require_own(new)  # the old folder: a file may have been put into it in the meantime
        except BaseException:
            exchange(new, target)
            raise
        return
    old = new.with_name("old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Returns False if the system or the file system cannot."""
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number))


def _exchange_call() -> Callable[[bytes, bytes], Any] | None:
    """The system's own exchange of two paths, which returns 0 if it worked; None without one."""
    if sys.platform.startswith("linux"):
        here = -100  # AT_FDCWD: paths are relative to the current folder
        flag = 2  # RENAME_EXCHANGE
        renameat2: Any = _c_function("renameat2")
        if renameat2 is None:
            return None
        return lambda one, other: renameat2(here, one, here, other, flag)
    if sys.platform == "darwin":
        swap = 2  # RENAME_SWAP
        renamex_np: Any = _c_function("renamex_np")
        if renamex_np is None:
            return None
        return lambda one, other: renamex_np(one, other, swap)
    return None


def _c_function(name: str) -> Any:
    """A function of the C library; None if it does not have it."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Numbers that differ between a folder and another one that replaces it."""
    try:
        about = os.stat(folder)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_mtime_ns


def is_regular(path: Path) -> bool:
    """Whether a path is a regular file itself, and not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
