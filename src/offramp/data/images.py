"""Reads the images below a folder, without labels.

images:photos
images:photos?resize=256&crop=224
"""

from __future__ import annotations

from pathlib import Path

from offramp._support.notices import say
from offramp.data._check import reading
from offramp.data._image_files import KINDS, NOT_DATA, Images, files_below, is_image, kinds_of
from offramp.data._images import Size, resizing
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile


def load(
    location: str,
    split: str,
    *,
    size: Size | None = None,
    resize: str = "",
    crop: str = "",
    interpolation: str = "",
) -> Rows:
    """Read every image below a folder as uint8 RGB [3, H, W].

    Rows are sorted by folder and then by file name. The names of folders do not matter;
    `imagefolder` reads them as classes. Files that are not images are counted in a notice.

    Args:
        location: the folder.
        split: must be "".
        size: H and W to which images are stretched: `images@224x224:DIR`.
        resize: length of the shorter side after resizing, in pixels; the aspect ratio stays.
        crop: N or HxW, in pixels, cut out of the middle.
        interpolation: bilinear (default), bicubic or nearest.

    Returns:
        The rows. An image is decoded when it is taken.

    Raises:
        BadData: there is a split, or images have several sizes.
        BadFile: the folder does not exist or holds no images, or an image cannot be decoded.
    """
    if split:
        raise BadData(
            f"images got the split {split!r}; it has none: write images:{Path(location) / split}"
        )
    as_asked = resizing(size, resize, crop, interpolation)
    with reading(location or "no place", "a folder of images"):
        if not location or not Path(location).is_dir():
            raise FileNotFoundError(location)
        found = files_below(Path(location))

    files = list[Path]()
    others = list[Path]()
    for path in found:
        if is_image(path):
            files.append(path)
        elif path.name.lower() not in NOT_DATA:
            others.append(path)
    if not files:
        there = kinds_of(others) if others else "no files"
        raise BadFile(f"{location} holds {there}; expected {KINDS}: check the place")
    if others:
        say(f"{location}: left out {kinds_of(others)}, expected {KINDS}")
    source = Images(files, None, as_asked, f"images:{location}")
    return Rows(source, name=f"images:{location}")
