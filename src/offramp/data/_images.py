"""Images into uint8 [C, H, W]; Pillow is imported where used. Only raster formats that run nothing
are opened.

What is done with an image, always in this order: it is turned as its EXIF orientation says,
converted to grey or RGB (alpha is dropped, palettes and CMYK are converted by Pillow, a PNG of 16
bits a channel keeps the high byte), then resized and cropped as asked. Of several frames the first
is read.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp._support.files import Array
from offramp.data._check import reading
from offramp.errors import BadData, BadFile, MissingExtra

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".gif",
)
MOST_PIXELS = 64_000_000
MOST_SIDE = 8192
ORIENTATION = 0x0112  # the EXIF tag
SWAPPED = (5, 6, 7, 8)  # orientations that exchange height and width
Size = tuple[int, int]  # height, width

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


@dataclass(frozen=True)
class Resizing:
    """How images of any size become images of one size.

    Attributes:
        size: stretch to this height and width.
        short: resize so that the shorter side has this length, which keeps the aspect ratio.
        crop: then cut this height and width out of the middle.
        interpolation: bilinear, bicubic (both antialiased) or nearest.

    `short` and `crop` are torchvision's `Resize(short)` and `CenterCrop(crop)` on PIL images, pixel
    for pixel: the evaluation transform of ImageNet is short=256, crop=(224, 224).
    """

    size: Size | None = None
    short: int | None = None
    crop: Size | None = None
    interpolation: str = "bilinear"

    @property
    def fixes(self) -> Size | None:
        """The size that every image will have; None where it depends on the image."""
        return self.crop or self.size

    def shape(self, own: Size, where: str) -> Size:
        """The height and width that an image of its own height and width gets. Raises BadData for
        one too small.
        """
        if self.size is not None:
            return self.size
        resized = self._resized(own)
        if self.crop is None:
            return resized
        if resized[0] < self.crop[0] or resized[1] < self.crop[1]:
            raise BadData(
                f"{where} is {told(resized)} (height x width) before the crop of "
                f"{told(self.crop)}; expected at least "
                f"as much: add resize={max(self.crop)}, or a larger one"
            )
        return self.crop

    def _resized(self, own: Size) -> Size:
        if self.short is None:
            return own
        less, more = sorted(own)
        longer = int(self.short * more / less)
        return (self.short, longer) if own[0] <= own[1] else (longer, self.short)

    def apply(self, image: Any, where: str) -> Any:
        """A PIL image in the size that `shape` says."""
        own = (image.height, image.width)
        shape = self.shape(own, where)
        resized = self.size or self._resized(own)
        if resized != own:
            kind = getattr(pillow().Resampling, self.interpolation.upper())
            image = image.resize((resized[1], resized[0]), kind)
        if shape == resized:
            return image
        top = round((resized[0] - shape[0]) / 2.0)
        left = round((resized[1] - shape[1]) / 2.0)
        return image.crop((left, top, left + shape[1], top + shape[0]))


AS_THEY_ARE = Resizing()


def resizing(size: Size | None, resize: str, crop: str, interpolation: str) -> Resizing:
    """What `@HxW` and the options `resize=256&crop=224&interpolation=bicubic` of a spec say. Raises
    BadData.
    """
    if size is not None and (resize or crop):
        raise BadData(
            f"got @{told(size)} beside resize or crop; expected one of them: @HxW stretches, they "
            f"do not"
        )
    short = None if not resize else _sides("resize", resize, pair=False)[0]
    cut = None if not crop else _sides("crop", crop, pair=True)
    if short is not None and cut is not None and short < min(cut):
        raise BadData(
            f"got resize={resize} and crop={crop}; expected a crop within what was resized"
        )
    if interpolation and interpolation not in INTERPOLATIONS:
        raise BadData(
            f"got interpolation={interpolation}; expected one of {', '.join(INTERPOLATIONS)}"
        )
    if interpolation and size is None and short is None:
        raise BadData("got interpolation without resize; expected both: nothing else interpolates")
    return Resizing(size, short, cut, interpolation or "bilinear")


def _sides(name: str, text: str, *, pair: bool) -> Size:
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    height = int(match[1]) if match else 0
    width = int(match[2]) if match and match[2] else height
    both = f"{'N or HxW' if pair else 'N'}, each from 1 to {MOST_SIDE}"
    if (
        match is None
        or (match[2] and not pair)
        or not (0 < height <= MOST_SIDE and 0 < width <= MOST_SIDE)
    ):
        raise BadData(f"got {name}={text}; expected pixels as {both}")
    return height, width


def told(size: Size) -> str:
    """A height and width as it is written in a spec."""
    return f"{size[0]}x{size[1]}"


def pillow() -> Any:
    """The module PIL.Image, or MissingExtra."""
    try:
        from PIL import Image
    except ImportError as problem:
        raise MissingExtra("pillow", "data", "reading images") from problem
    return Image


def decode(
    data: bytes, where: str, mode: str | None = None, as_asked: Resizing = AS_THEY_ARE
) -> Array:
    """An encoded image -> uint8 [C, H, W], turned as its EXIF orientation says; `where` names it in
    errors.

    See `from_pil` for mode and size.
    """
    with _opened(data, where) as image:
        with reading(where, "an image"):
            # before EXIF is looked at: Pillow reads pixels for it, and their errors would be lost
            image.load()
        return from_pil(image, where, mode, as_asked, _orientation(image))


def shape_of(data: bytes, where: str) -> tuple[str, Size]:
    """The mode ("L" or "RGB") and the height and width of an encoded image, from its header."""
    with _opened(data, where) as image:
        if image.format == "TIFF":  # which Pillow turns by itself, when it has read the pixels
            with reading(where, "an image"):
                image.load()
        height = image.height
        width = image.width
        return _mode(image), (width, height) if _orientation(image) in SWAPPED else (height, width)


def _opened(data: bytes, where: str) -> Any:
    with reading(where, "a PNG, JPEG, BMP, WebP, TIFF, PPM or GIF image"):
        image = pillow().open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise BadFile(
            f"{where} claims {image.height}x{image.width} pixels; expected at most {MOST_PIXELS}: "
            f"shrink it"
        )
    return image


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none. Broken EXIF data spoils no
    image.
    """
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block can fail anywhere
        return 1
    return found if found in range(1, 9) else 1


def from_pil(
    image: Any,
    where: str,
    mode: str | None = None,
    as_asked: Resizing = AS_THEY_ARE,
    orientation: int = 1,
) -> Array:
    """A PIL image -> uint8 [C, H, W], C = 1 for greyscale and 3 for anything else (alpha is
    dropped).

    Args:
        image: as Pillow opened it, or as a user's own Dataset gives it (which decides about EXIF
            itself).
        where: names it in errors.
        mode: "L" or "RGB" fixes C. A colour image is never made grey: BadData.
        as_asked: resizing and cropping.
        orientation: an EXIF orientation to undo, 1 to 8.
    """
    own = _mode(image)
    if image.mode.startswith(("I", "F")):
        raise BadData(
            f"{where} has {image.mode} pixels of more than 8 bits; expected 8 bits a channel: "
            f"convert it"
        )
    if mode == "L" and own != "L":
        raise BadData(
            f"{where} is a colour image among grey ones; expected one kind: convert the images to "
            f"RGB"
        )
    with reading(where, "an image"):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # a palette with alpha goes to RGB by this way only
        upright = _turned(image.convert(mode or own), orientation)
    with reading(where, "an image"):
        pixels: Array = np.asarray(as_asked.apply(upright, where), dtype=np.uint8)
    if pixels.ndim == 2:
        return pixels[None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _turned(image: Any, orientation: int) -> Any:
    """A PIL image with an EXIF orientation undone, as PIL.ImageOps.exif_transpose does it."""
    if orientation == 1:
        return image
    way = pillow().Transpose
    undone = {
        2: way.FLIP_LEFT_RIGHT,
        3: way.ROTATE_180,
        4: way.FLIP_TOP_BOTTOM,
        5: way.TRANSPOSE,
        6: way.ROTATE_270,
        7: way.TRANSVERSE,
        8: way.ROTATE_90,
    }
    return image.transpose(undone[orientation])


def _mode(image: Any) -> str:
    return "L" if image.mode in ("1", "L", "LA", "La") else "RGB"


class OtherSize(BadData):
    """Images of several sizes in one data set.

    Attributes:
        found: which image has which size, and which one the first has.
        spec: the spec that was read, without options and selection.
    """

    def __init__(self, found: str, spec: str, option: str | None = None) -> None:
        self.found = found
        self.spec = spec
        if option is None:
            way = (
                f"read them with {_with(spec, USUAL)} (the shorter side to 256 pixels, then the "
                f"middle 224x224), or "
                f"stretch them with {_with(spec, '@224x224')}"
            )
        else:
            way = (
                "the network's preprocessing has a size of its own, read them with "
                f"{_with(spec, option)}"
            )
        super().__init__(f"{found}; every image must have one size: {way}")


USUAL = "resize=256&crop=224"  # the evaluation transform of ImageNet


def _with(spec: str, option: str) -> str:
    """A spec with options behind it, or with `@HxW` behind its name."""
    if not option.startswith("@"):
        return f"{spec}{'&' if '?' in spec else '?'}{option}"
    name, colon, index = spec.partition(":")
    return f"{name}{option}{colon}{index}"


@contextlib.contextmanager
def proposing(preprocessing: Iterable[object]) -> Iterator[None]:
    """While rows are read for a network, images of several sizes are answered with the sizes that
    it knows.

    Args:
        preprocessing: what stands before the network's models; some of it has a size.
    """
    try:
        yield
    except OtherSize as problem:
        options = [option for option in map(option_of, preprocessing) if option is not None]
        if not options:
            raise
        raise OtherSize(problem.found, problem.spec, options[0]) from problem


def option_of(preprocess: object) -> str | None:
    """The options of a spec that make images of the size that a preprocessing module makes or
    expects.
    """
    short = getattr(preprocess, "short", None)
    size = getattr(preprocess, "size", None)
    sides = size or getattr(preprocess, "expects", None)
    if not isinstance(sides, tuple) or len(sides) != 2:
        return None
    height, width = sides
    kind = getattr(preprocess, "interpolation", "bilinear")
    more = "" if kind == "bilinear" else f"&interpolation={kind}"
    if size is not None and short is None:
        if not more:
            return f"@{height}x{width}"
        return f"resize={max(size)}&crop={height}x{width}{more}"
    crop = f"{height}" if height == width else f"{height}x{width}"
    return f"resize={short or max(height, width)}&crop={crop}{more}"
