"""Images into uint8 [C, H, W]; Pillow is imported where used. Only raster formats that run nothing are opened."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from offramp.data._check import reading
from offramp.errors import BadData, BadFile, MissingExtra
from offramp.files import Array

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
MOST_PIXELS = 64_000_000
Size = tuple[int, int]  # height, width


def pillow() -> Any:
    """The module PIL.Image, or MissingExtra."""
    try:
        from PIL import Image
    except ImportError as problem:
        raise MissingExtra("pillow", "data", "reading images") from problem
    return Image


def decode(data: bytes, where: str, mode: str | None = None, size: Size | None = None) -> Array:
    """An encoded image -> uint8 [C, H, W]; `where` names it in errors. See `from_pil` for mode and size."""
    with _opened(data, where) as image:
        return from_pil(image, where, mode, size)


def shape_of(data: bytes, where: str) -> tuple[str, Size]:
    """The mode ("L" or "RGB") and the height and width of an encoded image, from its header alone."""
    with _opened(data, where) as image:
        return _mode(image), (image.height, image.width)


def _opened(data: bytes, where: str) -> Any:
    with reading(where, "a PNG, JPEG, BMP or WebP image"):
        image = pillow().open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise BadFile(f"{where} claims {image.height}x{image.width} pixels; expected at most {MOST_PIXELS}: shrink it")
    return image


def from_pil(image: Any, where: str, mode: str | None = None, size: Size | None = None) -> Array:
    """A PIL image -> uint8 [C, H, W], C = 1 for greyscale and 3 for anything else (alpha is dropped).

    `mode` ("L" or "RGB") fixes C, `size` (H, W) resizes bilinearly. A colour image is never made grey: BadData.
    """
    own = _mode(image)
    if image.mode.startswith(("I", "F")):
        raise BadData(f"{where} has {image.mode} pixels of more than 8 bits; expected 8 bits a channel: convert it")
    if mode == "L" and own != "L":
        raise BadData(f"{where} is a colour image among grey ones; expected one kind: convert the images to RGB")
    with reading(where, "an image"):
        plain = image.convert(mode or own)
        if size is not None and (plain.height, plain.width) != size:
            plain = plain.resize((size[1], size[0]), pillow().Resampling.BILINEAR)
        pixels: Array = np.asarray(plain, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _mode(image: Any) -> str:
    return "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
