"""A stage written as ONNX: what torch's writer cannot write is rewritten, and only that; what is
changed in torch while it writes is put back.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._export import utils
from torch.export import ExportedProgram

import offramp as off
from offramp.networks.compiled import compiled_of
from offramp.plans.plan import Plan
from offramp.runtime import onnx_graphs
from small import dense, ladder_of

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NEVER = Plan.by_hand({"small": float("inf")})


class Masking(nn.Module):
    """Rows of whole numbers [B, 4], of which those that are 0 count and the others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.model = dense(1)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).long()
        return self.model(1.0 - mask)  # torch's writer cannot promote the type of this


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decompositions the table of every pass over a program has."""
    seen: list[int] = []
    whole = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, table: dict[object, object]) -> ExportedProgram:
        seen.append(len(table))
        return whole(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return seen


def test_a_whole_mask_taken_from_one_is_rewritten(passes: list[int]) -> None:
    net = ladder_of(2, make=lambda index, seed: Masking().eval())
    x = torch.tensor([[0, 1, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    compiled_of(net).forget()
    got = off.run(net, NEVER, x, engine="onnxruntime").logits
    torch.testing.assert_close(got, off.run(net, NEVER, x).logits, atol=1e-5, rtol=1e-5)
    assert len(onnx_graphs.REWRITTEN) in passes


def test_a_graph_without_such_an_operation_takes_one_pass(passes: list[int]) -> None:
    net = ladder_of(2, seed=11)
    compiled_of(net).forget()
    off.run(net, NEVER, torch.randn(3, 4), engine="onnxruntime")
    assert passes
    assert len(onnx_graphs.REWRITTEN) not in passes


def test_composite_operators_are_looked_up_once_for_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def look_up() -> None:
        calls.append(1)

    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", look_up)
    with onnx_graphs._composites_once():
        utils._materialize_cpp_cia_ops()
        utils._materialize_cpp_cia_ops()
        assert calls == [1]
    assert utils._materialize_cpp_cia_ops is look_up

    monkeypatch.delattr(utils, "_materialize_cpp_cia_ops")
    with onnx_graphs._composites_once():  # a version of torch without it is left alone
        assert not hasattr(utils, "_materialize_cpp_cia_ops")
    assert not hasattr(utils, "_materialize_cpp_cia_ops")
