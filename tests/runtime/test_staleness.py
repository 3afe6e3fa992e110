"""What a ChangeDetector notices, what it leaves alone, and that it keeps nothing alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import StaleRunner
from offramp.gates.tempered import Tempered
from offramp.networks.taps import listening
from offramp.runtime.staleness import ChangeDetector, Rounds, SettingsDetector
from small import Spoiled, dense, ladder_of


def model() -> nn.Module:
    return nn.Sequential(dense(1), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)).eval()


def touch(module, name, call):
    with torch.no_grad():
        getattr(getattr(module, name), call)(2)


def write_by_numpy(tensor):
    tensor.detach().numpy()[...] = 7


CHANGES = {
    "weight in place": lambda m: touch(m[2], "weight", "mul_"),
    "buffer in place": lambda m: touch(m[1], "running_mean", "add_"),
    "deep weight": lambda m: touch(m[0][0], "weight", "add_"),
    "weight's data": lambda m: setattr(m[2].weight, "data", torch.zeros(2, 3)),
    "new buffer": lambda m: setattr(m[1], "running_var", torch.ones(3)),
    "new weight": lambda m: setattr(m[2], "weight", nn.Parameter(torch.ones(2, 3))),
    "a bias where none was": lambda m: setattr(m[2], "bias", nn.Parameter(torch.ones(2))),
    "no bias any more": lambda m: setattr(m[0][0], "bias", None),
    "a deleted bias": lambda m: delattr(m[0][0], "bias"),
    "new submodule": lambda m: m.__setitem__(1, nn.Identity().eval()),
    "deep training": lambda m: m[0][0].train(),
    "running_var in place": lambda m: touch(m[1], "running_var", "mul_"),
    "the last buffer in place": lambda m: touch(m[1], "num_batches_tracked", "add_"),
    "bias's data": lambda m: setattr(m[0][0].bias, "data", torch.zeros_like(m[0][0].bias)),
    "a buffer's data": lambda m: setattr(m[1].running_var, "data", torch.zeros(3)),
    "in place through data": lambda m: m[2].weight.data.mul_(2),
    "a buffer in place through data": lambda m: m[1].running_var.data.mul_(2),
    "in place through detach": lambda m: m[0][0].weight.detach().add_(1),
    "NumPy": lambda m: write_by_numpy(m[2].weight),
    "NumPy, a buffer": lambda m: write_by_numpy(m[1].running_mean),
    "double": lambda m: m.double(),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m[2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_notices(change):
    module = model()
    detector = ChangeDetector([module])
    detector.check()
    CHANGES[change](module)
    with pytest.raises(StaleRunner, match="open again"):
        detector.check()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_a_spot_check_notices_a_write_through_numpy_within_its_turns(kind, layout):
    """Eight tensors are compared by content at a time: of more the next ones each time."""
    module = (
        nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(12)))
        .to(kind)
        .to(memory_format=layout)
        .eval()
    )
    detector = ChangeDetector([module])
    for _ in range(9):
        detector.spot_check()
    module[11].weight.data.mul_(2)
    assert [refused(detector) for _ in range(6)].count(True) == 2


def test_a_single_value_that_is_not_compared_is_not_noticed():
    """What the docstring says cannot be seen."""
    module = nn.Linear(100, 100).eval()
    detector = ChangeDetector([module])
    module.weight.data[0, 1] += 1
    detector.check()
    module.weight.data[0, 0] += 1
    with pytest.raises(StaleRunner):
        detector.check()


def test_expanded_sparse_and_empty_buffers_are_no_obstacle():
    module = nn.Linear(2, 2).eval()
    module.register_buffer("wide", torch.zeros(1).expand(5))
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("empty", torch.zeros(0, 3))
    ChangeDetector([module]).check()


def test_it_leaves_alone_what_changes_nothing():
    module = model()
    detector = ChangeDetector([module])
    module(torch.zeros(5, 4))
    module.to("cpu").float().eval()
    module.state_dict()
    [p.requires_grad_(False) for p in module.parameters()]
    detector.check()


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        module = model()
    detector = ChangeDetector([module])
    detector.check()
    module[2].weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(StaleRunner):
        detector.check()


def test_shallow_it_looks_at_the_roots_alone():
    module = model()
    detector = ChangeDetector([module], deep=False)
    touch(module[2], "weight", "mul_")
    detector.check()
    module[2] = nn.Identity().eval()
    with pytest.raises(StaleRunner):
        detector.check()


def test_it_keeps_no_module_alive():
    module = model()
    detector = ChangeDetector([module], deep=False)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    detector.check()


def refused(detector):
    try:
        detector.spot_check()
    except StaleRunner:
        return True
    return False


@pytest.mark.parametrize("change", ["double", "deep training", "weight in place"])
def test_spot_checks_notice_after_as_many_turns_at_most_and_a_check_at_once(change):
    module = model()
    detector = ChangeDetector([module], shares=4)
    CHANGES[change](module)
    with pytest.raises(StaleRunner):
        detector.check()
    assert any(refused(detector) for _ in range(4))


def test_every_spot_check_looks_at_what_is_always_looked_at():
    module = model()
    detector = ChangeDetector([module], shares=4, each_time=[module[2]])
    touch(module[2], "weight", "mul_")
    assert all(refused(detector) for _ in range(9))


def test_more_turns_than_modules():
    module = nn.Linear(2, 2).eval()
    detector = ChangeDetector([module], shares=3)
    for _ in range(7):
        detector.spot_check()
    touch(module, "weight", "mul_")
    assert [refused(detector) for _ in range(6)].count(True) == 2


def test_it_notices_another_function_of_a_gate():
    net = ladder_of(2)
    detector = ChangeDetector([net.gates])
    net.gates["small"].function = lambda logits: logits[:, 0]
    with pytest.raises(StaleRunner):
        detector.check()


def test_it_notices_a_number_or_a_word_of_a_gate():
    net = ladder_of(2)
    net.gates["small"] = Tempered(net.gates["small"], 2.0).eval()
    detector = ChangeDetector([net.gates])
    detector.check()
    net.gates["small"].temperature = 3.0
    with pytest.raises(StaleRunner):
        detector.check()


def test_a_settings_detector_looks_at_all_modules_in_turns_and_keeps_none_alive():
    module = nn.Sequential(*(nn.LeakyReLU(0.1) for _ in range(20))).eval()
    detector = SettingsDetector(module.modules())
    for _ in range(7):
        detector.spot_check()
    module[11].negative_slope = 0.2
    assert [refused(detector) for _ in range(6)].count(True) == 2  # of three shares one holds it
    with pytest.raises(StaleRunner, match="a setting of a LeakyReLU"):
        detector.check()
    module[11].negative_slope = 0.1
    detector.check()
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


HOOKS = {
    "a forward hook": lambda m: m[11].register_forward_hook(lambda *_: None),
    "a pre-hook": lambda m: m[11].register_forward_pre_hook(lambda *_: None),
    "a hook of all modules": lambda _: register_module_forward_hook(lambda *_: None),
    "a pre-hook of all modules": lambda _: register_module_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_new_hook_is_noticed_at_once_and_one_that_was_removed_within_some_turns(hook):
    module = nn.Sequential(*(nn.Tanh() for _ in range(40))).eval()
    before = SettingsDetector(module.modules())
    before.spot_check()
    handle = HOOKS[hook](module)
    try:
        for _ in range(2):  # it stays so
            with pytest.raises(StaleRunner, match="a hook of a module"):
                before.spot_check()
        with pytest.raises(StaleRunner, match="a hook of a module"):
            before.check()
        after = SettingsDetector(module.modules())
        after.spot_check()
        after.check()
    finally:
        handle.remove()
    before.check()
    before.spot_check()
    assert sum(refused(after) for _ in range(6)) >= 1  # 84 tables in six shares
    with pytest.raises(StaleRunner, match="a hook of a module"):
        after.check()


def test_another_hook_in_the_same_place_is_noticed():
    module = nn.Sequential(nn.Tanh()).eval()
    handle = module[0].register_forward_hook(lambda *_: None)
    detector = SettingsDetector(module.modules())
    module[0]._forward_hooks[handle.id] = lambda _, __, y: -y
    with pytest.raises(StaleRunner, match="a hook of a module"):
        detector.spot_check()


def test_hooks_elsewhere_and_hooks_that_only_observe_are_left_alone():
    net = ladder_of(2)
    detector = SettingsDetector(net.modules())
    nn.Tanh().register_forward_hook(lambda *_: None)
    with listening({"small": net.backbone["small"]}, lambda *_: None):
        detector.spot_check()
        detector.check()
    with FlopCounterMode(display=False):  # has hooks on all modules
        detector.spot_check()
        detector.check()
    method = Spoiled(dense(0))
    method.register_forward_hook(method.extra_repr)  # each look at it makes another object
    detector = SettingsDetector(method.modules())
    method._forward_hooks[next(iter(method._forward_hooks))] = method.extra_repr
    detector.check()


def test_a_settings_detector_compares_what_code_reads_by_value():
    table = {"by": 1.5, "f": len}
    entries = {"a": torch.ones(2)}
    tensor = torch.ones(2)
    detector = SettingsDetector(
        [], [(table, "by", 1.5), (table, "f", len)], [(entries, dict(entries))], [tensor]
    )
    table["by"] = float("1.5")  # another object of the same value
    detector.check()
    entries["a"] = torch.ones(2)
    detector.spot_check()
    with pytest.raises(StaleRunner, match="a dict"):
        detector.check()
    table["f"] = max
    with pytest.raises(StaleRunner, match="'f'"):
        detector.spot_check()
    table["f"] = len
    del table["by"]
    with pytest.raises(StaleRunner, match="'by'"):
        detector.spot_check()
    table["by"] = 1.5
    tensor.add_(1)
    with pytest.raises(StaleRunner, match="a tensor"):
        detector.spot_check()


def deep() -> nn.Module:
    """Linear layers, norms, and many layers without tensors."""
    blocks = list[nn.Module]()
    for _ in range(11):
        blocks += [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LeakyReLU(0.1)]
    blocks += [nn.LeakyReLU(0.1) for _ in range(60)]
    return nn.Sequential(*blocks).eval()


ONE_MODULE = {
    "training": lambda m: m[16].train(),
    "a weight in place": lambda m: touch(m[15], "weight", "mul_"),
    "a new bias": lambda m: setattr(m[30], "bias", nn.Parameter(torch.ones(3))),
    "a write through NumPy": lambda m: write_by_numpy(m[9].weight),
    "the last tensor through NumPy": lambda m: write_by_numpy(m[31].running_var),
    "an attribute": lambda m: setattr(m[92], "negative_slope", 0.2),
    "an eps": lambda m: setattr(m[4], "eps", 0.5),
}


@pytest.mark.parametrize("before", [0, 1, 5, 14])
@pytest.mark.parametrize("change", ONE_MODULE)
def test_rounds_notice_a_change_of_one_module_within_a_round(change, before):
    module = deep()
    rounds = Rounds([module], SettingsDetector(module.modules()))
    assert rounds.shares > 10
    for _ in range(before):
        rounds.spot_check()
    ONE_MODULE[change](module)
    assert any(refused(rounds) for _ in range(rounds.shares))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("change", ["weight", "slope", "numpy"])
def test_rounds_of_any_length_look_at_everything(blocks, change):
    layers = list[nn.Module]()
    for _ in range(blocks):
        layers += [nn.BatchNorm1d(3), *(nn.LeakyReLU(0.1) for _ in range(20))]
    module = nn.Sequential(*layers).eval()
    rounds = Rounds([module], SettingsDetector(module.modules()))
    assert rounds.shares == blocks
    if change == "weight":
        touch(module[-21], "weight", "add_")
    elif change == "slope":
        module[-1].negative_slope = 0.2
    else:
        write_by_numpy(module[-21].weight)
    assert any(refused(rounds) for _ in range(blocks))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: m.double(),
        lambda m: [touch(part, "weight", "add_") for part in m if hasattr(part, "weight")],
    ],
    ids=["train", "cast", "step"],
)
def test_rounds_notice_a_change_of_all_modules_at_once(change):
    module = deep()
    rounds = Rounds([module], SettingsDetector(module.modules()))
    rounds.spot_check()
    change(module)
    assert refused(rounds)


def test_rounds_leave_alone_what_changes_nothing():
    module = deep()
    rounds = Rounds([module], SettingsDetector(module.modules()))
    module(torch.zeros(5, 3))
    module.to("cpu").float().eval()
    for _ in range(2 * rounds.shares):
        rounds.spot_check()
