"""Which hooks of a module count."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from offramp.networks.hooks import (
    forward_hooks,
    global_hooks,
    global_tables,
    hook_tables,
    hooks_in,
    only_observes,
)
from offramp.networks.taps import listening


def nothing(*_):
    """A hook that changes nothing."""


def test_hooks_in_the_order_in_which_they_are_called():
    order = list[str]()
    module = nn.Tanh()
    module.register_forward_hook(lambda *_: order.append("after"))
    module.register_forward_pre_hook(lambda *_: order.append("before"))
    module.register_forward_pre_hook(lambda *_: order.append("first"), prepend=True)
    module(torch.ones(1))
    called = list(order)
    order.clear()
    found = forward_hooks(module)
    for _, hook in found:
        hook()
    assert order == called == ["first", "before", "after"]
    assert [table for table, _ in found] == ["_forward_pre_hooks"] * 2 + ["_forward_hooks"]
    assert hooks_in(hook_tables(module)) == [hook for _, hook in found]


def test_backward_hooks_do_not_count():
    module = nn.Tanh()
    module.register_full_backward_hook(nothing)
    assert forward_hooks(module) == []


def test_hooks_of_all_modules():
    assert global_hooks() == hooks_in(global_tables()) == []
    handle = register_module_forward_hook(nothing)
    assert global_hooks() == [nothing]
    handle.remove()
    assert global_hooks() == []


def test_hooks_of_offramp_do_not_count():
    module = nn.Tanh()
    with listening({"a": module}, nothing):
        assert forward_hooks(module) == []
        handle = module.register_forward_hook(nothing)
        assert forward_hooks(module) == [("_forward_hooks", nothing)]
        handle.remove()
    assert only_observes(functools.partial(functools.partial(only_observes), None))
    assert not only_observes(functools.partial(nothing))
    assert not only_observes(nn.Tanh())
