"""Some processes that do one thing together, forked off the test's own: nothing is imported
anew.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch


def together(job: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `job(rank)` gives in each of `count` processes that know of each other, in their order.

    What it raises comes as "<type>: <text>".
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    children = [
        context.Process(target=_child, args=(job, rank, count, port, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
        for child in children:
            child.start()
    found = [pipe[0].recv() if pipe[0].poll(120) else "silence" for pipe in pipes]
    for child in children:
        child.join(10)
        child.kill()
    return found


def _child(job: Callable[[int], Any], rank: int, count: int, port: int, pipe: Any) -> None:
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # the parent's was that of one process
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    names["OMP_NUM_THREADS"] = 1  # else Accelerate warns that it sets them
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        pipe.send(job(rank))
    except BaseException as problem:
        traceback.print_exc()
        pipe.send(f"{type(problem).__name__}: {problem}")
    finally:
        os._exit(0)
