"""Classes are numbered by name, not by what one split happens to hold; what is left out is said."""

from __future__ import annotations

import io
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import offramp as off
from offramp.building.factories import make_preprocess
from offramp.data.rows import Rows, rows
from offramp.errors import BadData, BadFile, BadNetwork, Notice

NAMES = ("rot 0", "rot_180", "rot_270", "ünder")
PER_CLASS = 3


@pytest.fixture(autouse=True)
def said():
    """Notices are gathered, so that a test that is not about them may cause them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", Notice)
        yield found


def texts(said) -> str:
    return "\n".join(str(one.message) for one in said if issubclass(one.category, Notice))


def bright(number: int, shift: int = 0) -> Image.Image:
    """An image whose brightness is about that of class `number`."""
    return Image.fromarray(np.full((6, 4, 3), min(60 * number + 20 + shift, 255), dtype=np.uint8))


def photos(
    root: Path, split: str, names, endings=("png",) * PER_CLASS, form="NFC", shift=0
) -> Path:
    for name in names:
        folder = root / split / unicodedata.normalize(form, name)
        folder.mkdir(parents=True)
        for number, ending in enumerate(endings):
            bright(NAMES.index(name) if name in NAMES else 9, shift).save(
                folder / f"{number}.{ending}"
            )
    return root


class Ideal(nn.Module):
    """Right on every image whose brightness is that of its class."""

    def forward(self, x):
        level = x.float().mean((1, 2, 3))
        return -(level[:, None] - 20 - 60 * torch.arange(4.0)).abs()


def right(network: off.Network, data: object) -> float:
    trace = off.record(network, data, timed=False, progress=False)
    return float((trace.columns["answer/b"] == trace.columns["label"]).mean())


def pair() -> off.Network:
    return off.ladder({"a": Ideal(), "b": Ideal()}).eval()


@pytest.mark.parametrize("training", ["train", "training", "Train"])
@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_a_split_that_lacks_a_class_keeps_the_numbers(tmp_path, said, training, test):
    photos(tmp_path, training, NAMES)
    photos(tmp_path, test, [name for name in NAMES if name != "rot_180"])
    for spec in (f"imagefolder/{test}:{tmp_path}", f"imagefolder:{tmp_path / test}"):
        data = rows(spec)
        assert data.class_names == NAMES
        assert sorted(set(data.labels.tolist())) == [0, 2, 3]
        assert right(pair(), data) == 1.0
    assert f"{tmp_path / test} has no rows of the class 'rot_180'" in texts(said)
    (tmp_path / test / "rot_180").mkdir()  # an empty folder changes nothing
    assert right(pair(), f"imagefolder/{test}:{tmp_path}") == 1.0


def test_within_the_folder_of_a_split(tmp_path, monkeypatch):
    photos(tmp_path, "train", NAMES)
    photos(tmp_path, "test", NAMES[2:])
    monkeypatch.chdir(tmp_path / "test")
    assert rows("imagefolder:.").class_names == NAMES


def test_a_class_that_the_training_split_lacks_is_refused(tmp_path):
    photos(tmp_path, "train", NAMES[:3])
    photos(tmp_path, "val", NAMES)
    photos(tmp_path, "test", ["Rot 0", "rot_180"])  # another spelling is another class
    for split, name in (("val", "ünder"), ("test", "Rot 0")):
        with pytest.raises(
            BadData,
            match=rf"the class '{name}'; expected the 3 classes of the split 'train', 'rot 0'",
        ):
            rows(f"imagefolder/{split}:{tmp_path}")


def test_without_a_training_split_the_one_that_holds_all_decides(tmp_path):
    photos(tmp_path, "val", NAMES)
    photos(tmp_path, "test", NAMES[1:])
    assert rows(f"imagefolder/test:{tmp_path}").labels.tolist() == [1] * 3 + [2] * 3 + [3] * 3
    photos(tmp_path / "two", "val", NAMES[:3])
    photos(tmp_path / "two", "test", NAMES[1:])
    with pytest.raises(BadData, match=r"different classes \(.*\), and none of them holds all"):
        rows(f"imagefolder/test:{tmp_path / 'two'}")
    given = rows(f"imagefolder/test:{tmp_path / 'two'}?classes={','.join(NAMES)}")
    assert given.class_names == NAMES
    assert right(pair(), given) == 1.0


def test_the_classes_as_the_user_says(tmp_path):
    photos(tmp_path, "test", NAMES[1:3])
    order = (*reversed(NAMES), "other")
    assert (
        rows(f"imagefolder:{tmp_path}?classes={','.join(order)}").labels.tolist()
        == [2] * 3 + [1] * 3
    )
    (tmp_path / "names.txt").write_text("\n".join(order), encoding="utf-8")
    assert rows(f"imagefolder:{tmp_path}?classes={tmp_path / 'names.txt'}").class_names == order
    for wrong, message in (
        ("a,b", "expected the 2 classes given"),
        ("a", "at least two"),
        ("a,b,a", "different"),
    ):
        with pytest.raises(BadData, match=message):
            rows(f"imagefolder:{tmp_path}?classes={wrong}")


def test_one_text_in_two_encodings_is_one_class(tmp_path):
    photos(tmp_path, "train", NAMES)
    photos(tmp_path, "test", NAMES, form="NFD")
    assert right(pair(), f"imagefolder:{tmp_path}") == 1.0
    (tmp_path / "test" / NAMES[3]).mkdir()
    with pytest.raises(BadData, match="2 folders called 'ünder'"):
        rows(f"imagefolder:{tmp_path}")


def test_a_class_called_train_is_no_split(tmp_path):
    photos(tmp_path, ".", ["car", "plane", "train"])
    data = rows(f"imagefolder:{tmp_path}")
    assert data.class_names == ("car", "plane", "train")
    assert len(data) == 9


def test_a_network_remembers_the_class_names_that_trained_it(tmp_path):
    photos(tmp_path / "here", "train", NAMES)
    # nothing beside it says which classes there are
    photos(tmp_path / "there", "some", NAMES[1:], shift=3)
    photos(tmp_path / "odd", "some", [*NAMES[1:], "new"], shift=5)
    trained = rows(f"imagefolder/train:{tmp_path / 'here'}")
    later = f"imagefolder/some:{tmp_path / 'there'}"
    assert rows(later).labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    net = off.cut(model, trained.take(np.arange(4)).x, at=["1"], preprocess=make_preprocess("unit"))
    assert net.class_names is None
    off.fit(net, trained, recipe="cross_entropy", development=later, progress=False)
    assert net.class_names == NAMES
    off.save(net, tmp_path / "net")
    net = off.load(tmp_path / "net", model)
    assert net.class_names == NAMES
    trace = off.record(net, later, timed=False, progress=False)
    assert trace.columns["label"].tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert trace.header.class_names == NAMES
    for data in (
        f"imagefolder/some:{tmp_path / 'odd'}",
        f"imagefolder/some:{tmp_path / 'odd'}[0:9]",
    ):
        with pytest.raises(
            BadData, match="has the class 'new', and the network was trained the 4 classes 'rot 0'"
        ):
            off.record(net, data, timed=False, progress=False)
    with pytest.raises(BadData, match="the class 'new'"):
        off.fit(net, f"imagefolder/some:{tmp_path / 'odd'}", recipe="cross_entropy", progress=False)
    net.class_names = None
    assert off.record(net, later, timed=False, progress=False).columns["label"].tolist()[0] == 0


def test_members_of_different_classes_do_not_stand_together():
    net = pair()
    x = torch.zeros(2, 3, 6, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    one, other = (off.cut(model, x, at=["1"]) for _ in range(2))
    one.class_names = NAMES
    assert off.ladder({"one": one, "other": other}).class_names == NAMES
    other.class_names = NAMES[::-1]
    with pytest.raises(BadNetwork, match="different class names"):
        off.ladder({"one": one, "other": other})
    assert net.class_names is None


def test_torchvisions_folders_are_aligned_too():
    # as torchvision.datasets.ImageFolder looks from outside
    class Folder(torch.utils.data.Dataset):
        def __init__(self):
            self.classes = list(NAMES[1:])
            self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
            self.samples = [*self.class_to_idx.items()]

        def __len__(self):
            return 3

        def __getitem__(self, row):
            return torch.full((3, 6, 4), 60 * (row + 1) + 20), row

    net = pair()
    net.class_names = NAMES
    some = torch.utils.data.Subset(Folder(), [2, 0])
    for data in (Folder(), some):
        assert right(net, data) == 1.0
    with pytest.raises(BadData, match="stream"):
        right(net, torch.utils.data.DataLoader(Folder(), batch_size=2))


def test_the_names_in_a_model_of_transformers_count():
    model = Ideal()
    model.config = SimpleNamespace(id2label=dict(enumerate(NAMES)))
    net = off.ladder({"a": Ideal(), "b": model}).eval()
    x = np.stack([np.asarray(bright(number)).transpose(2, 0, 1) for number in (3, 1)])
    source = rows(x, np.array([1, 0]))
    assert right(net, Rows(source.source, class_names=NAMES[1::2])) == 1.0
    # not comparable: as they are
    foreign = Rows(rows(x, np.array([3, 1])).source, class_names=("a", "b", "c", "d"))
    assert right(net, foreign) == 1.0


# Files that are read, counted or refused.


def test_every_format_and_deeper_folders_are_read(tmp_path, said):
    kinds = ("png", "JPG", "jpeg", "bmp", "webp", "tif", "tiff", "ppm", "gif")
    photos(tmp_path, "train", NAMES[:2], endings=kinds)
    deep = tmp_path / "train" / NAMES[0] / "2024" / "march"
    deep.mkdir(parents=True)
    bright(0).save(deep / "x.png")
    (deep / "up").symlink_to(tmp_path / "train" / NAMES[0])  # leads back up: not walked again
    data = rows(f"imagefolder/train:{tmp_path}")
    assert data.labels.tolist() == [0] * 10 + [1] * 9
    (batch,) = data.batches(99)
    assert np.abs(batch.x.astype(int) - (20 + 60 * batch.y[:, None, None, None])).max() <= 2  # JPEG
    assert not texts(said)


def test_what_is_left_out_is_counted(tmp_path, said):
    photos(tmp_path, ".", NAMES[:2])
    for name in (
        f"{NAMES[0]}/a.heic",
        f"{NAMES[0]}/deeper/b.HEIC",
        f"{NAMES[1]}/notes.txt",
        "c.png",
        "README",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    for hidden in (".DS_Store", "Thumbs.db"):
        (tmp_path / NAMES[0] / hidden).write_bytes(b"?")
    (tmp_path / "__MACOSX").mkdir()
    data = rows(f"imagefolder:{tmp_path}")
    assert (len(data), data.class_names) == (6, NAMES[:2])
    assert "left out 2 .heic, 1 .txt in class folders" in texts(said)
    assert "left out 1 .png beside the class folders" in texts(said)


def test_classes_of_deeper_folders_alone_are_said(tmp_path, said):
    for name in ("cat", "dog"):
        photos(tmp_path / name, "indoor", NAMES[:1])
    data = rows(f"imagefolder:{tmp_path}")
    assert data.class_names == ("cat", "dog")
    assert "all images are in deeper folders; the 2 classes are the folders cat, dog" in texts(said)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("a.png", "b.png"), "holds 2 images and no class folders"),
        (("cat/a.heic", "cat/b.heic", "dog/c.txt"), "holds 2 .heic, 1 .txt"),
        ((), "holds no files"),
        (("train/cat/a.png", "val/cat/a.png"), "has the splits train, val and none called test"),
    ],
)
def test_places_without_classes_say_what_is_there(tmp_path, files, says):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        bright(0).save(tmp_path / name, format="PNG")
    with pytest.raises(BadFile, match=says):
        rows(f"imagefolder:{tmp_path}")
    with pytest.raises(BadFile, match="does not exist"):
        rows(f"imagefolder/dev:{tmp_path}")


# Images.


def one_image(tmp_path, image, ending="png", **more) -> np.ndarray:
    (tmp_path / "a").mkdir(exist_ok=True)
    path = tmp_path / "a" / f"x.{ending}"
    image.save(path, **more)
    x = rows(f"imagefolder:{tmp_path}").take(np.array([0])).x[0]
    path.unlink()
    return x


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    from PIL import ImageOps

    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"exif": exif}
        | ({"lossless": True} if ending == "webp" else {})
        | ({"quality": 95} if ending == "jpg" else {})
    )
    got = one_image(tmp_path, Image.fromarray(pixels), ending, **options)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file))).transpose(2, 0, 1)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() < 30


def test_a_users_own_pil_images_are_not_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    bright(1).save(file, format="JPEG", exif=exif)
    source = type(
        "Photos",
        (torch.utils.data.Dataset,),
        {"__len__": lambda s: 1, "__getitem__": lambda s, i: Image.open(file)},
    )
    assert rows(source()).take(np.array([0])).x.shape == (1, 3, 6, 4)


def test_other_modes_of_pixels(tmp_path):
    red = Image.new("RGB", (4, 6), (250, 10, 10))
    for mode, ending in (
        ("CMYK", "jpg"),
        ("P", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("YCbCr", "jpg"),
    ):
        x = one_image(tmp_path, red.convert(mode), ending)
        assert x.shape == (3, 6, 4), mode
        # a palette dithers
        assert np.abs(x.astype(int) - np.array([250, 10, 10])[:, None, None]).max() < 60, mode
    clear = red.convert("P")
    assert one_image(tmp_path, clear, transparency=bytes([0, 128, 255])).shape == (3, 6, 4)
    for mode in ("1", "L", "LA"):
        x = one_image(tmp_path, Image.new("L", (4, 6), 255).convert(mode))
        assert (x == 255).all()
    with pytest.raises(BadData, match="more than 8 bits"):
        one_image(tmp_path, Image.fromarray(np.full((6, 4), 40000, dtype=np.uint16)))
    with pytest.raises(BadData, match="more than 8 bits"):
        one_image(tmp_path, Image.fromarray(np.ones((6, 4), dtype=np.float32)), "tif")


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP", b"GIF89a"]
)
def test_corrupt_images_are_named(tmp_path, content):
    photos(tmp_path, ".", NAMES[:1])
    (tmp_path / NAMES[0] / "z.png").write_bytes(content)
    with pytest.raises(BadFile, match=r"z.png \(row 3\)"):
        list(rows(f"imagefolder:{tmp_path}").batches(9))


# Photos of different sizes.


@pytest.fixture
def album(tmp_path):
    """Photos of five sizes, two of them portraits, in two classes."""
    draw = np.random.default_rng(0)
    for number, (high, wide) in enumerate([(60, 91), (91, 60), (48, 48), (50, 201), (133, 47)]):
        folder = tmp_path / "test" / NAMES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    return tmp_path


def torchvisions(path, short, crop, kind) -> np.ndarray:
    """Resize(short) and CenterCrop(crop) of torchvision 0.20 on a PIL image, from its
    functional.py.
    """
    image = Image.open(path).convert("RGB")
    wide, high = image.size
    less, more = (wide, high) if wide <= high else (high, wide)
    new_short = short
    new_long = int(short * more / less)
    new = (new_short, new_long) if wide <= high else (new_long, new_short)
    image = image.resize(new, kind)
    top = round((image.height - crop[0]) / 2.0)
    left = round((image.width - crop[1]) / 2.0)
    return np.asarray(image.crop((left, top, left + crop[1], top + crop[0]))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("options", "short", "crop", "kind"),
    [
        ("resize=32&crop=28", 32, (28, 28), Image.Resampling.BILINEAR),
        ("resize=33&crop=28", 33, (28, 28), Image.Resampling.BILINEAR),
        ("resize=64&crop=64x48", 64, (64, 48), Image.Resampling.BILINEAR),
        ("resize=32&crop=28&interpolation=bicubic", 32, (28, 28), Image.Resampling.BICUBIC),
    ],
)
def test_the_fields_evaluation_transform(album, options, short, crop, kind):
    data = rows(f"imagefolder:{album}?{options}")
    (batch,) = data.batches(9)
    files = sorted((album / "test").rglob("*.png"))
    np.testing.assert_array_equal(
        batch.x, [torchvisions(file, short, crop, kind) for file in files]
    )
    column = pa.array([file.read_bytes() for file in files], type=pa.binary())
    pq.write_table(pa.table({"image": column, "label": batch.y}), album / "p.parquet")
    (again,) = rows(f"parquet:{album}/p.parquet?{options}").batches(9)
    np.testing.assert_array_equal(again.x, batch.x)


def test_options_before_the_colon(album):
    (wanted,) = rows(f"imagefolder/test:{album}?resize=32&crop=28[1:4]").batches(9)
    for spec in (
        "imagefolder/test?resize=32&crop=28:{}[1:4]",
        "imagefolder?resize=32:{}?crop=28[1:4]",
    ):
        (batch,) = rows(spec.format(album)).batches(9)
        np.testing.assert_array_equal(batch.x, wanted.x)
    with pytest.raises(BadData, match="each once"):
        rows(f"imagefolder?crop=28:{album}?crop=28")


def test_crop_alone_and_selections(album):
    assert rows(f"imagefolder:{album}?crop=40[1:3]").take(np.array([0, 1])).x.shape == (
        2,
        3,
        40,
        40,
    )
    with pytest.raises(BadData, match=r"is 60x91 .* before the crop of 64x64; .*add resize=64"):
        list(rows(f"imagefolder:{album}?crop=64").batches(2))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("imagefolder@8x8:{}?resize=9", "@8x8 beside resize"),
        ("imagefolder:{}?resize=8&crop=9", "within what was resized"),
        ("imagefolder:{}?resize=8x8", "resize=8x8; expected pixels"),
        ("imagefolder:{}?resize=0", "expected pixels"),
        ("imagefolder:{}?crop=a", "crop=a"),
        ("imagefolder:{}?resize=99999", "8192"),
        ("imagefolder:{}?resize=8&interpolation=lanczos", "bilinear, bicubic, nearest"),
        ("imagefolder:{}?interpolation=bicubic", "without resize"),
    ],
)
def test_sizes_that_are_refused(album, spec, says):
    with pytest.raises(BadData, match=says):
        rows(spec.format(album))


def test_photos_of_several_sizes_name_the_way_on(album):
    spec = f"imagefolder:{album}"
    with pytest.raises(
        BadData, match=rf"60x91, .*|first image .*{spec}\?resize=256&crop=224 \(the shorter side"
    ):
        list(rows(spec).batches(9))


@pytest.mark.parametrize(
    ("made", "option"),
    [
        ({"size": (28, 28), "short": 32}, "resize=32&crop=28"),
        ({"size": (28, 24), "short": 32}, "resize=32&crop=28x24"),
        (
            {"size": (28, 28), "short": 32, "interpolation": "bicubic"},
            "resize=32&crop=28&interpolation=bicubic",
        ),
        ({"expects": (32, 32)}, "resize=32&crop=32"),
        ({"size": (28, 24)}, "@28x24"),
    ],
)
def test_preprocessing_that_knows_its_size_proposes_it(album, made, option):
    from offramp.layers.preprocess import Preprocess

    preprocess = Preprocess(**made)
    net = off.ladder({"a": (Ideal(), preprocess), "b": (Ideal(), preprocess)}).eval()
    spec = f"imagefolder:{album}"
    with pytest.raises(
        BadData, match="the network's preprocessing has a size of its own"
    ) as caught:
        off.record(net, spec, timed=False, progress=False)
    proposed = str(caught.value).split("read them with ")[1]
    assert option in proposed
    assert len(off.record(net, proposed, timed=False, progress=False)) == 5


@pytest.mark.parametrize("sizes", [(28, 32), (32, 28)])
def test_of_preprocessings_of_several_sizes_the_largest_is_proposed(album, sizes):
    from offramp.layers.preprocess import Preprocess

    small, large = (Preprocess(size=(side, side), short=side + 4) for side in sizes)
    net = off.ladder({"a": (Ideal(), small), "b": (Ideal(), large)}).eval()
    with pytest.raises(BadData, match=r"read them with .*\?resize=36&crop=32"):
        off.record(net, f"imagefolder:{album}", timed=False, progress=False)


# Tables and arrays with labels as text, or under other names.


def parquet(path: Path, **columns) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({name: list(value) for name, value in columns.items()}), path)


X = np.arange(12, dtype=np.float32).reshape(6, 2)
LABELS = ["dog", "cat", "owl", "dog", "cat", "owl"]


@pytest.mark.parametrize("layout", ["{}.parquet", "{}-00000-of-00001.parquet", "{}/a.parquet"])
def test_text_labels_in_parquet_files(tmp_path, said, layout):
    parquet(tmp_path / layout.format("train"), x=X, label=LABELS)
    parquet(tmp_path / layout.format("test"), x=X[:2], label=["owl", "dog"])
    for spec in (f"parquet/test:{tmp_path}", f"parquet:{tmp_path}"):
        data = rows(spec)
        assert (data.labels.tolist(), data.class_names) == ([2, 1], ("cat", "dog", "owl"))
    if layout != "{}/a.parquet":
        assert rows(f"parquet:{tmp_path / layout.format('test')}").labels.tolist() == [2, 1]
    assert "no rows of the class 'cat'" in texts(said)
    parquet(tmp_path / layout.format("val"), x=X[:2], label=["owl", "cow"])
    with pytest.raises(
        BadData, match="the class 'cow'; expected the 3 classes of the split 'train'"
    ):
        rows(f"parquet/val:{tmp_path}")
    assert rows(f"parquet/test:{tmp_path}?classes=owl,cat,dog").labels.tolist() == [0, 2]


def test_text_labels_as_a_dictionary(tmp_path):
    table = pa.table({"x": list(X), "label": pa.array(LABELS).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows(f"parquet:{tmp_path}/a.parquet").labels.tolist() == [1, 0, 2, 1, 0, 2]


@pytest.mark.parametrize(
    "name", ["label", "Label", "class", "category", "cls", "Y", "targets", "class_id"]
)
def test_labels_under_other_names(tmp_path, said, name):
    parquet(tmp_path / "a.parquet", x=X, **{name: [0, 1, 2, 0, 1, 2]})
    np.savez(tmp_path / "a.npz", x=X, **{name: [0, 1, 2, 0, 1, 2]})
    assert rows(f"parquet:{tmp_path}/a.parquet").labels.tolist() == [0, 1, 2, 0, 1, 2]
    if name != "class_id":
        assert rows(f"npz:{tmp_path}/a.npz").labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert not texts(said)


def test_no_labels_found_is_said(tmp_path, said):
    parquet(tmp_path / "a.parquet", x=X, species=[0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", x=X, species=[0, 1, 2, 0, 1, 2])
    assert rows(f"parquet:{tmp_path}/a.parquet").labels is None
    assert rows(f"npz:{tmp_path}/a.npz").labels is None
    assert "a.parquet: no labels found, its other columns are species; name them with" in texts(
        said
    )
    assert "a.npz: no labels found, it also holds species; name them with" in texts(said)
    assert rows(f"parquet:{tmp_path}/a.parquet?label=species").labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows(f"npz:{tmp_path}/a.npz?y=species").labels.tolist() == [0, 1, 2, 0, 1, 2]
    for spec in (f"parquet:{tmp_path}/a.parquet?label=kind", f"npz:{tmp_path}/a.npz?y=kind"):
        with pytest.raises(BadData, match="'kind'"):
            rows(spec)


NPZ = {
    "X, Y": ("", {"X": X, "Y": range(6)}),
    "X_test, Y_test": ("", {"X_test": X, "Y_test": range(6), "X_train": X[:1], "Y_train": [1]}),
    "test_x, test_y": (
        "/test",
        {"test_x": X, "test_y": range(6), "train_x": X[:1], "train_y": [1]},
    ),
    "MedMNIST": (
        "/test",
        {"test_images": X, "test_labels": np.arange(6)[:, None], "val_images": X[:1]},
    ),
    "MedMNIST, no split": (
        "",
        {"test_images": X, "test_labels": np.arange(6)[:, None], "val_labels": [[1]]},
    ),
    "named": ("?x=signal&y=kind", {"signal": X, "kind": range(6), "x": X[:1]}),
}


@pytest.mark.parametrize("kind", NPZ)
def test_arrays_under_the_names_that_people_give(tmp_path, said, kind):
    how, arrays = NPZ[kind]
    np.savez(tmp_path / "a.npz", **{name: np.asarray(value) for name, value in arrays.items()})
    split, options = (how, "") if how.startswith("/") else ("", how)
    data = rows(f"npz{split}:{tmp_path}/a.npz{options}")
    assert data.labels.tolist() == list(range(6))
    np.testing.assert_array_equal(data.take(np.arange(6)).x, X)
    assert not texts(said)


def test_text_labels_in_arrays(tmp_path):
    many = {
        "x_train": X,
        "y_train": np.array(LABELS),
        "x_test": X[:2],
        "y_test": np.array(["owl", "dog"]),
    }
    np.savez(tmp_path / "a.npz", **many)
    assert rows(f"npz:{tmp_path}/a.npz").labels.tolist() == [2, 1]
    np.savez(tmp_path / "b.npz", **many, class_names=np.array(["owl", "dog", "cat"]))
    data = rows(f"npz:{tmp_path}/b.npz")
    assert (data.labels.tolist(), data.class_names) == ([0, 1], ("owl", "dog", "cat"))
    np.savez(tmp_path / "c.npz", x=X, y=np.array(LABELS, dtype="S"))
    assert rows(f"npz:{tmp_path}/c.npz").labels.tolist() == [1, 0, 2, 1, 0, 2]
    np.savez(tmp_path / "d.npz", x=X, y=np.arange(6) % 3, classes=np.array(["a", "b", "c"]))
    assert rows(f"npz:{tmp_path}/d.npz").class_names == ("a", "b", "c")
    np.savez(tmp_path / "e.npz", **{**many, "y_test": np.array(["owl", "cow"])})
    with pytest.raises(
        BadData, match="the class 'cow'; expected the 3 classes of the split 'train'"
    ):
        rows(f"npz:{tmp_path}/e.npz")


def test_single_arrays_and_folders_are_named(tmp_path):
    np.save(tmp_path / "test_x.npy", X)
    with pytest.raises(BadFile, match=r"single array .*np.load\('x.npy'\)"):
        rows(f"npz:{tmp_path}/test_x.npy")
    with pytest.raises(BadFile, match="is a folder"):
        rows(f"npz:{tmp_path}")
