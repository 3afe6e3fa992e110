"""Writers of small files for the tests of this folder."""

from __future__ import annotations

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np

CLASSES = ("cat", "dog", "owl")


def png(image: np.ndarray) -> bytes:
    """A uint8 [C, H, W] image as PNG."""
    from PIL import Image

    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def write_idx(path: Path, magic: int, array: np.ndarray) -> None:
    content = (
        struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_parquet(
    path: Path, x: object, y: object = None, *, label: str = "label", group: int = 10
) -> Path:
    """A Parquet file of an image (uint8 [n, C, H, W]) or any pyarrow column x, with Hugging Face's
    metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(x, np.ndarray):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        x = pa.array([{"bytes": png(image), "path": None} for image in x], type=kind)
    columns = {"image": x} if y is None else {"image": x, label: y}
    features = {"image": {"_type": "Image"}, label: {"names": list(CLASSES), "_type": "ClassLabel"}}
    table = pa.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, compression="none")
    return path
