"""Answers from the folder in which this file lies; needs numpy and onnxruntime, and Pillow for images.

python run.py images.npy [-o answers.npz]      rows [B, ...]; .npz with inputs by name; or files of images
"""

import argparse
import json
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

HERE, NAMES = Path(__file__).parent, ["logits", "exit", "why", "flagged"]


def choose(scores: Any, threshold: Any) -> Any:
    """[B] bool: the rows that leave. A NaN never does, and at a threshold of +inf nothing does."""
    return (scores >= np.float32(threshold)) & (np.float32(threshold) < np.inf)


def run(x: Any, *, threads: int | None = None) -> dict[str, Any]:
    """{"logits" [B, C], "exit" [B], "why" [B], "flagged" [B]} for an array [B, ...], a tuple or a mapping of them."""
    about, plan = read("manifest.json"), read("plan.json")["thresholds"]
    state = inputs(x, about["inputs"])
    if about["one_file"]:
        given = state | {f"threshold/{gate}": np.array(plan[gate][0], np.float32) for gate in about["gates"]}
        return dict(zip(NAMES, session(about["one_file"], threads).run(NAMES, given), strict=True))
    rows = np.arange(len(next(iter(state.values()))))
    logits = np.zeros((len(rows), about["classes"]), about["logits"])
    exit_, why, flagged = (np.zeros(len(rows), kind) for kind in (np.int64, np.int64, bool))
    for part in takewhile(lambda _: len(rows), about["parts"]):  # noqa: B023 - the rows that are left by then
        given = {name: state[name] for name in part["reads"]}
        state |= zip(part["writes"], session(part["file"], threads).run(part["writes"], given), strict=True)
        score = state.get(part["node"] + "/score", np.zeros(len(rows)))
        leave = choose(score, plan[part["node"]][0]) if part["gate"] else np.full(len(rows), part["last"])
        flagged[rows] |= part["gate"] & np.isnan(score)
        if leave.any():
            own, gone = state[part["node"] + "/logits"][leave], rows[leave]
            logits[gone], exit_[gone], why[gone] = own, part["place"], part["why"]
            flagged[gone] |= ~np.isfinite(own).all(-1)
            rows, state = rows[~leave], {name: state[name][~leave] for name in part["keeps"]}
    return dict(zip(NAMES, (logits, exit_, why, flagged), strict=True))


def inputs(x: Any, expected: Any) -> dict[str, Any]:
    """The inputs by their names in the graphs. Raises ValueError where names, shapes or types are not as expected."""
    named = dict(enumerate(x)) if isinstance(x, tuple) else x if hasattr(x, "keys") else {"x": x}
    found = {name if name == "x" else f"x/{name}": np.ascontiguousarray(value) for name, value in named.items()}
    told = {name: f"[B, {str([*value.shape[1:]])[1:-1]}] {value.dtype}" for name, value in found.items()}
    wanted = {one["name"]: f"[B, {str(one['shape'])[1:-1]}] {one['dtype']}" for one in expected}
    if told != wanted or len({len(value) for value in found.values()}) > 1:
        raise ValueError(f"the inputs are {told}, expected {wanted} of as many rows each; name and convert them so")
    return found


@cache
def read(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


@cache
def session(file: str, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or 0, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads of one graph leave the next alone
    return onnxruntime.InferenceSession(str(HERE / file), options, providers=["CPUExecutionProvider"])


def load(paths: list[str]) -> Any:
    if Path(paths[0]).suffix in (".npy", ".npz"):
        return np.load(paths[0], allow_pickle=False)
    from PIL import Image, ImageOps  # only here, so that arrays do without it

    channels, *size = read("manifest.json")["inputs"][0]["shape"]
    plain = (ImageOps.exif_transpose(Image.open(path)).convert({1: "L"}.get(channels, "RGB")) for path in paths)
    pixels = [np.asarray(one.resize(size[::-1], Image.Resampling.BILINEAR), np.uint8) for one in plain]
    return np.stack([one.reshape(*size, channels).transpose(2, 0, 1) for one in pixels])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("rows", nargs="+"), parser.add_argument("-o")
    args = parser.parse_args()
    try:
        found, exits = run(load(args.rows)), read("manifest.json")["exits"]
        if args.o:
            np.savez(f"{args.o}.part.npz", **found)
            Path(f"{args.o}.part.npz").replace(args.o)
        told = enumerate(zip(found["logits"].argmax(1), found["exit"], found["flagged"], strict=True))
        lines = (f"{row},{own},{exits[at]},{bad}\n" for row, (own, at, bad) in told)
        print("row,answer,exit,flagged\n", *lines, sep="", end="", flush=True)
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
    except Exception as problem:  # a damaged file can fail anywhere
        sys.exit(print("run.py:", *str(problem).split(), file=sys.stderr) or 2)
