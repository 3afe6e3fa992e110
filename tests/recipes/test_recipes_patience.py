"""PABEE: the optimizer, the rate and the clipping of the authors' script, against its formulas
written out.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.errors import InvalidArgument
from offramp.recipes.patience import PatienceRecipe
from small import cut_of
from waves import toy, toy_rows


def written_out(net, x, y, *, steps, rate, clip, theirs):
    """AdamW without decay, the rate falling to 0 along a line, the gradients' common norm at most
    `clip`.

    The formulas of `train` in run_glue.py of github.com/JetRunner/PABEE,
    6080b3ee425e905f70a0bc47d4ddffa497851bf3, and of the loss in pabee/modeling_bert.py; its own run
    needs a version of transformers that is not made any more. That version adds epsilon to the
    second moment's root as it is (`theirs`), torch's AdamW to the corrected one.
    """
    values = [*net.parameters()]
    moments = [[torch.zeros_like(value), torch.zeros_like(value)] for value in values]
    norms = []
    for step in range(steps):
        shallow, deep = net(x)
        loss = (1 * cross_entropy(shallow, y) + 2 * cross_entropy(deep, y)) / (1 + 2)
        gradients = torch.autograd.grad(loss, values)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        norms.append(norm)
        now = rate * (1 - step / steps)
        with torch.no_grad():
            for value, gradient, (first, second) in zip(values, gradients, moments, strict=True):
                short = gradient * min(1.0, clip / (norm + 1e-6))
                first.mul_(0.9).add_(0.1 * short)
                second.mul_(0.999).add_(0.001 * short.square())
                correction = math.sqrt(1 - 0.999 ** (step + 1))
                epsilon = 1e-8 if theirs else 1e-8 * correction
                scale = now * correction / (1 - 0.9 ** (step + 1))
                value.sub_(scale * first / (second.sqrt() + epsilon))
    return norms


def start():
    """The toy, with a head that makes gradients long enough to be clipped; in float64, for Adam
    turns the last bits of small gradients into whole steps.
    """
    net = toy().double()
    with torch.no_grad():
        net.backbone[4].weight.mul_(6.0)
    return net


def test_it_steps_as_the_authors_script_does():
    x, y = (part.flatten(0, 1) for part in toy_rows())
    x = x.double()
    net = start()
    history = off.fit(
        net, (x, y), recipe=PatienceRecipe(epochs=4, rate=1e-2), batch_size=40, progress=False
    )
    assert [epoch.rate for epoch in history.epochs] == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0])
    for theirs, tolerance in ((False, 1e-9), (True, 2e-5)):
        other = start()
        norms = written_out(other, x, y, steps=4, rate=1e-2, clip=1.0, theirs=theirs)
        assert max(norms) > 1.1
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], atol=tolerance, rtol=0)


def test_clipping_is_an_argument():
    net = cut_of(trained=False)
    assert [phase.clip for phase in PatienceRecipe().phases(net)] == [1.0]
    assert [phase.clip for phase in PatienceRecipe(clip=None).phases(net)] == [None]
    with pytest.raises(InvalidArgument, match="clip must be above 0"):
        PatienceRecipe(clip=0).prepare(net)
