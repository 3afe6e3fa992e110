"""Decodes images to uint8 [C, H, W].

Only raster formats that run no code are opened. The steps are always the same, in this order. The
image is turned as its EXIF orientation says. It is converted to grey or RGB: alpha is dropped,
Pillow converts palettes and CMYK, and a PNG of 16 bits a channel keeps the high byte. Then it is
resized and cropped as asked. Of several frames the first is read. Pillow is imported where it is
used.
"""

from __future__ import annotations

import contextlib
import io
import math
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
MOST_PIXELS = 64_000_000  # of an image; a small file can claim to be far larger
MOST_SIDE = 8192  # pixels to resize or crop to
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
        """The height and width of an image after resizing and cropping.

        Args:
            own: its height and width before.
            where: the image in messages.

        Raises:
            BadData: it is smaller than the crop.
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
        height, width = own
        longer = int(self.short * max(own) / min(own))
        if height <= width:
            return self.short, longer
        return longer, self.short

    def apply(self, image: Any, where: str) -> Any:
        """Resize and crop a PIL image to the size that `shape` gives."""
        own = (image.height, image.width)
        shape = self.shape(own, where)
        # First stretch it, or resize its shorter side.
        resized = self.size or self._resized(own)
        if resized != own:
            kind = getattr(pillow().Resampling, self.interpolation.upper())
            image = image.resize((resized[1], resized[0]), kind)
        if shape == resized:
            return image
        # As torchvision's CenterCrop rounds.
        top = round((resized[0] - shape[0]) / 2.0)
        left = round((resized[1] - shape[1]) / 2.0)
        return image.crop((left, top, left + shape[1], top + shape[0]))


AS_THEY_ARE = Resizing()


def resizing(size: Size | None, resize: str, crop: str, interpolation: str) -> Resizing:
    """Read the size and the options `resize=256&crop=224&interpolation=bicubic` of a spec.

    Args:
        size: the height and width after `@`; None without.
        resize: length of the shorter side, in pixels; "" without.
        crop: N or HxW, in pixels; "" without.
        interpolation: one of INTERPOLATIONS; "" for bilinear.

    Raises:
        BadData: an option is wrong, or they do not fit together.
    """
    if size is not None and (resize or crop):
        raise BadData(
            f"got @{told(size)} beside resize or crop; expected one of them: @HxW stretches, they "
            f"do not"
        )
    short: int | None = None
    cut: Size | None = None
    if resize:
        short, _ = _sides("resize", resize, pair=False)
    if crop:
        cut = _sides("crop", crop, pair=True)
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
    """The height and width in N or, if `pair`, HxW. Raises BadData."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if match is not None and (pair or match[2] is None):
        height = int(match[1])
        width = height if match[2] is None else int(match[2])
        if 0 < height <= MOST_SIDE and 0 < width <= MOST_SIDE:
            return height, width
    form = "N or HxW" if pair else "N"
    raise BadData(f"got {name}={text}; expected pixels as {form}, each from 1 to {MOST_SIDE}")


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
    """Decode an image to uint8 [C, H, W], upright as its EXIF orientation says.

    Args:
        data: the bytes of the file.
        where: the image in messages.
        mode: "L" or "RGB"; None for the image's own (see `from_pil`).
        as_asked: resizing and cropping.

    Raises:
        BadFile: it cannot be decoded.
        BadData: it is a colour image for mode "L", or too small for the crop.
    """
    with _opened(data, where) as image:
        with reading(where, "an image"):
            # Before EXIF is read: Pillow reads pixels for it, and would hide their errors.
            image.load()
        return from_pil(image, where, mode, as_asked, _orientation(image))


def shape_of(data: bytes, where: str) -> tuple[str, Size]:
    """The mode ("L" or "RGB") and the height and width of an encoded image, from its header."""
    # The header has the size before it is turned upright.
    with _opened(data, where) as image:
        if image.format == "TIFF":  # which Pillow turns by itself, when it has read the pixels
            with reading(where, "an image"):
                image.load()
        height = image.height
        width = image.width
        if _orientation(image) in SWAPPED:
            return _mode(image), (width, height)
        return _mode(image), (height, width)


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
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or where it is damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block can fail anywhere
        return 1
    if orientation not in range(1, 9):
        return 1
    return int(orientation)


def from_pil(
    image: Any,
    where: str,
    mode: str | None = None,
    as_asked: Resizing = AS_THEY_ARE,
    orientation: int = 1,
) -> Array:
    """Convert a PIL image to uint8 [C, H, W]; C is 1 for greyscale and 3 for anything else.

    Args:
        image: as Pillow opened it, or as a user's own Dataset gives it (which decides about EXIF
            itself).
        where: the image in messages.
        mode: "L" or "RGB" fixes C. A colour image is never made grey.
        as_asked: resizing and cropping.
        orientation: an EXIF orientation to undo, 1 to 8.

    Raises:
        BadData: it is a colour image for mode "L", has more than 8 bits, or is too small.
        BadFile: it cannot be decoded.
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
        # Pillow converts a palette with alpha to RGB only through RGBA.
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        upright = _turned(image.convert(mode or own), orientation)
    with reading(where, "an image"):
        pixels: Array = np.asarray(as_asked.apply(upright, where), dtype=np.uint8)
    if pixels.ndim == 2:
        return pixels[None]  # [H, W] -> [1, H, W]
    # [H, W, 3] -> [3, H, W]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _turned(image: Any, orientation: int) -> Any:
    """A PIL image with an EXIF orientation undone, as PIL.ImageOps.exif_transpose does it."""
    if orientation == 1:
        return image
    way = pillow().Transpose
    # The operation that undoes each orientation.
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
    """Grey ("L") for the modes without colours, with or without alpha; "RGB" for all others."""
    return "L" if image.mode in ("1", "L", "LA", "La") else "RGB"


class OtherSize(BadData):
    """Images of several sizes in one data set.

    Attributes:
        found: the sentence that compares an image with the first one.
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
    """A spec with further options, or with `@HxW` after its name."""
    if not option.startswith("@"):
        separator = "&" if "?" in spec else "?"
        return f"{spec}{separator}{option}"
    name, colon, path = spec.partition(":")
    return f"{name}{option}{colon}{path}"


@contextlib.contextmanager
def proposing(preprocessing: Iterable[object]) -> Iterator[None]:
    """While it is open, the error for images of several sizes proposes the network's own size.

    Args:
        preprocessing: the preprocessing modules of the network's models; some of them have a size.

    Raises:
        OtherSize: the same error, with the options that resize to the network's size. If its models
            have several sizes, it is the largest, from which the others can be made.
    """
    try:
        yield
    except OtherSize as problem:
        largest: str | None = None
        most_pixels = 0
        for module in preprocessing:
            option = option_of(module)
            if option is None:
                continue
            pixels = math.prod(sides_of(module) or ())
            if pixels > most_pixels:
                largest = option
                most_pixels = pixels
        if largest is not None:
            raise OtherSize(problem.found, problem.spec, largest) from problem
        raise


def sides_of(preprocess: object) -> Size | None:
    """The height and width that a preprocessing module makes or expects; None if it says none."""
    sides = getattr(preprocess, "size", None) or getattr(preprocess, "expects", None)
    if not isinstance(sides, tuple) or len(sides) != 2:
        return None
    return sides


def option_of(preprocess: object) -> str | None:
    """The options of a spec that resize images as a preprocessing module does.

    Args:
        preprocess: a module; it may have attributes size, short, expects and interpolation.

    Returns:
        Such as "resize=256&crop=224" or "@224x224"; None where it has no size.
    """
    short = getattr(preprocess, "short", None)
    size = getattr(preprocess, "size", None)
    sides = sides_of(preprocess)
    if sides is None:
        return None
    height, width = sides
    kind = getattr(preprocess, "interpolation", "bilinear")
    suffix = "" if kind == "bilinear" else f"&interpolation={kind}"
    if size is not None and short is None:  # it stretches
        if not suffix:
            return f"@{height}x{width}"
        return f"resize={max(size)}&crop={height}x{width}{suffix}"
    crop = f"{height}" if height == width else f"{height}x{width}"
    return f"resize={short or max(height, width)}&crop={crop}{suffix}"
