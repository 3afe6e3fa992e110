"""Answer rows with the network in this folder. Needs NumPy and ONNX Runtime, and Pillow for images.

    python run.py rows.npy                  an array [B, ...]
    python run.py rows.npz -o answers.npz   named arrays, for a network with several inputs
    python run.py cat.png dog.png           images

Prints one line a row: its number, the answer (a class), the exit that gave it, and whether it is
flagged because a score or a logit was not finite. From Python: `import run; run.run(x)`.

Before anything runs, every file of this folder is compared with its digest in manifest.json, this
one included. Nothing outside of the folder is opened but the rows.
"""

import argparse
import csv
import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).absolute().parent
SCHEMA = "offramp/export/3"
OUTPUTS = ["logits", "exit", "why", "flagged"]


class Refused(ValueError):
    """What cannot be run, in one sentence."""


# Deciding


def choose(scores: Any, thresholds: Any) -> Any:
    """Which way each row takes: the first whose score reaches its threshold, otherwise the last.

    A NaN takes none of the ways before the last, and at a threshold of +inf nothing does.

    Args:
        scores: [B, K - 1].
        thresholds: [K - 1].

    Returns:
        [B], from 0 to K - 1.
    """
    limits = np.float32(thresholds)
    refused = ~((scores >= limits) & (limits < np.inf))
    return refused.cumprod(axis=1).sum(axis=1)


def run(x: Any, *, threads: int | None = None) -> dict[str, Any]:
    """Answer rows.

    Args:
        x: an array [B, ...], or a tuple or a mapping of arrays for a network with several inputs.
        threads: of ONNX Runtime; all cores if None.

    Returns:
        "logits" [B, C]; "exit" [B], the number of the exit that answered, counted in
        manifest.json's "exits"; "why" [B], 0 for a gate, 1 for the end, 2 for the deepest exit of
        the plan; "flagged" [B].
    """
    manifest, thresholds = contents()[:2]
    tensors = named_inputs(x, manifest["inputs"])
    if manifest["one_file"]:
        for gate in manifest["gates"]:
            tensors[f"threshold/{gate}"] = np.array(thresholds[gate][0], np.float32)
        results = session(manifest["one_file"], threads).run(OUTPUTS, tensors)
        return dict(zip(OUTPUTS, results, strict=True))

    count = len(next(iter(tensors.values())))
    logits = np.zeros((count, manifest["classes"]), manifest["logits"])
    exits = np.zeros(count, np.int64)
    why = np.zeros(count, np.int64)
    flagged = np.zeros(count, bool)
    for one in manifest["defaults"]:  # what stands for an exit until it has run for a row
        tensors[one["name"]] = np.full((count, *one["shape"]), one["value"], one["dtype"])
    # By stage the groups of rows that wait for it: row numbers, and what later stages read.
    waiting: dict[str, list[Any]] = {stage["name"]: [] for stage in manifest["stages"]}
    if count:
        waiting[manifest["stages"][0]["name"]].append((np.arange(count), tensors))
    for stage in manifest["stages"]:
        if not waiting[stage["name"]]:
            continue
        rows, tensors = merged(waiting.pop(stage["name"]))
        given = {name: tensors[name] for name in stage["reads"]}
        results = session(stage["file"], threads).run(stage["writes"], given)
        tensors.update(zip(stage["writes"], results, strict=True))

        chosen = np.zeros(len(rows), np.int64)  # with one way all rows take it
        if stage["gate"]:
            scores = tensors[stage["name"] + "/score"].reshape(len(rows), -1)[:, stage["routes"]]
            limits = [thresholds[stage["name"]][route] for route in stage["routes"]]
            chosen = choose(scores, limits)
            flagged[rows] |= np.isnan(scores).any(axis=1)

        for way, edge in enumerate(stage["edges"]):
            here = chosen == way
            if not here.any():
                continue
            if edge["to"] is None:  # answered
                answers = tensors[stage["name"] + "/logits"][here]
                logits[rows[here]] = answers
                exits[rows[here]] = stage["exit"]
                why[rows[here]] = stage["why"]
                flagged[rows[here]] |= ~np.isfinite(answers).all(-1)
                continue
            carried = {one["name"]: tensors[one["name"]][here] for one in edge["carries"]}
            waiting[edge["to"]].append((rows[here], carried))
    return dict(zip(OUTPUTS, (logits, exits, why, flagged), strict=True))


def merged(groups: Any) -> Any:
    """Groups of rows as one, in the order of x."""
    if len(groups) == 1:
        return groups[0]
    rows = np.concatenate([group[0] for group in groups])
    order = np.argsort(rows)
    tensors = {}
    for name in groups[0][1]:
        tensors[name] = np.concatenate([group[1][name] for group in groups])[order]
    return rows[order], tensors


def named_inputs(x: Any, expected: Any) -> dict[str, Any]:
    """Arrays by the names that the graphs have for them. Refuses other names, shapes and types."""
    if isinstance(x, tuple):
        arrays = {f"x/{number}": value for number, value in enumerate(x)}
    elif hasattr(x, "keys"):
        arrays = {name if name == "x" else f"x/{name}": x[name] for name in x}
    else:
        arrays = {"x": x}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}

    got = {}
    wanted = {}
    for name, value in arrays.items():
        got[name] = f"[B, {', '.join(map(str, value.shape[1:]))}] {value.dtype}"
    for one in expected:
        wanted[one["name"]] = f"[B, {', '.join(map(str, one['shape']))}] {one['dtype']}"
    if got != wanted:
        raise Refused(f"the inputs must be {wanted}, got {got}")
    if len({len(value) for value in arrays.values()}) > 1:
        raise Refused("the inputs have different numbers of rows")
    return arrays


# The folder


@cache
def contents() -> tuple[Any, Any, dict[str, bytes]]:
    """The manifest, the plan's thresholds and the bytes of all files, each checked."""
    for _ in range(5):
        text = plain_file("manifest.json")
        try:
            return checked(text)
        except Refused:
            if plain_file("manifest.json") == text:  # else the folder was replaced meanwhile
                raise
    raise Refused("the folder is replaced again and again")


def checked(text: bytes) -> tuple[Any, Any, dict[str, bytes]]:
    """See `contents`. text: the bytes of manifest.json."""
    manifest = document(text, "manifest.json")
    if manifest["schema"] != SCHEMA:
        raise Refused(f"manifest.json must have the schema {SCHEMA}, got {manifest['schema']}")
    files = {}
    for name, digest in manifest["files"].items():
        files[name] = plain_file(name)
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise Refused(f"{name} was changed after the export; export again")
    needed = {"run.py", "plan.json", *(stage["file"] for stage in manifest["stages"])}
    if manifest["one_file"]:
        needed = {"run.py", "plan.json", manifest["one_file"]}
    if needed != set(files):
        raise Refused(f"manifest.json must list {sorted(needed)}, got {sorted(files)}")
    return manifest, document(files["plan.json"], "plan.json")["thresholds"], files


def document(text: bytes, name: str) -> Any:
    """A JSON document whose checksum is right, and that is written as offramp writes it."""
    try:
        found = json.loads(text)
        body = {key: found[key] for key in found if key not in ("schema", "checksum")}
        plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
        right = hashlib.sha256(plain.encode()).hexdigest()[:16] == found["checksum"]
        same = (json.dumps(found, indent=1) + "\n").encode() == text
    except (ValueError, TypeError, KeyError, RecursionError):
        right = same = False
    if not (right and same):
        raise Refused(f"{name} was changed after the export; export again")
    return found


def plain_file(name: str) -> bytes:
    """The bytes of a file in this folder, which is neither a link nor named by a path."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or ":" in name:
        raise Refused(f"{name!r} is no plain file name")
    path = FOLDER / name
    if path.is_symlink() or not path.is_file():
        raise Refused(f"{name} is missing, or no regular file; export again")
    return path.read_bytes()


@cache
def session(file: str, threads: int | None) -> Any:
    """A graph, ready to run, from the bytes that were checked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Threads of one graph do not keep the cores busy while the next graph runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    graph = contents()[2][file]
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


# The command line


def read_rows(paths: list[str]) -> Any:
    """The array or arrays of a file, or images [B, C, H, W] uint8 of the size that is expected."""
    for path in paths:
        if not Path(path).is_file():
            raise Refused(f"{path} is missing, or no regular file")
    if Path(paths[0]).suffix in (".npy", ".npz"):
        if len(paths) > 1:
            raise Refused(f"there must be one file of arrays, got {len(paths)}")
        return np.load(paths[0], allow_pickle=False)
    from PIL import Image, ImageOps  # only here, so that arrays do without it

    channels, height, width = contents()[0]["inputs"][0]["shape"]
    images = []
    for path in paths:
        image = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.uint8).reshape(height, width, channels)
        images.append(pixels.transpose(2, 0, 1))
    return np.stack(images)


def require_output(output: Path, rows: list[str]) -> None:
    """Refuse to replace the rows, or any file that is not an earlier one of answers."""
    if output.suffix != ".npz":
        raise Refused(f"the output must end in .npz, got {output}")
    if output.exists():
        if any(Path(path).exists() and output.samefile(path) for path in rows):
            raise Refused(f"{output} holds the rows; name another output")
        with np.load(output, allow_pickle=False) as earlier:
            if sorted(earlier.files) != sorted(OUTPUTS):
                raise Refused(f"{output} holds something else than answers; name another output")


def print_answers(found: dict[str, Any], exits: list[str]) -> None:
    """CSV. A name that a spreadsheet would take for a formula gets a ' before it."""
    names = [f"'{name}" if name[:1] in tuple("=+-@\t\r\n") else name for name in exits]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["row", "answer", "exit", "flagged"])
    columns = found["logits"].argmax(1), found["exit"], found["flagged"]
    for row, (answer, exit_, flagged) in enumerate(zip(*columns, strict=True)):
        writer.writerow([row, answer, names[exit_], bool(flagged)])
    sys.stdout.flush()


def main(words: list[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", help="an .npy, an .npz, or images")
    parser.add_argument("-o", "--output", type=Path, help="an .npz for logits, exit, why, flagged")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; by default all cores")
    given = parser.parse_args(words)
    try:
        manifest = contents()[0]
        if given.output:
            require_output(given.output, given.rows)
        found = run(read_rows(given.rows), threads=given.threads)
        if given.output:
            temporary = given.output.with_name(given.output.name + ".part.npz")
            np.savez(temporary, **found)
            temporary.replace(given.output)
        print_answers(found, manifest["exits"])
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
    except Exception as problem:  # a file of rows can be wrong in any way
        print("run.py:", *str(problem or type(problem).__name__).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
