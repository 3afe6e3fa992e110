"""Answer rows with the network in this folder. Needs NumPy and ONNX Runtime, and Pillow for images.

    python run.py rows.npy                  an array [B, ...]
    python run.py rows.npz -o answers.npz   named arrays, for a network with several inputs
    python run.py cat.png dog.png           images

Prints one line per row: its number, the answer (a class), the exit that answered, and whether the
row is flagged because a score or a logit was not finite. From Python: `import run; run.run(x)`.

Before anything runs, every file of this folder, run.py included, is compared with its digest in
manifest.json. Apart from the rows, no file outside this folder is opened.
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
    """The folder, the rows or the output cannot be used. The message is one sentence."""


# 1. Answer rows.


def run(x: Any, *, threads: int | None = None) -> dict[str, Any]:
    """Answer rows.

    Args:
        x: an array [B, ...], or a tuple or a mapping of arrays for a network with several inputs.
        threads: number of ONNX Runtime threads; None uses all cores.

    Returns:
        "logits" [B, C]; "exit" [B], index into manifest.json's "exits"; "why" [B], 0 if a gate let
        the row leave, 1 at the network's end, 2 at the deepest exit of the plan; "flagged" [B].
    """
    manifest, thresholds, _ = contents()
    tensors = named_inputs(x, manifest["inputs"])
    if manifest["one_file"] is None:
        return run_stages(manifest, thresholds, tensors, threads)
    # One graph holds the whole plan; its thresholds are inputs.
    for stage in manifest["stages"]:
        if stage["gate"]:
            limits = [thresholds[stage["name"]][route] for route in stage["routes"]]
            value = limits if len(limits) > 1 else limits[0]
            tensors[f"threshold/{stage['name']}"] = np.array(value, np.float32)
    results = session(manifest["one_file"], threads).run(OUTPUTS, tensors)
    return dict(zip(OUTPUTS, results, strict=True))


def run_stages(manifest: Any, thresholds: Any, tensors: Any, threads: int | None) -> dict[str, Any]:
    """Run the graphs stage by stage; each stage sees only the rows that have not left yet."""
    count = len(next(iter(tensors.values())))
    outputs = {
        "logits": np.zeros((count, manifest["classes"]), manifest["logits"]),
        "exit": np.zeros(count, np.int64),
        "why": np.zeros(count, np.int64),
        "flagged": np.zeros(count, bool),
    }
    # A later exit may read an earlier one that a row skipped; it then reads this default value.
    for default in manifest["defaults"]:
        shape = (count, *default["shape"])
        tensors[default["name"]] = np.full(shape, default["value"], default["dtype"])

    # For each stage, the groups of rows that wait for it: row numbers [b] and their tensors.
    waiting: dict[str, list[Any]] = {}
    for stage in manifest["stages"]:
        waiting[stage["name"]] = []
    if count:
        first = manifest["stages"][0]["name"]
        waiting[first].append((np.arange(count), tensors))

    for stage in manifest["stages"]:
        groups = waiting.pop(stage["name"])
        if not groups:
            continue
        rows, tensors = merged(groups)

        # Run the graph of this stage on its rows.
        graph_inputs = {name: tensors[name] for name in stage["reads"]}
        results = session(stage["file"], threads).run(stage["writes"], graph_inputs)
        tensors.update(zip(stage["writes"], results, strict=True))

        # The gate picks an edge for each row [b]. Without a gate all rows take edge 0.
        edges = np.zeros(len(rows), np.int64)
        if stage["gate"]:
            scores = tensors[stage["name"] + "/score"].reshape(len(rows), -1)[:, stage["routes"]]
            limits = [thresholds[stage["name"]][route] for route in stage["routes"]]
            edges = choose(scores, limits)
            outputs["flagged"][rows] |= np.isnan(scores).any(axis=1)

        # Split the rows by edge: they leave with an answer, or wait for a later stage.
        for number, edge in enumerate(stage["edges"]):
            mask = edges == number
            if not mask.any():
                continue
            if edge["to"] is None:
                record_answers(outputs, stage, rows[mask], tensors, mask)
                continue
            carried = {}
            for tensor in edge["carries"]:
                carried[tensor["name"]] = tensors[tensor["name"]][mask]
            waiting[edge["to"]].append((rows[mask], carried))
    return outputs


def choose(scores: Any, thresholds: Any) -> Any:
    """The edge of each row: the first whose score reaches its threshold, otherwise the last.

    A NaN score does not reach any threshold, and no score reaches a threshold of +inf.

    Args:
        scores: [B, K - 1].
        thresholds: [K - 1].

    Returns:
        [B], from 0 to K - 1.
    """
    limits = np.float32(thresholds)
    refused = ~((scores >= limits) & (limits < np.inf))  # [B, K - 1]
    # The running product is 1 until the first edge that accepts, so its sum is that edge's index.
    return refused.cumprod(axis=1).sum(axis=1)


def record_answers(outputs: Any, stage: Any, rows: Any, tensors: Any, mask: Any) -> None:
    """Write the answers of the rows that leave at this stage to their places in the outputs."""
    logits = tensors[stage["name"] + "/logits"][mask]
    outputs["logits"][rows] = logits
    outputs["exit"][rows] = stage["exit"]
    outputs["why"][rows] = stage["why"]
    outputs["flagged"][rows] |= ~np.isfinite(logits).all(-1)


def merged(groups: Any) -> Any:
    """Join groups of rows into one group, in the order of x."""
    if len(groups) == 1:
        return groups[0]
    rows = np.concatenate([group[0] for group in groups])
    order = np.argsort(rows)
    tensors = {}
    for name in groups[0][1]:
        tensors[name] = np.concatenate([group[1][name] for group in groups])[order]
    return rows[order], tensors


def named_inputs(x: Any, expected: Any) -> dict[str, Any]:
    """The arrays of x by the names of the graph's inputs. Refuses other names, shapes and types."""
    arrays = {}
    if isinstance(x, tuple):
        for number, value in enumerate(x):
            arrays[f"x/{number}"] = np.ascontiguousarray(value)
    elif hasattr(x, "keys"):
        for name in x:
            key = name if name == "x" else f"x/{name}"
            arrays[key] = np.ascontiguousarray(x[name])
    else:
        arrays["x"] = np.ascontiguousarray(x)

    got = {}
    for name, value in arrays.items():
        got[name] = f"[B, {', '.join(map(str, value.shape[1:]))}] {value.dtype}"
    wanted = {}
    for entry in expected:
        wanted[entry["name"]] = f"[B, {', '.join(map(str, entry['shape']))}] {entry['dtype']}"
    if got != wanted:
        raise Refused(f"the inputs must be {wanted}, got {got}")
    if len(set(map(len, arrays.values()))) > 1:
        raise Refused("all inputs must have the same number of rows")
    return arrays


@cache
def session(file: str, threads: int | None) -> Any:
    """An ONNX Runtime session for one graph, made from the bytes that were checked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0 lets ONNX Runtime take all cores
    options.log_severity_level = 3
    # Threads of one graph do not keep the cores busy while the next graph runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    _, _, files = contents()
    return onnxruntime.InferenceSession(files[file], options, providers=["CPUExecutionProvider"])


# 2. Check the folder.


@cache
def contents() -> tuple[Any, Any, dict[str, bytes]]:
    """The manifest, the plan's thresholds and the bytes of all files, each checked."""
    # A new export may replace the folder while it is read: then the manifest differs, and we retry.
    for _ in range(5):
        manifest = plain_file("manifest.json")
        try:
            return checked(manifest)
        except Refused:
            if plain_file("manifest.json") == manifest:
                raise
    raise Refused("the folder was replaced five times while it was read. Start again")


def checked(text: bytes) -> tuple[Any, Any, dict[str, bytes]]:
    """The result of `contents`, for the bytes of manifest.json."""
    manifest = document(text, "manifest.json")
    if manifest["schema"] != SCHEMA:
        raise Refused(f"manifest.json must have the schema {SCHEMA}, got {manifest['schema']}")
    # Read each file once. Only these bytes are used later, so a later edit has no effect.
    files = {}
    for name, digest in manifest["files"].items():
        files[name] = plain_file(name)
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise Refused(f"{name} was changed after the export. Export again")
    needed = {"run.py", "plan.json"}
    if manifest["one_file"] is None:
        for stage in manifest["stages"]:
            needed.add(stage["file"])
    else:
        needed.add(manifest["one_file"])
    if needed != set(files):
        raise Refused(f"manifest.json must list {sorted(needed)}, got {sorted(files)}")
    plan = document(files["plan.json"], "plan.json")
    return manifest, plan["thresholds"], files


def document(text: bytes, name: str) -> Any:
    """Parse a JSON document. Its checksum and its layout must be as offramp wrote them."""
    try:
        content = json.loads(text)
        body = {key: content[key] for key in content if key not in ("schema", "checksum")}
        compact = json.dumps(body, sort_keys=True, separators=(",", ":"))
        checksum = hashlib.sha256(compact.encode()).hexdigest()[:16]
        layout = (json.dumps(content, indent=1) + "\n").encode()
        unchanged = checksum == content["checksum"] and layout == text
    except (ValueError, TypeError, KeyError, RecursionError):
        unchanged = False
    if not unchanged:
        raise Refused(f"{name} was changed after the export. Export again")
    return content


def plain_file(name: str) -> bytes:
    """The bytes of a file of this folder. Refuses links, and names that lead out of the folder."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or ":" in name:
        raise Refused(f"a file name must not contain a path, got {name!r}")
    path = FOLDER / name
    if path.is_symlink() or not path.is_file():
        raise Refused(f"{name} is missing or not a regular file. Export again")
    return path.read_bytes()


# 3. The command line.


def read_rows(paths: list[str]) -> Any:
    """The array or arrays of a file, or images as uint8 [B, C, H, W] in the network's size."""
    for path in paths:
        if not Path(path).is_file():
            raise Refused(f"{path} is missing or not a regular file")
    if Path(paths[0]).suffix in (".npy", ".npz"):
        if len(paths) > 1:
            raise Refused(f"the rows must be in one .npy or .npz file, got {len(paths)} files")
        return np.load(paths[0], allow_pickle=False)

    from PIL import Image, ImageOps  # imported here because arrays do not need Pillow

    channels, height, width = contents()[0]["inputs"][0]["shape"]
    mode = "L" if channels == 1 else "RGB"
    images = []
    for path in paths:
        image = ImageOps.exif_transpose(Image.open(path)).convert(mode)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.uint8).reshape(height, width, channels)
        images.append(pixels.transpose(2, 0, 1))  # [H, W, C] -> [C, H, W]
    return np.stack(images)  # [B, C, H, W]


def require_output(output: Path, row_files: list[str]) -> None:
    """Refuse to replace the rows, and any file other than earlier answers."""
    if output.suffix != ".npz":
        raise Refused(f"the output must end in .npz, got {output}")
    if not output.exists():
        return
    for path in row_files:
        if Path(path).exists() and output.samefile(path):
            raise Refused(f"the output must not be the file of the rows, got {output}")
    with np.load(output, allow_pickle=False) as earlier:
        if sorted(earlier.files) != sorted(OUTPUTS):
            raise Refused(f"the output must be a new file or earlier answers, got {output}")


def print_answers(outputs: dict[str, Any], exits: list[str]) -> None:
    """Print one CSV line per row. An exit name that looks like a formula gets a ' before it."""
    safe_names = []
    for name in exits:
        is_formula = name.startswith(tuple("=+-@\t\r\n"))
        safe_names.append(f"'{name}" if is_formula else name)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["row", "answer", "exit", "flagged"])
    classes = outputs["logits"].argmax(1)  # [B, C] -> [B]
    for row, answer in enumerate(classes):
        exit_name = safe_names[outputs["exit"][row]]
        writer.writerow([row, answer, exit_name, bool(outputs["flagged"][row])])
    sys.stdout.flush()


def main(words: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", help="an .npy, an .npz, or images")
    parser.add_argument("-o", "--output", type=Path, help="an .npz for logits, exit, why, flagged")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; by default all cores")
    options = parser.parse_args(words)
    try:
        manifest, _, _ = contents()
        if options.output:
            require_output(options.output, options.rows)
        outputs = run(read_rows(options.rows), threads=options.threads)
        if options.output:
            # Write next to the output and rename, so that a crash leaves no half file.
            temporary = options.output.with_name(options.output.name + ".part.npz")
            np.savez(temporary, **outputs)
            temporary.replace(options.output)
        print_answers(outputs, manifest["exits"])
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
    except Exception as problem:  # a file of rows can be wrong in any way
        print("run.py:", *str(problem or type(problem).__name__).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
