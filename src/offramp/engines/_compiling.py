"""A part compiled ahead of time by torch's Inductor: one program for every batch size, which has no
guards.

torch.compile checks at every call whether what it compiled still fits, and compiles again where it
does not, also while serving. What AOTInductor makes of an exported program never does.
"""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from warnings import catch_warnings, simplefilter

import torch

from offramp.errors import BadNetwork, OfframpError
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.plans.provenance import BAND
from offramp.runtime.graphs import Call
from offramp.runtime.measuring import tiled
from offramp.runtime.programs import program_of, read_by

SIZES = (1, 2, 7)  # of batches that are compared


def ahead(engine_stage: EngineStage, state: State) -> Call:
    """A part compiled for rows like these, and compared with it. Raises BadNetwork where that
    fails.
    """
    reads = read_by(engine_stage, state)
    name = engine_stage.name
    try:
        with (
            TemporaryDirectory() as folder,
            catch_warnings(),
            redirect_stderr(StringIO()),
            redirect_stdout(StringIO()),
        ):
            simplefilter("ignore")
            with torch.inference_mode(False), torch.no_grad():
                program = program_of(
                    engine_stage, reads, {key: state[key].contiguous() for key in reads}
                )
                path = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(Path(folder) / "part.pt2")
                )
                run = torch._inductor.aoti_load_package(path)
    except OfframpError:
        raise
    except Exception as problem:  # the export, Inductor and the compiler of C++ raise anything
        brief = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        raise BadNetwork(
            f"segment {name!r} cannot be compiled: {brief}; is there a C++ compiler? run it "
            f"without compile"
        ) from problem

    def call(given: State) -> State:
        found = run(*(given[key].contiguous() for key in reads))
        return dict(zip(engine_stage.writes, found, strict=True))

    _compare(engine_stage, call, {key: state[key] for key in reads})
    return call


def _compare(engine_stage: EngineStage, call: Call, rows: State) -> None:
    with torch.inference_mode():
        for size in SIZES:
            given = {key: tiled(value, size) for key, value in rows.items()}
            wanted = dict(given)
            found = call(given)
            engine_stage.call(wanted)
            for name in engine_stage.writes:
                one = wanted[name].float()
                other = found[name].float()
                if one.shape == other.shape:
                    far = (one - other).abs().max().item()
                else:
                    far = float("inf")
                if (
                    not far <= BAND * max(1.0, one.abs().max().item() / 10)
                    and not one.isnan().any()
                ):
                    raise BadNetwork(
                        f"segment {engine_stage.name!r} compiled gives {name!r} {far:.2g} away at "
                        f"batch {size}, "
                        f"expected at most {BAND:g}; run it without compile"
                    )
