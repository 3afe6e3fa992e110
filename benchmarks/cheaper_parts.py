"""Cheaper parts on CIFAR-10: converted ResNets after `recover`, at their cost; and the best of them
in a ladder.

    python benchmarks/cheaper_parts.py --data DIR --cache out [--depth 20] [--only NAME,...]
        [--rows 5000] [--epochs 2]
    python benchmarks/cheaper_parts.py --data DIR --cache out --timed [--json FILE]
    python benchmarks/cheaper_parts.py --data DIR --cache out --ladder [--json FILE]
    python benchmarks/cheaper_parts.py --data DIR --cache out --kernel
    python benchmarks/cheaper_parts.py --data DIR --cache out --seeds out-1 out-2
    python benchmarks/cheaper_parts.py --data DIR --cache out --depth 56 --page FILE.toml

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). The first form converts and recovers what
the cache lacks, one method after the other, each with the same rows and epochs: rows 0 to `rows` of
the training set, with crops and flips, against the original's logits and features. Run it again to
go on. Accuracy is that on test rows 5,000-9,999. The second form times all that is in the cache on
ONNX Runtime and on torch, interleaved with the original; the third makes ladders with each (or
those of --only; NAME-int8 is one in eight bits) as the first member of two, certifies a gap to
ResNet-56, and prices them by the members' own times on ONNX Runtime at batch 64. Timings are CPU
time of one thread. `--seeds` prints the accuracies of this cache beside those of others, which
other seeds (`--seed`) have filled. `--page` writes a file for `offramp compare`: every model of
that depth in the cache, alone and with exits after the first two stages. `pruned` needs
`pip install 'offramp[prune]'`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

import offramp as off

# Internal: the text that builds a converted model again.
from offramp.building.converting import conversions_of, spec_with

# Internal: what `offramp inspect` prints, as numbers.
from offramp.building.costing import cost_of
from offramp.errors import NoSafePlan, OfframpError

# Internal: the interleaved clock of our own timings.
from offramp.runtime.measuring import interleaved, ratio

Layers = dict[str, str]
METHODS: dict[str, Layers] = {
    "low_rank": {"layer*": "low_rank?energy=0.8"},
    "tucker": {"layer*": "tucker?energy=0.75"},
    "ghost": {"layer2.*": "ghost?ratio=2", "layer3.*": "ghost?ratio=2"},
    "g_ghost": {"layer2": "g_ghost?ratio=0.5", "layer3": "g_ghost?ratio=0.5"},
    "pruned-light": {"layer*.conv1": "pruned?ratio=0.25&round_to=4&importance=thinet"},
    "pruned-taylor": {"layer*.conv1": "pruned?ratio=0.5&round_to=8&importance=taylor"},
    "pruned-thinet": {"layer*.conv1": "pruned?ratio=0.5&round_to=8&importance=thinet"},
    "pruned-bn_scale": {"layer*.conv1": "pruned?ratio=0.5&round_to=8&importance=bn_scale"},
    "pad": {"layer3.*": "pad?ratio=0.3"},
    "ternary": {"layer*": "ternary"},
    "binary": {"layer*": "binary"},
    "binary-layer3": {"layer3.*": "binary"},
}
PACKED = ("ternary", "binary", "binary-layer3")
LEVEL = 0.005


def original(data: Path, depth: int) -> nn.Module:
    """A ResNet with the public weights."""
    return off.make_model(
        f"offramp:resnet{depth}", data / "weights" / f"cifar10_resnet{depth}.safetensors"
    )


def preprocess() -> nn.Module:
    """Its preprocessing."""
    found = off.make_preprocess("offramp:resnet20")
    assert found is not None
    return found


def accuracy(model: nn.Module, data: Path, rows: str) -> float:
    """The share of some test rows that a model answers right."""
    before = preprocess()
    right = 0
    count = 0
    with torch.inference_mode():
        for batch in off.rows(f"cifar10:{data / 'cifar10'}[{rows}]").batches(500):
            answers = model(before(torch.as_tensor(batch.x))).argmax(1)
            right += int((answers == torch.as_tensor(batch.y)).sum())
            count += len(answers)
    return right / count


def recovered(args: argparse.Namespace, name: str, depth: int) -> dict[str, Any]:
    """One method: convert, recover, pack, and save; its figures but for the milliseconds."""
    plain = original(args.data, depth)
    train = f"cifar10/train:{args.data / 'cifar10'}"
    sample = next(iter(off.rows(f"{train}[0:512]").batches(512)))
    x = preprocess()(torch.as_tensor(sample.x))
    start = time.process_time()
    converted = off.convert(
        plain, METHODS[name], example=x[:4], data=(x, torch.as_tensor(sample.y))
    )
    before = accuracy(converted, args.data, args.figures)
    off.fit(
        (converted, preprocess()),
        f"{train}[0:{args.rows}]",
        recipe="recover",
        original=plain,
        epochs=args.epochs,
        layer_epochs=args.layer_epochs,
        rate=args.rate,
        batch_size=args.batch_size,
        augment="crop_flip",
        seed=args.seed,
        progress=False,
    )
    seconds = time.process_time() - start
    if name in PACKED:
        converted = off.convert(converted, {"layer*": "packed"})
    spec = spec_with(f"offramp:resnet{depth}", conversions_of(converted, plain))
    file = args.cache / f"resnet{depth}-{name}.safetensors"
    save_file({key: value.contiguous() for key, value in converted.state_dict().items()}, str(file))
    cost = cost_of(converted, x[:2])
    return {
        "depth": depth,
        "method": name,
        "spec": spec,
        "rows": args.rows,
        "epochs": args.epochs,
        "layer_epochs": args.layer_epochs,
        "cpu_seconds": seconds,
        "accuracy_before": before,
        "accuracy": accuracy(converted, args.data, args.figures),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "bit_operations": cost.bit_operations,
        "bytes": cost.stored_bytes,
        "file_bytes": file.stat().st_size,
    }


def plain_figures(data: Path, depth: int, figures: str) -> dict[str, Any]:
    """The same of an original."""
    model = original(data, depth)
    cost = cost_of(model, torch.zeros(2, 3, 32, 32))
    return {
        "depth": depth,
        "method": "-",
        "spec": f"offramp:resnet{depth}",
        "accuracy": accuracy(model, data, figures),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "bit_operations": cost.bit_operations,
        "bytes": cost.stored_bytes,
        "file_bytes": (data / "weights" / f"cifar10_resnet{depth}.safetensors").stat().st_size,
    }


def known(cache: Path) -> dict[str, dict[str, Any]]:
    """What has been done, by name."""
    file = cache / "cheaper_parts.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def keep(cache: Path, found: dict[str, dict[str, Any]]) -> None:
    """Write what has been done."""
    (cache / "cheaper_parts.json").write_text(json.dumps(found, indent=1))


def member(args: argparse.Namespace, one: dict[str, Any]) -> nn.Module:
    """A model of the cache, or an original."""
    if one["method"] == "-":
        return original(args.data, one["depth"])
    file = args.cache / f"resnet{one['depth']}-{one['method']}.safetensors"
    return off.make_model(one["spec"], file)


def graph_of(model: nn.Module, file: Path) -> Path:
    """A model as an ONNX file, written once."""
    if not file.exists():
        batch = ({0: torch.export.Dim("b")},)
        rows = (torch.zeros(2, 3, 32, 32),)
        program = torch.onnx.export(model, rows, dynamo=True, dynamic_shapes=batch, verbose=False)
        assert program is not None
        program.save(str(file))
    return file


def opened(file: Path) -> Any:
    """An ONNX file on ONNX Runtime, one thread, nothing of ours around it: a function of rows [B,
    3, 32, 32].
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    name = found.get_inputs()[0].name
    return lambda rows: found.run(None, {name: rows})[0]


def in_eight_bits(args: argparse.Namespace, file: Path) -> Path:
    """An ONNX file in eight bits, on scales of training rows, as the engine onnxruntime:int8 does
    it; written once.
    """
    from onnxruntime import quantization

    done = file.with_name(f"{file.stem}-int8.onnx")
    if done.exists():
        return done
    before = preprocess()
    batches = off.rows(f"cifar10/train:{args.data / 'cifar10'}[0:256]").batches(32)
    rows = iter([before(torch.as_tensor(batch.x)).numpy() for batch in batches])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(rows, None)
            return None if batch is None else {"x": batch}

    plain = file.with_name(f"{file.stem}-plain.onnx")
    quantization.shape_inference.quant_pre_process(file, plain, skip_symbolic_shape=True)
    quantization.quantize_static(
        plain,
        done,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )
    return done


def file_of(args: argparse.Namespace, name: str, found: dict[str, dict[str, Any]]) -> Path:
    """The ONNX file of a model of the cache; of `NAME-int8` in eight bits."""
    plain = name.removesuffix("-int8")
    file = graph_of(member(args, found[plain]), args.cache / f"{plain}.onnx")
    return in_eight_bits(args, file) if name.endswith("-int8") else file


def timed(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Milliseconds of each model beside its original's, at batch 1 and 64, on two engines."""
    for name, one in found.items():
        if one["method"] == "-" or "ms" in one:
            continue
        plain = original(args.data, one["depth"])
        model = member(args, one)
        lines: dict[str, Any] = {}
        for batch in (1, 64):
            x = torch.zeros(batch, 3, 32, 32)
            with torch.inference_mode():
                calls: dict[str, Any] = {
                    "plain": partial(plain, x),
                    "again": partial(plain, x),
                    "model": partial(model, x),
                }
                times = interleaved(calls, repeats=args.repeats, warmup=2, clock=time.process_time)
            lines[f"torch {batch}"] = _line(times)
            try:
                first = opened(file_of(args, f"resnet{one['depth']}", found))
                second = opened(file_of(args, name, found))
                rows = x.numpy()
                calls = {
                    "plain": partial(first, rows),
                    "again": partial(first, rows),
                    "model": partial(second, rows),
                }
                times = interleaved(calls, repeats=args.repeats, warmup=2, clock=time.process_time)
                lines[f"onnxruntime {batch}"] = _line(times)
            except (RuntimeError, OfframpError) as problem:
                lines[f"onnxruntime {batch}"] = {"refused": str(problem).splitlines()[0]}
        one["ms"] = lines
        keep(args.cache, found)
        print(name, {key: line.get("ratio") for key, line in lines.items()}, flush=True)


def _line(times: dict[str, Any]) -> dict[str, Any]:
    medians = {name: float(torch.tensor(values).median()) for name, values in times.items()}
    both = ratio(times["model"], times["plain"])
    same = ratio(times["again"], times["plain"])
    return {
        "ms": medians["model"],
        "plain_ms": medians["plain"],
        "ratio": str(both),
        "same": str(same),
    }


def logits_of(
    args: argparse.Namespace, name: str, found: dict[str, dict[str, Any]], rows: str
) -> np.ndarray:
    """A model's logits on test rows, on ONNX Runtime; kept in the cache."""
    file = args.cache / f"logits-{name}-{rows.replace(':', '-')}.npy"
    if not file.exists():
        call = opened(file_of(args, name, found))
        before = preprocess()
        batches = off.rows(f"cifar10:{args.data / 'cifar10'}[{rows}]").batches(64)
        parts = [call(before(torch.as_tensor(batch.x)).numpy()) for batch in batches]
        np.save(file, np.concatenate(parts))
    logits: np.ndarray = np.load(file)
    return logits


def ladders(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ladders of a cheap first member before ResNet-56: certified on rows 1,000-4,999, priced on
    later rows.
    """
    rows = f"1000:{args.figures.split(':')[1]}"
    small = [name for name in found if found[name]["depth"] == 20]
    firsts = args.only.split(",") if args.only else ["resnet20-int8", *small]
    names = [*dict.fromkeys(["resnet20", *firsts]), "resnet56"]
    logits = {name: logits_of(args, name, found, rows) for name in names}
    labels = np.concatenate(
        [batch.y for batch in off.rows(f"cifar10:{args.data / 'cifar10'}[{rows}]").batches(500)]
    )
    sample = torch.zeros(64, 3, 32, 32).numpy()
    calls = {name: partial(opened(file_of(args, name, found)), sample) for name in names}
    times = interleaved(calls, repeats=args.repeats, warmup=2, clock=time.process_time)
    ms = {name: float(np.median(values)) / 64 for name, values in times.items()}
    plain: float | None = None
    lines: dict[str, Any] = {}
    for name in names[:-1]:
        both = {"small": logits[name], "large": logits["resnet56"]}
        trace = off.Trace.from_arrays(
            both, {"small": ms[name], "large": ms["resnet56"]}, labels=labels
        )
        lines[name] = {"ms": ms[name], "large_ms": ms["resnet56"]}
        try:
            plan = off.calibrate(
                trace[:4000], risk="accuracy_gap", at_most=LEVEL, confidence=0.95, unit="ms"
            )
        except NoSafePlan as nothing:
            lines[name]["refused"] = str(nothing)
            continue
        done = trace[4000:].evaluate(plan, risk="accuracy_gap")
        goes_on = done.shares[1]
        whole = ms[name] + goes_on * ms["resnet56"]
        plain = whole if plain is None else plain
        lines[name] |= {
            "promise": str(plan),
            "accuracy": done.accuracy,
            "large_accuracy": done.plain_accuracy,
            "goes_on": goes_on,
            "ms_per_row": whole,
            "of_plain_ladder": whole / plain,
            "small_of_resnet20": str(ratio(times[name], times["resnet20"])),
        }
    return lines


def bits(values: np.ndarray) -> np.ndarray:
    """Signs [..., C] -> words [..., C / 64], a bit per channel."""
    missing = -values.shape[-1] % 64
    wide = np.concatenate([values >= 0, np.zeros((*values.shape[:-1], missing), bool)], -1)
    return np.packbits(wide, axis=-1, bitorder="little").view(np.uint64)


def xor_convolution(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A 3x3 convolution of signs, padded with zeros: [B, C, H, W] and words [3, 3, O, C / 64] ->
    [B, H, W, O].

    The product of two signs is 1 where their bits are equal, so C products add up to C - 2 x (bits
    that differ).
    """
    batch, channels, high, wide = x.shape
    words = bits(x.transpose(0, 2, 3, 1))
    out = np.zeros((batch, high, wide, weight.shape[2]), np.int16)
    for row in range(3):
        for column in range(3):
            down = row - 1
            right = column - 1
            rows = slice(max(0, -down), high - max(0, down))
            columns = slice(max(0, -right), wide - max(0, right))
            shifted = words[
                :,
                rows.start + down : rows.stop + down,
                columns.start + right : columns.stop + right,
            ]
            differ = np.zeros((*shifted.shape[:-1], weight.shape[2]), np.int16)
            for word in range(words.shape[-1]):
                differ += np.bitwise_count(shifted[..., word, None] ^ weight[row, column, :, word])
            out[:, rows, columns] += channels - 2 * differ
    return out


def kernel(repeats: int) -> list[dict[str, Any]]:
    """A convolution over packed bits beside the dense one, on one thread: milliseconds and their
    ratio.
    """
    lines = []
    for batch in (1, 64):
        for side, width in ((32, 16), (16, 32), (8, 64), (8, 256)):
            x = torch.randn(batch, width, side, side)
            signs = torch.where(torch.randn(width, width, 3, 3) >= 0, 1.0, -1.0)
            weight = bits(signs.numpy().transpose(2, 3, 0, 1))
            dense = partial(_dense_signs, x, signs)
            packed = partial(xor_convolution, x.numpy(), weight)
            assert np.array_equal(packed().transpose(0, 3, 1, 2), dense().numpy())
            times = interleaved(
                {"packed": packed, "dense": dense}, repeats=repeats, clock=time.process_time
            )
            both = ratio(times["packed"], times["dense"])
            lines.append({"batch": batch, "side": side, "channels": width, "ratio": str(both)})
            print(lines[-1], flush=True)
    return lines


def _dense_signs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv2d(torch.where(x >= 0, 1.0, -1.0), weight, padding=1)


def show(found: dict[str, dict[str, Any]]) -> None:
    """A table of all that has been done."""
    table = Table(
        "model",
        "accuracy %",
        "before",
        "M MACs",
        "G bit ops",
        "kB on disk",
        "x onnx 64",
        "x torch 64",
    )
    for name, one in found.items():
        ms = one.get("ms", {})
        table.add_row(
            name,
            f"{100 * one['accuracy']:.2f}",
            f"{100 * one['accuracy_before']:.2f}" if "accuracy_before" in one else "-",
            f"{one['macs'] / 1e6:.1f}",
            f"{one['bit_operations'] / 1e9:.1f}",
            f"{one['file_bytes'] / 1e3:.0f}",
            str(ms.get("onnxruntime 64", {}).get("ratio", "-")),
            str(ms.get("torch 64", {}).get("ratio", "-")),
        )
    Console(width=140).print(table)


def seeds(caches: list[Path], depth: int) -> list[dict[str, Any]]:
    """The accuracies of each method over the seeds of several caches, their mean and deviation."""
    lines = []
    table = Table("model", "seeds", "accuracy %, each", "mean", "deviation")
    all_found = [known(cache) for cache in caches]
    for name, first in all_found[0].items():
        if first["depth"] != depth or first["method"] == "-":
            continue
        each = [100 * found[name]["accuracy"] for found in all_found if name in found]
        mean = float(np.mean(each))
        deviation = float(np.std(each, ddof=1)) if len(each) > 1 else 0.0
        lines.append({"model": name, "each": each, "mean": mean, "deviation": deviation})
        listed = ", ".join([f"{value:.2f}" for value in each])
        table.add_row(name, str(len(each)), listed, f"{mean:.2f}", f"{deviation:.2f}")
    Console(width=140).print(table)
    return lines


PAGE = """\
# ResNet-{depth} on CIFAR-10: every cheaper form of it at its cost, alone and with exits on top.
# Written by benchmarks/cheaper_parts.py --page from the models in {cache}.
title = "ResNet-{depth} on CIFAR-10, cheaper and with exits"
train = "cifar10/train:{data}/cifar10[0:5000]"
calibration = "cifar10:{data}/cifar10[1000:3000]"
test = "cifar10:{data}/cifar10[5000:7000]"
batch-size = 64
seeds = [0]
budgets = [0.3, 0.5, 0.75, 1.0]
risk = "accuracy_gap"
at-most = 0.01
engine = "onnxruntime"
wall-clock = true
wall-clock-budget = 0.75
repeats = 9
"""
METHOD = """
[method.{name}]
model = "{spec}"
weights = "{weights}"
static = true

[method.{name}-exits]
start = "{name}"
at = "layer1,layer2"
recipe = "hinge"
"""


def page(args: argparse.Namespace, found: dict[str, dict[str, Any]], file: Path) -> None:
    """Write a file for `offramp compare` with every model of one depth in the cache."""
    text = PAGE.format(depth=args.depth, data=args.data, cache=args.cache)
    for name, one in found.items():
        if one["depth"] != args.depth:
            continue
        weights = args.data / "weights" / f"cifar10_{name}.safetensors"
        if one["method"] != "-":
            weights = args.cache / f"{name}.safetensors"
        short = name if one["method"] == "-" else one["method"]
        text += METHOD.format(name=short, spec=one["spec"], weights=weights)
    file.write_text(text)
    print(f"written: {file}")


def main() -> None:
    """Convert and recover, or time, or make ladders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--layer-epochs", type=int, default=1)
    parser.add_argument(
        "--figures", default="5000:10000", help="test rows that accuracy is measured on"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--kernel", action="store_true", help="time a convolution over packed bits")
    parser.add_argument("--seeds", type=Path, nargs="+", help="caches of other seeds")
    parser.add_argument("--page", type=Path, help="a file for offramp compare to write")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="stop before a method once so long has passed"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = known(args.cache)
    start = time.monotonic()
    result: Any = found
    if args.kernel:
        result = kernel(max(15, args.repeats))
    elif args.seeds:
        result = seeds([args.cache, *args.seeds], args.depth)
    elif args.page:
        page(args, found, args.page)
    elif args.timed:
        timed(args, found)
    elif args.ladder:
        result = ladders(args, found)
        print(json.dumps(result, indent=1))
    else:
        for depth in (20, 56):
            if f"resnet{depth}" not in found:
                found[f"resnet{depth}"] = plain_figures(args.data, depth, args.figures)
                keep(args.cache, found)
        for name in args.only.split(",") if args.only else METHODS:
            key = f"resnet{args.depth}-{name}"
            if key in found:
                continue
            if time.monotonic() - start > 60 * args.minutes:
                print("time is up; run this again to go on")
                break
            try:
                found[key] = recovered(args, name, args.depth)
            except OfframpError as problem:
                print(f"{key}: {problem}", flush=True)
                continue
            keep(args.cache, found)
            print(
                key,
                f"{found[key]['accuracy']:.4f}",
                f"{found[key]['cpu_seconds']:.0f} s of CPU",
                flush=True,
            )
    show(found)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
