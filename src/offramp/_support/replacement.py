"""Files and folders that are replaced whole, and never somebody else's.

What is written stands in a temporary folder beside its place until it is complete, and then takes
its place in one step. A reader meets the old one or the new one, also when the writer is killed at
any moment.

    .<name>.offramp-<random>.part/    locked by its writer, so that one without a lock is known to
                                      be left behind
        new                           what is being written: a folder, or a folder around one file
        old                           the folder that was replaced, where the system cannot exchange
                                      two folders

How a folder takes the place of another:
    Linux, macOS    the two are exchanged in one step (RENAME_EXCHANGE, RENAME_SWAP)
    elsewhere       two renames; a reader who finds nothing at the place puts the old folder back
                    (`restored`)

The next writer removes what a killed one left. No check in here knows what offramp writes: callers
hand one in (`require_own`), see offramp._support.ownership.
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
LONGEST = 120  # bytes of a name that stand in the name of its temporary folder
HEAD = 1 << 16  # bytes at the beginning of a file by which its writer is recognised
PATIENCE = 10.0  # seconds to wait for the lock of a folder; its holder needs some milliseconds
PAUSE = 0.005
RETRIES = 50  # of a reader while a folder is replaced again and again

RequireOwn = Callable[[Path], None]
T = TypeVar("T")


@contextlib.contextmanager
def replacing(path: str | Path, *, mark: bytes | None = None, what: str = "file") -> Iterator[Path]:
    """Yield a temporary path near `path`; it is renamed into place when the block ends well, else
    removed.

    A link is followed: the file that it names is replaced.

    Args:
        path: where the file shall be.
        mark: bytes in the first 64 KB of every file of this kind; a file without them is somebody
            else's and is kept. None replaces whatever is there.
        what: what offramp writes there, for the message, such as "plan".

    Raises:
        BadFile: the place cannot be written, is no regular file, or holds somebody else's file.
    """
    target = Path(os.path.realpath(require_path("path", path)))
    require_own_file(path, mark, what)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part_of(target) as part:
            (part / "new").mkdir()  # of its own, so that what writes there may lock it
            temporary = part / "new" / target.name
            yield temporary
            if temporary.exists():  # a block that wrote nothing replaces nothing
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)
    except OSError as problem:
        raise unwritable(target, problem) from problem


@contextlib.contextmanager
def replacing_folder(path: str | Path, require_own: RequireOwn) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` when the block ends
    well.

    Several writers at once each write their own; the last one to finish stays.

    Args:
        path: where the folder shall be; an empty or an earlier folder of ours is replaced whole.
        require_own: raises BadFile for a folder that must not be replaced.

    Raises:
        BadFile: the place cannot be written, or `require_own` refuses what is there.
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
    """The folder; the old one is put back where a writer was killed between two renames.

    Args:
        folder: the place.
        require_own: raises BadFile for a folder that is not of the right kind, which is then left
            alone.
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
    """What `read` makes of a folder of several files, all of them the old ones or all of them the
    new ones.

    A folder that is replaced while it is read gives files that do not fit together: it is read
    again then.
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
    """Raise BadFile where something is at `path` that offramp did not write as a `what`. An empty
    file is nobody's.
    """
    folder = Path(path)
    try:
        if not folder.exists() or folder.is_dir():  # a folder is refused when it is to be replaced
            return
        if not folder.is_file():
            raise BadFile(f"{path} is no regular file; name another one")
        if mark is None or folder.stat().st_size == 0:
            return
        with folder.open("rb") as file:
            head = file.read(HEAD)
    except OSError as problem:
        raise unwritable(folder, problem) from problem
    if mark not in head:
        raise BadFile(
            f"{path} exists and is no {what} that offramp wrote; name another file, or remove it "
            f"first"
        )


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Raise BadFile for a place that cannot be written, before the work is done and not after it.

    folder: what is to be there is a folder, which may exist already.
    """
    homes = [path, *path.absolute().parents] if folder else [*path.absolute().parents]
    home = next(each for each in homes if os.path.lexists(each))
    wrong = None
    if path.is_dir() and not folder:
        wrong = errno.EISDIR
    elif not home.is_dir():
        wrong = errno.ENOTDIR
    elif not os.access(home, os.W_OK | os.X_OK):
        wrong = errno.EACCES
    if wrong is not None:
        raise unwritable(path, OSError(wrong, os.strerror(wrong)))


def unwritable(path: Path, problem: OSError) -> BadFile:
    """The error for a place that cannot be written."""
    return BadFile(
        f"cannot write {path}: {problem.strerror or problem}; choose a folder that you may write to"
    )


# Temporary folders


@contextlib.contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A temporary folder for what shall be at `target`, locked while it is in use, and gone in the
    end.
    """
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
    """Remove the temporary folders of killed writers of `target`: those that nobody locks.

    Called under the lock of the folder around, so that a part whose writer has not locked it yet is
    not seen.
    """
    for part in _parts(target):
        handle = _lock_of(part)
        if handle is None:  # in use, or the system has no locks and nobody can tell
            continue
        only_copy = (part / "old").exists() and not os.path.lexists(target)
        if not only_copy:
            _discard(part)
        os.close(handle)


def _parts(target: Path) -> list[Path]:
    """Temporary folders of a place, the newest first. Nobody else gives a folder such a name."""
    start = f".{_stem(target)}.{MARK}"
    found = list[tuple[int, Path]]()
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            ours = entry.name.startswith(start) and entry.name.endswith(PART)
            if ours and entry.is_dir(follow_symlinks=False):
                found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
    return [path for _, path in sorted(found, reverse=True)]


def _stem(target: Path) -> str:
    """The name of a place, shortened where a name with our mark would be too long for a file
    system.
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
    """Hold the lock of a folder; where the system has none, or somebody keeps it for long, go on
    without.
    """
    handle = _lock_of(folder, wait=PATIENCE)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock_of(folder: Path, *, wait: float = 0.0) -> int | None:
    """An open handle that locks a folder, until it is closed or its process ends; None where it is
    not to be had.

    wait: seconds, while another handle has it.
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


# Taking the place


def _take_place(new: Path, target: Path, require_own: RequireOwn) -> None:
    """Put the folder `new` at `target`; what was there stays in the temporary folder. Called under
    the lock.
    """
    require_own(target)
    if not os.path.lexists(target):
        os.rename(new, target)
        return
    if exchange(new, target):
        try:
            require_own(new)  # that was at `target`: somebody may have put a file there since
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
    """Exchange two folders in one step; False where the system or the file system cannot do it."""
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
    """The system's own exchange of two paths, which gives 0 where it worked."""
    if sys.platform.startswith("linux"):
        name, here, flag = "renameat2", -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    elif sys.platform == "darwin":
        name, here, flag = "renamex_np", None, 2  # RENAME_SWAP
    else:
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), name, None)  # not in every C library
    if function is None:
        return None
    if here is None:
        return lambda one, other: function(one, other, flag)
    return lambda one, other: function(here, one, here, other, flag)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from another one that takes its place."""
    try:
        about = os.stat(folder)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_mtime_ns


def is_regular(path: Path) -> bool:
    """Whether a path is a regular file itself, and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
