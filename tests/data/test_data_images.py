"""Images below a folder, without labels: `images:DIR`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import offramp as off
from offramp.errors import BadData, BadFile, Notice
from written_files import png

X = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 5), dtype=np.uint8)
NAMES = ("b.png", "a.png", "deeper/c.png", "deeper/still/d.png", "Z.PNG")


@pytest.fixture
def photos(tmp_path):
    """Five images, some of them in deeper folders."""
    for name, image in zip(NAMES, X, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return tmp_path


def test_images_have_no_labels_and_keep_the_order_of_folders_and_names(photos):
    data = off.rows(f"images:{photos}")
    assert (len(data), data.labels, data.class_names) == (5, None, None)
    (batch,) = data.batches(9)
    order = [4, 1, 0, 2, 3]  # Z, a, b, deeper/c, deeper/still/d
    np.testing.assert_array_equal(batch.x, X[order])
    assert batch.y is None
    (some,) = off.rows(f"images:{photos}[1:4:2]").batches(9)
    np.testing.assert_array_equal(some.x, X[[1, 2]])


def test_they_are_resized_as_those_in_class_folders(photos):
    draw = np.random.default_rng(1)
    folder = photos / "root" / "class"
    folder.mkdir(parents=True)
    for number in range(2):
        pixels = draw.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    options = "resize=32&crop=28x20&interpolation=bicubic"
    (found,) = off.rows(f"images:{folder}?{options}").batches(9)
    (labelled,) = off.rows(f"imagefolder:{folder.parent}?{options}").batches(9)
    assert found.x.shape == (2, 3, 28, 20)
    np.testing.assert_array_equal(found.x, labelled.x)
    assert off.rows(f"images@8x9:{photos}").take(np.array([0])).x.shape == (1, 3, 8, 9)


def test_images_of_several_sizes_are_refused_with_the_spec_that_resizes_them(photos):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photos / "a.png")
    with pytest.raises(BadData, match=r"images:.*\?resize=256&crop=224"):
        list(off.rows(f"images:{photos}").batches(9))


def test_other_files_are_counted_and_hidden_ones_are_not(photos):
    for name in ("notes.txt", ".hidden.png", "Thumbs.db", "deeper/film.mp4"):
        (photos / name).write_bytes(b"?")
    with pytest.warns(Notice, match=r"left out (1 \.txt, 1 \.mp4|1 \.mp4, 1 \.txt), expected PNG"):
        assert len(off.rows(f"images:{photos}")) == 5


def test_places_without_images_say_what_is_there(tmp_path):
    with pytest.raises(BadFile, match="does not exist"):
        off.rows(f"images:{tmp_path / 'none'}")
    with pytest.raises(BadFile, match="holds no files; expected PNG, JPEG"):
        off.rows(f"images:{tmp_path}")
    (tmp_path / "notes.txt").write_bytes(b"?")
    with pytest.raises(BadFile, match=r"holds 1 \.txt; expected PNG, JPEG"):
        off.rows(f"images:{tmp_path}")
    with pytest.raises(BadData, match=r"got the split 'test'; it has none: write images:.*test"):
        off.rows(f"images/test:{tmp_path}")


def test_images_outside_of_class_folders_are_answered_with_this_source(photos):
    folder = photos / "deeper" / "still"
    with pytest.raises(BadFile, match=f"or read them without labels, images:{folder}$"):
        off.rows(f"imagefolder:{folder}")
