"""Models and cuts that cannot be taken apart, and the sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apart import Around, Beside, Folded, Twice, model_of, rows
from offramp.errors import BadData, BadNetwork, UnknownName
from offramp.models.cifar_resnet import resnet20
from offramp.partition import partition, self_check
from small import seeded

BRANCHES = r"its code branches on values of the data, at `.*h\.sum\(\) > 0.*stages"
REFUSED = [
    (Twice, "body", "runs twice"),
    (Twice, "spare", "never runs"),
    (Twice, "side", "not on the path"),
    (Twice, "last", "'last' ends where the model does"),
    (Folded, "fold", r"first dimension is 2\*B, not B"),
    (Beside, "one", r"carries 'flatten' of shape \[2\*B, 3\], whose first dimension is 2\*B"),
    (
        lambda: Around(lambda h, _: h if h.sum() > 0 else -h),
        "body",
        BRANCHES,
    ),
    (
        lambda: Around(lambda h, _: h.view(2, -1)),
        "body",
        r"its code fixes the batch size \(as len\(x\) does; x.shape\[0\] does not\)",
    ),
    (lambda: nn.Sequential(nn.Identity(), nn.Linear(4, 3)), "0", "gives the input back"),
]


@pytest.mark.parametrize(
    ("make", "at", "why"), REFUSED, ids=[f"{at}-{why[:12]}" for _, at, why in REFUSED]
)
def test_refused(make: Any, at: str, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadNetwork, match=why) as caught:
        partition(model_of(make), (rows(2, 4),), at=[at])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_hook_that_fixes_the_batch_size_is_named() -> None:
    sizes = list[Any]()

    def counting(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        sizes.append(len(output))

    model = model_of(lambda: Around(lambda h, _: h))
    model.body.register_forward_hook(counting)
    why = r"its code, or a forward hook of 'body', fixes the batch size \(as len\(x\) does"
    with pytest.raises(BadNetwork, match=why):
        partition(model, (rows(2, 4),), at=["body"])


def test_a_hook_may_read_the_size() -> None:
    sizes = list[Any]()
    model = model_of(lambda: Around(lambda h, _: h))
    model.body.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[0]))
    x = rows(2, 4)
    parts = partition(model, (x,), at=["body"])
    with torch.no_grad():
        assert torch.equal(parts.run({"x": x})["y"], model(x))
    assert sizes


def test_refused_inputs_and_names() -> None:
    model = model_of(lambda: Around(lambda h, _: h))
    with pytest.raises(UnknownName, match="did you mean 'body'"):
        partition(model, (rows(2, 4),), at=["bodi"])
    with pytest.raises(UnknownName, match="conv1, bn1, layer1, layer2, layer3, linear"):
        partition(model_of(resnet20), (rows(2, 3, 32, 32),), at=["ZZZ"])
    with pytest.raises(BadNetwork, match=r"training mode.*eval"):
        partition(Around(lambda h, _: h), (rows(2, 4),), at=["body"])
    with pytest.raises(BadData, match=r"fails on the example: .*shape"):
        partition(model, (rows(2, 5),), at=["body"])
    for args in ((), (3,), (rows(0, 4),), (rows(2, 4), rows(3, 4))):
        with pytest.raises(BadData, match="one B >= 1"):
            partition(model, args, at=["body"])
    double = model_of(lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.Linear(3, 3)))
    with pytest.raises(BadNetwork, match=r"'0\.0' ends where '0' does"):
        partition(double, (rows(2, 4),), at=["0", "0.0"])


def test_a_buffer_that_is_written_to_is_refused() -> None:
    class Counter(Around):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body(self.first(x))
            self.table.add_(h.mean(0))
            return self.last(h + self.table)

    class Calls(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.table += 1  # nothing of the input reaches it
            return self.last(self.body(self.first(x)) + self.table)

    for kind in (Counter, Calls):
        with pytest.raises(BadNetwork, match="writes to the buffer 'table'"):
            partition(model_of(lambda kind=kind: kind(lambda h, _: h)), (rows(2, 4),), at=["body"])


def test_an_output_without_rows_is_refused_with_the_operation() -> None:
    folded = model_of(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1))
    )
    with pytest.raises(
        BadNetwork, match=r"aten\.\S+ in '2' gives shape \[2\*B, 2\].*no tensor \[B, \.\.\.\]"
    ):
        partition(folded, (rows(2, 4),), at=["0"])


MIXING = {
    r"aten.mean.dim": lambda h, _: h - h.mean(0),
    r"aten.arange": lambda h, x: h + torch.arange(x.shape[0])[:, None],
}


@pytest.mark.parametrize("operation", MIXING)
@pytest.mark.parametrize("example", [torch.zeros(1, 4), rows(3, 4)])
def test_a_model_that_mixes_rows_is_refused(operation: str, example: Tensor) -> None:
    model = model_of(lambda: Around(MIXING[operation]))
    parts = partition(model, (example,), at=["first"])
    with pytest.raises(BadNetwork, match=f"{operation}.* mixes rows"):
        self_check(model, parts, (example,))


def test_pieces_of_another_model_fail_the_check() -> None:
    one, other = (seeded(lambda: Around(lambda h, _: h), seed).eval() for seed in (1, 2))
    parts = partition(one, (rows(2, 4),), at=["body"])
    with pytest.raises(BadNetwork, match=r"piece that ends at 'body' gives 'body' .* away"):
        self_check(other, parts, (rows(2, 4),))
