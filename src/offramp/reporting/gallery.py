"""Real inputs that left first, and inputs that went to the end."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.data.rows import Rows, digests_of, rows
from offramp.errors import BadData, MissingExtra
from offramp.plans.evaluation import Array
from offramp.plans.topology import LEAVE
from offramp.reporting.maps import SHOWN, Maps, map_groups
from offramp.reporting.markup import Html, tag
from offramp.reporting.view import View

PICTURES = 24
SMALL = 96  # pixels of a side; smaller pictures are enlarged
LARGE = 224  # pixels of a side; larger pictures are reduced
FEW_GREYS = 16  # images whose largest value is at most this are stretched to 255


def gallery(view: View, data: object, maps: Maps | None = None) -> list[Html]:
    """Two groups of pictures with their labels and answers, and a group for each map.

    Args:
        view: a trace under a plan.
        data: the recorded rows.
        maps: shown over some of the pictures; None for no maps.

    Returns:
        Headings and groups.

    Raises:
        BadData: `data` does not hold the rows of the trace, or holds no images.
        MissingExtra: Pillow is not installed.
    """
    if not view.open_gates:
        note = tag(
            "p", "No gate is open under this plan, so every input goes to the end.", class_="note"
        )
        return [note, *_mapped(view, rows(data), np.arange(min(PICTURES, len(view.trace))), maps)]
    if not view.trace.topology.is_chain:
        return _by_way(view, rows(data), maps)
    first, ended = _sides(view)
    wanted = np.concatenate([first, ended])
    source = rows(data)
    images = _images(view, source, wanted)
    gate = view.open_gates[0]
    last = view.trace.topology.exits[view.last]
    return [
        tag("h3", f"Left first, at {gate}, with the highest scores (below each picture)"),
        _group(view, first, images[: len(first)], "No row left here."),
        tag("h3", f"Went to the end, to {last}, with the lowest scores at {gate}"),
        _group(view, ended, images[len(first) :], "No row went to the end."),
        *_mapped(view, source, np.concatenate([first[: SHOWN // 2], ended[: SHOWN // 2]]), maps),
    ]


def _mapped(view: View, source: Rows, wanted: Array, maps: Maps | None) -> list[Html]:
    """Maps over the pictures at these positions of the trace."""
    if maps is None or not len(wanted):
        return []
    numbers = view.trace.columns["row"][wanted].tolist()
    return map_groups(_images(view, source, wanted), numbers, maps, data_uri)


def _by_way(view: View, source: Rows, maps: Maps | None) -> list[Html]:
    """A group of pictures for each way of the first open gate in a network with forks."""
    ways = _setting_ways(view) if view.trace.header.settings else _score_ways(view)
    parts = list[Html]()
    mapped = list[Array]()
    for title, positions, captions in ways:
        images = _images(view, source, positions) if len(positions) else positions
        parts.append(tag("h3", title))
        parts.append(_group(view, positions, images, "No row went this way.", captions))
        mapped.append(positions[: SHOWN // len(ways)])
    return [*parts, *_mapped(view, source, np.concatenate(mapped), maps)]


Way = tuple[str, Array, list[str]]  # a title, positions in the trace, a caption for each


def _score_ways(view: View) -> list[Way]:
    """The rows that took each way of the first open gate, those with the clearest scores first.

    A row takes the first way whose score reaches its threshold. So rows on the last way are sorted
    by their largest score, from the lowest on.
    """
    visits = view.trace.visits(view.replay.schedule)
    visit = next(visit for visit in visits if visit.scores is not None)
    assert visit.scores is not None  # [n, K - 1]
    scores = np.nan_to_num(visit.scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    ways = list[Way]()
    for number, edge in enumerate(visit.stage.edges):
        here = np.flatnonzero(visit.chosen == number)
        if number < scores.shape[1]:
            deciding = scores[here, number]
            order = np.argsort(-deciding, kind="stable")[:PICTURES]
            how = "with the highest scores"
        else:
            deciding = scores[here].max(1)
            order = np.argsort(deciding, kind="stable")[:PICTURES]
            how = "with the lowest scores"
        captions = [f"{score:.3g}" for score in deciding[order]]
        word = "left" if edge.to == LEAVE else f"took {edge.successor}"
        title = f"At {visit.stage.name} {word}, {how} (below each picture)"
        ways.append((title, visit.rows[here[order]], captions))
    return ways


def _setting_ways(view: View) -> list[Way]:
    """The rows for which the fewest and the most stages ran, where no path was recorded."""
    stages = view.replay.ran.sum(1)  # [N, stages] -> [N]
    order = np.argsort(stages, kind="stable")
    fewest = order[:PICTURES]
    most = order[::-1][:PICTURES]
    title = "The {} stages ran for these (their number below each picture)"
    return [
        (title.format("fewest"), fewest, [str(count) for count in stages[fewest]]),
        (title.format("most"), most, [str(count) for count in stages[most]]),
    ]


def _sides(view: View) -> tuple[Array, Array]:
    """Positions in the trace of both groups.

    The first are the rows with the highest scores that left at the first open gate, the second the
    rows with the lowest scores that reached the end.
    """
    gate = view.open_gates[0]
    scores = np.nan_to_num(
        view.trace.columns[f"score/{gate}"], nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    rising = np.argsort(scores, kind="stable")  # [N]
    exits = view.replay.exit[rising]
    left = rising[exits == view.trace.topology.exit_index(gate)]
    ended = rising[exits == view.last]
    return left[::-1][:PICTURES], ended[:PICTURES]


def _images(view: View, source: Rows, wanted: Array) -> Array:
    """The images [W, C, H, W'] at these positions of the trace.

    Raises BadData if they are not images, or not the recorded rows.
    """
    numbers = view.trace.columns["row"][wanted]
    x = _taken(source, numbers)
    if not isinstance(x, np.ndarray):
        raise BadData(
            f"the gallery needs images, uint8 [1 or 3, H, W], got rows of {', '.join(x)}. Leave "
            "data out"
        )
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
        raise BadData(
            f"the gallery needs images, uint8 [1 or 3, H, W], got rows of {x.dtype} "
            f"{list(x.shape[1:])}. Leave data out"
        )
    digests = digests_of(x, view.trace.header.digest_form)
    differs = np.flatnonzero(digests != view.trace.columns["digest"][wanted])
    if differs.size:
        raise BadData(
            f"row {numbers[differs[0]]} of {source.name} is not the row of that number in the "
            f"trace ({differs.size} of the {len(wanted)} rows that were compared differ). "
            "Give the data that was recorded"
        )
    return x


def _taken(source: Rows, numbers: Array) -> Any:
    """The rows x with these numbers in the source, in their order."""
    # A source is a slice of its file: row = start + step * index.
    keep = source.keep
    indices, rest = np.divmod(numbers - keep.start, keep.step)
    is_missing = (rest != 0) | (indices < 0) | (indices >= len(keep))
    if is_missing.any():
        raise BadData(
            f"row {numbers[is_missing][0]} of the trace is not among the rows of {source.name}. "
            "Give the data that was recorded"
        )
    if source.can_take:
        return source.take_x(indices)
    # A stream: read it until its end, and keep the rows that are wanted.
    by_number: dict[int, Array] = {}
    for batch in source.batches(256):
        if not isinstance(batch.x, np.ndarray):
            return batch.x
        for index in np.flatnonzero(np.isin(batch.row, numbers)):
            by_number[int(batch.row[index])] = batch.x[index]
    images = []
    for number in numbers.tolist():
        if number not in by_number:
            raise BadData(
                f"{source.name} ended before row {number} of the trace. Give the data that was "
                "recorded"
            )
        images.append(by_number[number])
    return np.stack(images)


def _group(
    view: View,
    places: Array,
    images: Array,
    nothing: str,
    captions: Sequence[str] | None = None,
) -> Html:
    """Pictures with a caption below each; by default its score at the first open gate."""
    if not len(places):
        return tag("p", nothing, class_="note")
    if captions is None:
        scores = view.trace.columns[f"score/{view.open_gates[0]}"]
        captions = [f"{scores[position]:.3g}" for position in places]
    pictures = list[Html]()
    for position, image, caption in zip(places, images, captions, strict=True):
        pictures.append(_picture(view, int(position), image, caption))
    return tag("ul", *pictures, class_="gallery")


def _picture(view: View, position: int, image: Array, caption: str) -> Html:
    """One input with its label and, if that differs, the answer; below them a caption."""
    answer = int(view.replay.answer[position])
    truth = answer
    if view.trace.labels is not None:
        truth = int(view.trace.labels[position])
    answer_name = _class_name(view, answer)
    words = answer_name
    classes = [tag("span", answer_name)]
    kind = None
    if truth != answer:
        truth_name = _class_name(view, truth)
        words = f"{truth_name}, answered {answer_name}"
        classes = [tag("span", f"{truth_name} → "), tag("b", answer_name)]
        kind = "wrong"
    measure = "score"
    if view.trace.header.settings:
        measure = "stages"
    picture = tag(
        "img",
        src=data_uri(image),
        alt=f"row {view.trace.columns['row'][position]}: {words}, {measure} {caption}",
        loading="lazy",
    )
    below = tag("span", caption, class_="note")
    return tag("li", picture, tag("div", *classes), below, class_=kind)


def _class_name(view: View, number: int) -> str:
    """The name of a class, or its number if it has none."""
    names = view.trace.header.class_names or ()
    if 0 <= number < len(names):
        return names[number]
    return str(number)


def data_uri(image: Array) -> str:
    """A uint8 image [C, H, W] as a PNG inside the page."""
    try:
        from PIL import Image
    except ImportError as problem:
        raise MissingExtra("pillow", "report", "the gallery") from problem
    if 0 < image.max() <= FEW_GREYS:
        image = (image.astype(np.uint16) * 255 // FEW_GREYS).astype(np.uint8)
    if len(image) == 1:
        planes = image[0]  # [H, W]
    else:
        planes = image.transpose(1, 2, 0)  # [H, W, 3]
    picture = Image.fromarray(np.ascontiguousarray(planes))
    side = min(picture.size)
    if side < SMALL:
        times = -(-SMALL // side)  # rounded up
        picture = picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    elif max(picture.size) > LARGE:
        picture.thumbnail((LARGE, LARGE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
