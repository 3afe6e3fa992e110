"""Data sources written as text, and what they give."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from offramp.data import specs
from offramp.data.rows import digests_of, rows
from offramp.errors import BadData, BadFile, InvalidArgument, UnknownName


def gather(data, size=7):
    batches = list(data.batches(size))
    return [
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("x", "y", "row", "digest")
    ]


def test_the_shelf_is_the_files():
    names = ["cifar10", "digits", "imagefolder", "images", "mnist", "npz", "parquet", "tsv"]
    assert specs.names() == names


@pytest.mark.parametrize(
    "spec",
    [
        "cifar10:{}",
        "cifar10/test:{}/cifar10",
        "cifar10:{}/binary",
        "parquet:{}/cifar10",
        "npz:{}/rows.npz",
        "parquet/test:{}/cifar10",
    ],
)
def test_the_same_rows_from_every_format(spec, folder, xy):
    data = rows(spec.format(folder))
    x, y, row, digest = gather(data)
    np.testing.assert_array_equal(x, xy[0])
    np.testing.assert_array_equal(y, xy[1])
    np.testing.assert_array_equal(data.labels, xy[1])
    np.testing.assert_array_equal(digest, digests_of(xy[0]))
    assert row.tolist() == list(range(25))
    assert data.name == spec.format(folder)
    assert data.can_take
    np.testing.assert_array_equal(data.take(np.array([24, 0, 13])).x, xy[0][[24, 0, 13]])


def test_image_folders_are_sorted_by_class(folder, xy):
    data = rows(f"imagefolder:{folder}/folder")
    order = np.argsort(xy[1], kind="stable")
    x, y, _, _ = gather(data)
    np.testing.assert_array_equal(x, xy[0][order])
    np.testing.assert_array_equal(y, xy[1][order])
    assert data.class_names == ("cat", "dog", "owl")


def test_splits(folder, xy):
    np.testing.assert_array_equal(
        gather(rows(f"cifar10/train:{folder}"))[0], np.concatenate([xy[0][::-1], xy[0]])
    )
    assert len(rows(f"cifar10/train:{folder}/binary")) == 125
    np.testing.assert_array_equal(
        rows(f"cifar10/train:{folder}/binary[24:26]").take(np.array([0, 1])).x, xy[0][[24, 0]]
    )
    assert len(rows(f"parquet/train:{folder}/cifar10")) == 50
    grey = rows(f"mnist:{folder}")
    train = rows(f"mnist/train:{folder}/mnist")
    assert grey.fingerprint == train.fingerprint
    assert next(grey.batches(2)).x.shape == (2, 1, 28, 28)
    for bad in (
        "cifar10/dev",
        "mnist/dev",
        "digits/train",
        "npz/dev",
        "imagefolder/dev",
        "parquet/dev",
    ):
        with pytest.raises((BadData, BadFile)):
            rows(f"{bad}:{folder / 'rows.npz' if bad == 'npz/dev' else folder / 'cifar10'}")


def test_selections(folder, xy):
    for text, kept in {
        "[5:9]": slice(5, 9),
        "[:3]": slice(3),
        "[20:]": slice(20, None),
        "[1:20:7]": slice(1, 20, 7),
        "[::10]": slice(None, None, 10),
    }.items():
        for source in ("cifar10:{}", "npz:{}/rows.npz", "cifar10:{}/binary"):
            data = rows(source.format(folder) + text)
            x, _, row, _ = gather(data)
            np.testing.assert_array_equal(row, np.arange(25)[kept])
            np.testing.assert_array_equal(x, xy[0][kept])
            assert len(data) == len(row)
    assert rows(f"npz:{folder}/rows.npz[5:9]").name == f"npz:{folder}/rows.npz[5:9]"


@pytest.mark.parametrize(
    "text",
    [
        "[0:26]",
        "[25:]",
        "[5:5]",
        "[9:3]",
        "[a:b]",
        "[1.5:2]",
        "[-3:]",
        "[:-1]",
        "[3]",
        "[]",
        "[1:2:3:4]",
        "[0:9:0]",
        "[0x1:5]",
        "[1_0:20]",
        "[٣:5]",
    ],
)
def test_bad_selections_tell_how_many_rows_there_are(text, folder):
    with pytest.raises(BadData, match="25 rows"):
        rows(f"npz:{folder}/rows.npz{text}")


def test_digits_stay_as_they_are():
    data = rows("digits[:200]")
    x, y, _, _ = gather(data)
    assert (x.shape, x.dtype, x.max(), y[:3].tolist()) == ((200, 1, 8, 8), np.uint8, 16, [0, 1, 2])
    assert len(rows("digits")) == 1797
    with pytest.raises(BadData, match="no place"):
        rows("digits:somewhere")


def test_a_factory_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "lab_rows.py").write_text(
        "import numpy as np\n"
        "def some(): return np.ones((9, 2)), np.arange(9)\n"
        "def stream(): return (np.ones((3, 2)) for _ in range(3))\n"
        "def again(): return 'digits[:5]'\n"
        "def fails(): raise RuntimeError('no disk')\n"
        "def nothing(): return None\n"
        "number = 3\n"
    )
    (tmp_path / "lab_broken.py").write_text("this is no python")
    monkeypatch.syspath_prepend(tmp_path)
    assert gather(rows("lab_rows:some[2:5]"))[2].tolist() == [2, 3, 4]
    assert [len(batch) for batch in rows("lab_rows:stream[:7]").batches(4)] == [4, 3]
    data = rows("lab_rows:again[1:]")
    assert len(data) == 4
    assert data.name == "lab_rows:again[1:]"
    for bad, message in {
        "fails": "no disk",
        "nothing": "got a NoneType",
        "number": "not callable",
    }.items():
        with pytest.raises(BadData, match=message):
            rows(f"lab_rows:{bad}")
    broken = r"cannot import 'lab_broken:some' \(SyntaxError: .*lab_broken.py, line 1\)\)\."
    with pytest.raises(InvalidArgument, match=broken):
        rows("lab_broken:some")
    for bad in ("lab_rows:other", "no.such.module:factory"):
        with pytest.raises(InvalidArgument, match="cannot import"):
            rows(bad)
    with pytest.raises(BadData, match="cannot take"):
        rows("lab_rows/train:some")
    sys.modules.pop("lab_rows")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("minst:DIR", "mnist"),
        ("cifar:DIR", "cifar10"),
        ("digit", "digits"),
        ("rows:x", "no data source called"),
        ("_tables:x", "no data source called"),
        ("os:/tmp/x", "no data source called"),
    ],
)
def test_unknown_names_offer_the_nearest(text, near):
    with pytest.raises(UnknownName, match=near):
        rows(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "[0:3]",
        "/x:y",
        "imagefolder@0x3:DIR",
        "imagefolder@99999x3:DIR",
        "a@3:DIR",
        "cifar10/:DIR",
    ],
)
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(InvalidArgument):
        rows(text)


def test_only_images_can_be_resized(folder):
    x = next(rows(f"imagefolder@16x8:{folder}/folder").batches(4)).x
    assert (x.shape, x.dtype) == ((4, 3, 16, 8), np.uint8)
    assert next(rows(f"parquet@5x6:{folder}/cifar10[3:5]").batches(4)).x.shape == (2, 3, 5, 6)
    for source in ("npz@8x8:{}/rows.npz", "cifar10@8x8:{}", "digits@8x8"):
        with pytest.raises(BadData, match="only imagefolder, images and parquet resize"):
            rows(source.format(folder))


@pytest.mark.parametrize(
    "spec",
    [
        "cifar10:{}/none",
        "mnist:{}/none",
        "npz:{}/none.npz",
        "parquet:{}/none",
        "imagefolder:{}/none",
        "npz:{}",
        "parquet:{}/mnist",
        "imagefolder:{}/mnist",
        "imagefolder:{}/rows.npz",
        "cifar10:{}/rows.npz",
        "parquet:{}/rows.npz",
        "cifar10",
        "npz",
        "mnist:\0",
    ],
)
def test_missing_and_wrong_places_are_bad_files(spec, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFile):
        rows(spec.format(folder))


def test_no_place():
    for name in ("parquet", "imagefolder"):
        with pytest.raises((BadData, BadFile)):
            rows(name)
