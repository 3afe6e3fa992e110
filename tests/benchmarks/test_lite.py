"""benchmarks/lite.py gathers each photograph once, and leaves drawings out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from lite import gather

NOISE = np.random.default_rng(0).integers(0, 256, (120, 130, 3), dtype=np.uint8)


def test_what_is_gathered(tmp_path):
    source = tmp_path / "source"
    (source / "cartoon").mkdir(parents=True)
    Image.fromarray(NOISE).save(source / "photo.png")
    Image.fromarray(NOISE).save(source / "the same.png")
    Image.fromarray(NOISE[:90]).save(source / "small.png")
    Image.fromarray(NOISE // 64 * 64).save(source / "drawing.png")  # 64 colours
    Image.fromarray(NOISE[::-1]).save(source / "cartoon" / "drawn.png")
    (source / "notes.txt").write_text("?")
    assert gather([source], tmp_path / "out") == 1
    (found,) = (tmp_path / "out").iterdir()
    np.testing.assert_array_equal(np.asarray(Image.open(found)), NOISE)


def test_what_is_transparent_becomes_white(tmp_path):
    half = np.concatenate([NOISE, np.full((120, 130, 1), 255, np.uint8)], axis=2)
    half[:60, :, 3] = 0
    (tmp_path / "source").mkdir()
    Image.fromarray(half).save(tmp_path / "source" / "stamp.png")
    assert gather([tmp_path / "source"], tmp_path / "out") == 1
    (found,) = (tmp_path / "out").iterdir()
    pixels = np.asarray(Image.open(found))
    assert (pixels[:60] == 255).all()
    np.testing.assert_array_equal(pixels[60:], NOISE[60:])
