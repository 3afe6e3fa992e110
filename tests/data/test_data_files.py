"""Files that are wrong, odd or damaged: each becomes a sentence, never a traceback from a
library.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from offramp.data.rows import rows
from offramp.errors import BadData, BadFile, MissingExtra, OfframpError
from written_files import png, write_idx, write_parquet

Y = [0, 1, 2, 1]
X = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)


def walk(spec, size=3):
    return list(rows(spec).batches(size))


def refused(spec, message, error=OfframpError):
    with pytest.raises(error, match=message):
        walk(spec)


def test_npz_names_and_contents(tmp_path):
    np.savez(tmp_path / "keras.npz", x_train=X, y_train=Y, x_test=X[:2], y_test=Y[:2])
    assert len(rows(f"npz:{tmp_path}/keras.npz")) == 2
    assert len(rows(f"npz/train:{tmp_path}/keras.npz")) == 4
    np.savez(tmp_path / "features.npz", features=X.astype(np.float32))
    assert walk(f"npz:{tmp_path}/features.npz")[0].y is None
    np.savez(tmp_path / "pickled.npz", x=np.array([{}, []], dtype=object))
    refused(f"npz:{tmp_path}/pickled.npz", "without pickles", BadFile)
    np.savez(tmp_path / "labels.npz", x=X, y=np.array([0, 1, -1, 2]))
    refused(f"npz:{tmp_path}/labels.npz", "-1 at row 2", BadData)
    np.savez(tmp_path / "short.npz", x=X, y=Y[:3])
    refused(f"npz:{tmp_path}/short.npz", "one class index per row", BadData)
    np.savez(tmp_path / "other.npz", a=X)
    refused(f"npz:{tmp_path}/other.npz", r"holds \['a'\]", BadData)
    np.save(tmp_path / "one.npy", X)
    refused(f"npz:{tmp_path}/one.npy", "single array", BadFile)
    (tmp_path / "text.npz").write_text("hello")
    refused(f"npz:{tmp_path}/text.npz", "damaged", BadFile)


def test_npz_with_several_inputs(tmp_path):
    top = np.arange(12.0).reshape(4, 3)
    bottom = np.arange(4)
    np.savez(tmp_path / "two.npz", **{"x/top": top, "x/bottom": bottom}, y=np.array([0, 1, 0, 1]))
    (batch,) = rows(f"npz:{tmp_path / 'two.npz'}[1:3]").batches(8)
    assert batch.x.keys() == {"top", "bottom"}
    assert batch.x["bottom"].tolist() == [1, 2]
    assert batch.y.tolist() == [1, 0]


def test_parquet_columns_of_numbers(tmp_path):
    lists = {
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 90),
        "lists": pa.array(X.reshape(4, -1).tolist(), type=pa.list_(pa.uint8())),
        "nested": pa.array(X.tolist(), type=pa.list_(pa.list_(pa.list_(pa.uint8())))),
    }
    for name, column in lists.items():
        write_parquet(tmp_path / f"{name}.parquet", column, Y, label="target", group=3)
        (batch,) = walk(f"parquet:{tmp_path}/{name}.parquet", 9)
        np.testing.assert_array_equal(batch.x, X if name == "nested" else X.reshape(4, -1))
        assert batch.y.tolist() == Y
    uneven = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0], [6.0, 7.0]])
    write_parquet(tmp_path / "uneven.parquet", uneven, Y)
    refused(f"parquet:{tmp_path}/uneven.parquet", "row 2 differs in length", BadData)
    write_parquet(
        tmp_path / "groups.parquet", pa.array([[1.0], [2.0], [3.0, 4.0], [5.0, 6.0]]), Y, group=2
    )
    refused(f"parquet:{tmp_path}/groups.parquet", "row 2 .* has shape", BadData)
    write_parquet(tmp_path / "nulls.parquet", pa.array([[1.0], None, [2.0], [3.0]]), Y)
    refused(f"parquet:{tmp_path}/nulls.parquet", "row 1 is null", BadData)
    write_parquet(tmp_path / "inner.parquet", pa.array([[1.0], [None], [2.0], [3.0]]), Y)
    refused(f"parquet:{tmp_path}/inner.parquet", "hold nulls", BadData)
    refused(f"parquet@3x3:{tmp_path}/fixed.parquet", "cannot be resized", BadData)


def test_parquet_labels(tmp_path):
    write_parquet(tmp_path / "none.parquet", X)
    assert walk(f"parquet:{tmp_path}/none.parquet")[0].y is None
    write_parquet(tmp_path / "fine.parquet", X, Y, label="fine_label")
    data = rows(f"parquet:{tmp_path}/fine.parquet")
    assert data.class_names == ("cat", "dog", "owl")
    assert data.labels.tolist() == Y
    write_parquet(tmp_path / "null.parquet", X, [0, None, 1, 2])
    refused(f"parquet:{tmp_path}/null.parquet", "nan at row 1", BadData)
    write_parquet(tmp_path / "odd.parquet", X, [[1], [2], [3], [4]])
    refused(f"parquet:{tmp_path}/odd.parquet", "dtype object", BadData)
    write_parquet(tmp_path / "negative.parquet", X, [0, 1, 2, -7])
    refused(f"parquet:{tmp_path}/negative.parquet", "-7 at row 3", BadData)


def test_parquet_files_that_do_not_fit(tmp_path):
    write_parquet(tmp_path / "text.parquet", pa.array(["a", "b"]), [0, 1])
    refused(f"parquet:{tmp_path}/text.parquet", "none of which could be x", BadData)
    write_parquet(tmp_path / "empty.parquet", X[:0], pa.array([], pa.int64()))
    refused(f"parquet:{tmp_path}/empty.parquet", "holds no rows", BadData)
    write_parquet(tmp_path / "mixed" / "a.parquet", X, Y)
    write_parquet(tmp_path / "mixed" / "b.parquet", X)
    refused(f"parquet:{tmp_path}/mixed", "no column 'label'", BadFile)
    write_parquet(tmp_path / "cifar10" / "test-0.parquet", X)
    refused(f"cifar10:{tmp_path}", "no label column", BadData)
    write_parquet(tmp_path / "high" / "test-0.parquet", X, [0, 1, 2, 10])
    refused(f"cifar10:{tmp_path}/high", "row 3 .* has label 10", BadData)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "high" / "test-0.parquet").read_bytes()[:-9])
    refused(f"parquet:{tmp_path}/cut.parquet", "truncated", BadFile)


def images_of(path, images):
    write_parquet(path, pa.array(images, type=pa.binary()), list(range(len(images))))
    return f"parquet:{path}"


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


def test_images_that_do_not_fit(tmp_path):
    good = [png(x) for x in X]
    damaged = good[2][:60] + b"\xff" + good[2][61:]
    refused(
        images_of(tmp_path / "a.parquet", [*good[:2], damaged]),
        r"row 2 \(a.parquet\) cannot be read",
        BadFile,
    )
    refused(images_of(tmp_path / "b.parquet", [*good[:2], good[2][:70]]), "row 2", BadFile)
    refused(images_of(tmp_path / "c.parquet", [*good[:2], None]), "row 2 .* no bytes", BadData)
    refused(images_of(tmp_path / "d.parquet", [*good[:2], b"GIF89a"]), "row 2", BadFile)
    refused(
        images_of(tmp_path / "e.parquet", [good[0], png(X[0, :, :4])]),
        r"row 1 .*e.parquet\?resize=256&crop=224",
        BadData,
    )
    grey = png(X[0, :1])
    refused(
        images_of(tmp_path / "f.parquet", [grey, good[0]]),
        "row 1 .* colour image among grey",
        BadData,
    )
    np.testing.assert_array_equal(
        walk(images_of(tmp_path / "g.parquet", [good[0], grey]))[0].x[1], X[[0, 0, 0], 0][:, :]
    )
    deep = encoded(Image.fromarray(np.full((6, 5), 40000, dtype=np.uint16)))
    refused(
        images_of(tmp_path / "h.parquet", [good[0], deep]), "row 1 .* more than 8 bits", BadData
    )
    eps = encoded(Image.fromarray(X[0].transpose(1, 2, 0)), "EPS")
    refused(images_of(tmp_path / "i.parquet", [good[0], eps]), "row 1", BadFile)
    huge = good[0][:16] + struct.pack(">II", 9000, 9000) + good[0][24:]
    refused(images_of(tmp_path / "j.parquet", [huge]), "row 0", BadFile)
    assert walk(images_of(tmp_path / "k.parquet", [grey]).replace(":", "@3x4:", 1))[0].x.shape == (
        1,
        1,
        3,
        4,
    )


def test_image_folders(tmp_path):
    for name in ("b/2.PNG", "a/1.png", "test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(X[0]))
    Image.fromarray(X[1].transpose(1, 2, 0)).convert("RGBA").save(
        tmp_path / "b" / "1.webp", lossless=True
    )
    Image.fromarray(X[1, 0]).save(tmp_path / "b" / "3.bmp")
    (tmp_path / ".hidden").mkdir()
    data = rows(f"imagefolder:{tmp_path}")
    (batch,) = data.batches(9)
    assert batch.y.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(batch.x, np.stack([X[0], X[1], X[0], X[1, [0, 0, 0]]]))
    (tmp_path / "b" / "2b.jpg").write_bytes(encoded(Image.new("RGB", (7, 9)), "JPEG"))
    refused(f"imagefolder:{tmp_path}", r"2b.jpg \(row 3\) is 9x7 .*\?resize=256&crop=224", BadData)
    assert len(walk(f"imagefolder@4x4:{tmp_path}", 9)[0]) == 5
    (tmp_path / "b" / "4.png").write_bytes(png(X[0])[:50])
    refused(f"imagefolder@4x4:{tmp_path}", r"4.png \(row 5\)", BadFile)
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "a", tmp_path / "deep" / split / "a")
    assert (
        len(rows(f"imagefolder:{tmp_path}/deep"))
        == len(rows(f"imagefolder/train:{tmp_path}/deep"))
        == 1
    )
    shutil.rmtree(tmp_path / "deep" / "test")
    refused(f"imagefolder:{tmp_path}/deep", "imagefolder/train:", BadFile)


GREY = np.random.default_rng(2).integers(0, 256, (4, 28, 28))


def mnist(folder, images=GREY, labels=Y, magic=(2051, 2049)):
    folder.mkdir()
    write_idx(folder / "t10k-images-idx3-ubyte.gz", magic[0], np.asarray(images))
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", magic[1], np.asarray(labels))
    return f"mnist:{folder}"


def test_idx_files(tmp_path):
    assert len(rows(mnist(tmp_path / "good"))) == 4
    refused(mnist(tmp_path / "magic", magic=(2049, 2049)), "header", BadFile)
    refused(mnist(tmp_path / "count", labels=Y[:3]), "3 labels for 4 images", BadFile)
    refused(mnist(tmp_path / "label", labels=[1, 2, 3, 11]), "label 11 at row 3", BadFile)
    refused(mnist(tmp_path / "none", images=np.ones((0, 28, 28)), labels=[]), "0 rows", BadData)
    refused(mnist(tmp_path / "shape", images=X[:, 0]), "header", BadFile)
    labels = tmp_path / "good" / "t10k-labels-idx1-ubyte"
    content = struct.pack(">II", 2049, 4) + bytes(Y)
    labels.with_suffix(".gz").unlink()
    for damage, message in {
        content[:-1]: "3 bytes",
        content + b"x": "5 bytes",
        content[:6]: "header",
    }.items():
        labels.write_bytes(damage)
        refused(f"mnist:{tmp_path}/good", message, BadFile)
    labels.with_suffix(".gz").write_bytes(b"no gzip at all")
    refused(f"mnist:{tmp_path}/good", "idx file", BadFile)


def test_binary_records(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for content, message in {
        b"": "0 bytes",
        b"x" * 3072: "3072 bytes",
        b"\x0b" * 6146: "row 0 .* label 11",
    }.items():
        (folder / "test_batch.bin").write_bytes(content)
        refused(f"cifar10:{tmp_path}", message, BadFile)
    (folder / "data_batch_1.bin").write_bytes(b"\x01" * 3073)
    refused(f"cifar10/train:{tmp_path}", "data_batch_2.bin does not exist", BadFile)


@pytest.mark.parametrize(
    ("package", "extra", "spec"),
    [
        ("pyarrow", "data", "cifar10:{}"),
        ("PIL", "data", "imagefolder:{}/folder"),
        ("sklearn", "demo", "digits"),
    ],
)
def test_missing_extras_name_themselves(package, extra, spec, folder, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf"offramp\[{extra}\]"):
        walk(spec.format(folder))


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Small good files of each format: the file to damage and the spec that reads it."""
    root = tmp_path_factory.mktemp("victims")
    np.savez(root / "v.npz", x=X, y=Y)
    np.savez_compressed(root / "z.npz", x=X, y=Y)
    write_parquet(root / "v.parquet", X, Y, group=2)
    write_parquet(root / "n.parquet", pa.array(X.reshape(4, -1).tolist()), Y, group=2)
    digits = mnist(root / "mnist")
    (root / "folder" / "a").mkdir(parents=True)
    for kind in ("png", "jpg", "bmp", "webp"):
        Image.fromarray(X[0].transpose(1, 2, 0)).save(root / "folder" / "a" / f"v.{kind}")
    victims = {path.name: (path, f"{path.suffix[1:]}:{path}") for path in root.glob("*.*")}
    victims |= {path.name: (path, digits) for path in (root / "mnist").iterdir()}
    return victims | {
        path.name: (path, f"imagefolder:{root}/folder")
        for path in (root / "folder" / "a").iterdir()
    }


@pytest.mark.parametrize(
    "name",
    [
        "v.npz",
        "z.npz",
        "v.parquet",
        "n.parquet",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
        "v.png",
        "v.jpg",
        "v.bmp",
        "v.webp",
    ],
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_is_always_a_sentence(name, data, victims):
    path, spec = victims[name]
    good = path.read_bytes()
    if data.draw(st.booleans(), label="truncate"):
        bad = bytearray(good[: data.draw(st.integers(0, len(good) - 1))])
    else:
        bad = bytearray(good)
        for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
            bad[at] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(bad)
        with contextlib.suppress(OfframpError):
            walk(spec)
    finally:
        path.write_bytes(good)
