"""Stages compiled ahead of time by torch's Inductor: one program for every batch size, without
guards. A package that was compiled is kept on disk for the next process.

torch.compile checks at every call whether the compiled code still fits, and compiles again if it
does not, even while serving. The code that AOTInductor makes of an exported program never does
that.
"""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from offramp._support import cache as disk
from offramp._support.machine import processor
from offramp.errors import BadNetwork, OfframpError
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.plans.provenance import BAND
from offramp.runtime.graphs import Call
from offramp.runtime.measuring import tiled_state
from offramp.runtime.programs import program_of, read_by

SIZES = (1, 2, 7)  # batch sizes that are compared


def ahead(engine_stage: EngineStage, state: State, key: str) -> Call:
    """Compile a stage, or read what an earlier process compiled, and compare the result with the
    stage itself.

    Args:
        engine_stage: the stage.
        state: named tensors [B, ...] with the shapes to compile for.
        key: the network, the stage and the engine, for the cache on disk.

    Returns:
        The compiled stage as a call on named tensors.

    Raises:
        BadNetwork: the stage cannot be compiled, or computes other values then.
    """
    reads = read_by(engine_stage, state)
    rows = {name: state[name] for name in reads}
    # The code is made for this processor and this number of threads.
    key = f"package {_machine(rows)} {key}"
    # A package is a program that runs in this process, as Python's own compiled files do. It is
    # read only where nobody but this user can have written it.
    package = disk.read(key, private=True)
    if package is not None:
        # torch has no common class for what goes wrong with a package
        with suppress(Exception):
            call = _call_of(engine_stage, reads, package)
            _compare(engine_stage, call, rows)
            return call
    package = _package(engine_stage, reads, rows)
    call = _call_of(engine_stage, reads, package)
    _compare(engine_stage, call, rows)
    disk.write(key, package)
    return call


def _machine(rows: State) -> str:
    """What code is compiled for: the processor, the threads, and the devices of the rows."""
    devices = set[str]()
    for value in rows.values():
        if value.device.type == "cuda":
            devices.add(torch.cuda.get_device_name(value.device))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()} {capability} {torch.get_num_threads()} threads {sorted(devices)}"


def _package(engine_stage: EngineStage, reads: tuple[str, ...], rows: State) -> bytes:
    """The stage as a package of AOTInductor. Raises BadNetwork."""
    try:
        with (
            TemporaryDirectory() as folder,
            catch_warnings(),
            redirect_stderr(StringIO()),
            redirect_stdout(StringIO()),
        ):
            simplefilter("ignore")
            with torch.inference_mode(False), torch.no_grad():
                # AOTInductor compiles for the strides of its example: take plain ones.
                plain = {name: value.contiguous() for name, value in rows.items()}
                program = program_of(engine_stage, reads, plain)
                path = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(Path(folder) / "part.pt2")
                )
                return Path(path).read_bytes()
    except OfframpError:
        raise
    except Exception as problem:  # the export, Inductor and the compiler of C++ raise anything
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise BadNetwork(
            f"segment {engine_stage.name!r} cannot be compiled: {lines[0][:200]}. Is there a C++ "
            "compiler? Otherwise leave compile out"
        ) from problem


def _call_of(engine_stage: EngineStage, reads: tuple[str, ...], package: bytes) -> Call:
    """A package, loaded, as a call on named tensors."""
    with TemporaryDirectory() as folder, catch_warnings():
        simplefilter("ignore")
        file = Path(folder) / "part.pt2"
        file.write_bytes(package)
        run = torch._inductor.aoti_load_package(str(file))

    def call(state: State) -> State:
        tensors = [state[name].contiguous() for name in reads]
        return dict(zip(engine_stage.writes, run(*tensors), strict=True))

    return call


def _compare(engine_stage: EngineStage, call: Call, rows: State) -> None:
    """Raise BadNetwork if a compiled stage computes other values than the stage itself."""
    with torch.inference_mode():
        for size in SIZES:
            inputs = tiled_state(rows, size)
            compiled = call(inputs)
            eager = dict(inputs)
            engine_stage.call(eager)
            for name in engine_stage.writes:
                reference = eager[name].float()
                distance = _distance(compiled[name].float(), reference)
                allowed = BAND * max(1.0, reference.abs().max().item() / 10)
                if not distance <= allowed and not reference.isnan().any():
                    raise BadNetwork(
                        f"segment {engine_stage.name!r} computes {name!r} otherwise when compiled: "
                        f"it differs by {distance:.2g} at batch {size}, and may differ by "
                        f"{BAND:g}. Leave compile out"
                    )


def _distance(values: Tensor, reference: Tensor) -> float:
    """The largest difference; infinity for other shapes."""
    if values.shape != reference.shape:
        return float("inf")
    return (values - reference).abs().max().item()
