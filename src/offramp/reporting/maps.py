"""Maps over real inputs: the work at each position of a picture (ponder maps of SACT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from offramp.errors import BadData
from offramp.plans.evaluation import Array
from offramp.reporting.markup import Html, tag

# images uint8 [W, C, H, W'] -> by name a map [W, h, w] of each
Maps = Callable[[Array], Mapping[str, Array]]

SHOWN = 8  # pictures of each map
STRENGTH = 0.6  # of the colour where a map is largest
LOW = np.array([40.0, 70.0, 200.0])  # the colour of the smallest value, red, green and blue
HIGH = np.array([230.0, 60.0, 20.0])


def map_groups(
    images: Array, rows: Sequence[int], maps: Maps, uri: Callable[[Array], str]
) -> list[Html]:
    """A group of pictures for each map. The lowest values are blue, the highest red.

    Args:
        images: uint8 [W, C, H, W'].
        rows: their numbers.
        maps: computes the maps of these images.
        uri: turns an image into the address of a picture.

    Returns:
        A heading and a list of pictures for each map.

    Raises:
        BadData: the maps do not fit the images.
    """
    images = images[:SHOWN]
    groups = list[Html]()
    for name, values in maps(images).items():
        heights = np.asarray(values, np.float64)  # [W, h, w]
        if heights.ndim != 3 or len(heights) != len(images) or not np.isfinite(heights).all():
            raise BadData(
                f"the map {name!r} must be finite numbers [{len(images)}, h, w], one map for each "
                f"image, got {list(heights.shape)}"
            )
        low = float(heights.min())
        high = float(heights.max())
        pictures = list[Html]()
        # There may be more rows than pictures.
        for image, height, row in zip(images, heights, rows, strict=False):
            mean = float(height.mean())
            share = np.zeros_like(height)
            if high > low:
                share = (height - low) / (high - low)
            picture = tag(
                "img",
                src=uri(over(image, share)),
                alt=f"row {row}: {name}, mean {mean:.3g}",
                loading="lazy",
            )
            pictures.append(tag("li", picture, tag("span", f"{mean:.3g}", class_="note")))
        title = f"{name}: blue {low:.3g}, red {high:.3g} (mean over the picture below each)"
        groups += [tag("h3", title), tag("ul", *pictures, class_="gallery")]
    return groups


def over(image: Array, share: Array) -> Array:
    """A grey image under a map.

    Args:
        image: uint8 [C, H, W].
        share: numbers from 0 to 1, [h, w].

    Returns:
        uint8 [3, H, W].
    """
    # The map is enlarged to the size of the image by its nearest cell.
    height, width = image.shape[1:]
    down = np.arange(height) * share.shape[0] // height
    across = np.arange(width) * share.shape[1] // width
    large = share[down][:, across]  # [H, W]
    grey = image.astype(np.float64).mean(0)
    colour = LOW[:, None, None] * (1 - large) + HIGH[:, None, None] * large  # [3, H, W]
    mixed = (1 - STRENGTH) * grey + STRENGTH * colour
    pixels: Array = mixed.round().clip(0, 255).astype(np.uint8)
    return pixels
