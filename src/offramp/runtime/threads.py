"""On how many of torch's threads a stage runs, for the thread that calls and for no other.

With several threads every layer ends when the slowest of them does. If other programs keep the
cores busy, a thread waits for its turn in every layer. The time of a batch then follows the number
of layers and not the number of rows, and a small batch may take fifty times as long as on one
thread. Which number is faster depends on the machine of this moment, so it is measured on the
batches themselves: see `_Record`.

`torch.set_num_threads` is not used for this. It sets the number of the calling thread, and also the
number with which all threads start that have not computed yet. OpenMP's own function sets that of
the calling thread alone.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

RECENT = 8  # timings that count
TRIALS = 2  # timings after which the other number may be chosen
SOONEST = 32  # batches after a trial before the next one
LATEST = 1024  # the same, after several trials that changed nothing
CHANGED = 2.0  # a mean that rises or falls by this factor calls for a trial
A_CORE = 0.9  # the share of a core that a thread gets if a core is free for it

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Libraries:
    """What sets the threads of the calling thread: OpenMP, and MKL where torch has it."""

    openmp: Callable[[int], None]
    mkl: Callable[[int], int] | None

    def set(self, count: int) -> int:
        """Use so many threads from now on. Returns what MKL had; 0 if it follows OpenMP."""
        self.openmp(count)
        return self.mkl(count) if self.mkl is not None else 0

    def restore(self, count: int, of_mkl: int) -> None:
        """Undo `set`."""
        self.openmp(count)
        if self.mkl is not None:
            self.mkl(of_mkl)


@cache
def _libraries() -> _Libraries | None:
    """The functions in the libraries that torch loaded; None if torch has no OpenMP."""
    if "OpenMP" not in torch.__config__.parallel_info().partition("parallel backend:")[2]:
        return None
    # Looking a name up in a library also finds it in those that the library needs.
    for file in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            library = ctypes.CDLL(str(file))
            openmp = library.omp_set_num_threads
        except (OSError, AttributeError):  # no such file, or Windows, which looks nowhere else
            continue
        openmp.argtypes = [ctypes.c_int]
        openmp.restype = None
        mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)
        if mkl is not None:
            mkl.argtypes = [ctypes.c_int]
            mkl.restype = ctypes.c_int
        return _Libraries(openmp, mkl)
    return None


def can_set() -> bool:
    """Whether the threads of the calling thread can be set without changing those of others."""
    return _libraries() is not None


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads in the calling thread. Other threads keep theirs.

    Args:
        count: at least 1. Where `can_set` is False, nothing changes.
    """
    libraries = _libraries()
    # The question also makes torch set up this thread, which otherwise would happen inside.
    before = torch.get_num_threads()
    if libraries is None or count == before:
        yield
        return
    of_mkl = libraries.set(count)
    try:
        yield
    finally:
        libraries.restore(before, of_mkl)


class MeasuredThreads:
    """Chooses between one thread and all of them, for each stage and for batches of similar size.

    Any number of threads may call at once. If two of them note a timing at the same moment, a
    choice may come one batch later.
    """

    def __init__(self) -> None:
        # by stage, number of binary digits of its rows, and torch's threads in the calling thread
        self._records: dict[tuple[str, int, int], _Record] = {}

    def __call__(
        self, stage: str, rows: int, compute: Callable[[], Result], *, trial: bool = True
    ) -> Result:
        """Run a stage.

        Args:
            stage: its name.
            rows: of the batch, at least 1.
            compute: runs it.
            trial: whether a number of threads may be tried on this batch that may be slower.
        """
        most = torch.get_num_threads()
        if most == 1 or not can_set():
            return compute()
        key = (stage, rows.bit_length(), most)
        record = self._records.get(key)
        if record is None:
            record = self._records.setdefault(key, _Record(most))
        count = record.next() if trial else record.known()
        with on_threads(count):
            start = time.perf_counter()
            computing = time.thread_time()
            result = compute()
            computing = time.thread_time() - computing
            seconds = time.perf_counter() - start
        record.add(count, seconds / rows, computing / max(seconds, 1e-9))
        return result

    def __str__(self) -> str:
        choices = list[str]()
        for (stage, digits, most), record in sorted(self._records.items()):
            smallest = 1 << (digits - 1)
            rows = str(smallest) if smallest == 1 else f"{smallest} to {2 * smallest - 1}"
            choices.append(f"{stage} at {rows} rows {record.chosen} of {most}")
        so_far = ", ".join(choices) or "none yet"
        return f"threads as measured on the batches ({so_far})"


class _Record:
    """Timings of one stage on one thread and on all of them, and the choice between these numbers.

    One thread comes first. The other number is tried now and then, and at once if the chosen number
    has become much slower or faster. All threads are tried only if one thread has a core to itself:
    otherwise a trial may take as long as fifty batches, and several threads would be slower.

    Args:
        most: the number of all threads.
    """

    def __init__(self, most: int) -> None:
        self.chosen = 1
        self.other = most
        # seconds a row
        self.times = {1: deque[float](maxlen=RECENT), most: deque[float](maxlen=RECENT)}
        self.shares = deque[float](maxlen=RECENT)  # of a core, on one thread
        self.level = 0.0  # the mean of the chosen number after the last trial
        self.since = 0  # batches since then
        self.wait = TRIALS + 1  # batches until the next trial
        self.trying = False
        # The first batch on a number of threads prepares kernels, and does not count.
        self.warm = False
        self.tried = False  # whether there was a trial

    def next(self) -> int:
        """The number of threads for the next batch."""
        if self.trying:
            return self.other
        self.since += 1
        due = self.since > self.wait or (self.since > SOONEST and self._has_changed())
        if due and (self.other == 1 or self._has_a_core()):
            self.trying = True
            self.warm = False
            self.times[self.other].clear()
            return self.other
        return self.chosen

    def known(self) -> int:
        """The number for a batch without a trial: all threads until another one is known better."""
        return self.chosen if self.tried else max(self.chosen, self.other)

    def add(self, count: int, seconds: float, share: float) -> None:
        """Note a timing.

        Args:
            count: the number of threads.
            seconds: a row.
            share: of a core, that the calling thread had.
        """
        if not self.warm and count == (self.other if self.trying else self.chosen):
            self.warm = True
            return
        self.times[count].append(seconds)
        if count == 1:
            self.shares.append(share)
        if not self.trying or count != self.other or not self.times[self.chosen]:
            return
        # A trial ends at the first timing that is slower, or when enough were faster.
        if _mean(self.times[self.other]) >= _mean(self.times[self.chosen]):
            self.wait = min(max(2 * self.wait, SOONEST), LATEST)
        elif len(self.times[self.other]) >= TRIALS:
            self.chosen, self.other = self.other, self.chosen
            self.wait = SOONEST
        else:
            return
        self.trying = False
        self.tried = True
        self.since = 0
        self.level = _mean(self.times[self.chosen])

    def _has_a_core(self) -> bool:
        """Whether one thread has a core to itself."""
        return len(self.shares) > 0 and _mean(self.shares) >= A_CORE

    def _has_changed(self) -> bool:
        """Whether the chosen number takes much longer, or much less, than after the last trial."""
        seconds = self.times[self.chosen]
        if not self.level or not seconds:
            return False
        now = _mean(seconds)
        return now > CHANGED * self.level or now * CHANGED < self.level


def _mean(values: deque[float]) -> float:
    known = tuple(values)  # another thread may add to them
    return sum(known) / len(known)
