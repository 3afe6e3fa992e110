"""The hubs on their own packages, where they are installed; nothing is fetched."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import offramp as off
from offramp.building.factories import make_model, preprocess_of
from offramp.errors import BadFile, InvalidArgument, UnknownName
from packages import real

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def image(high, wide):
    return torch.randint(
        0, 256, (2, 3, high, wide), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_timm_cut_saved_and_loaded(tmp_path):
    real("timm")
    spec = "timm:test_resnet?pretrained=no&num_classes=5"
    net = off.cut(
        make_model(spec), image(48, 40), at=["layer2"], preprocess=preprocess_of(spec), spec=spec
    )
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    with torch.no_grad():
        assert all(
            torch.equal(one, other)
            for one, other in zip(net(image(48, 40)), again(image(48, 40)), strict=True)
        )
    assert net(image(48, 40))[-1].shape == (2, 5)


def test_timm_normalizes_as_timm_does():
    timm = real("timm")
    from PIL import Image
    from timm.data.transforms_factory import create_transform

    x = (
        np.add.outer(np.arange(300), np.arange(260))[..., None] // np.array([3, 4, 5]) % 256
    ).astype(np.uint8)
    found = timm.data.resolve_model_data_config(timm.create_model("resnet18"))
    theirs = create_transform(**found, is_training=False)(Image.fromarray(x))
    ours = preprocess_of("timm:resnet18")(torch.from_numpy(x.transpose(2, 0, 1).copy())[None])[0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02  # Pillow rounds to bytes twice


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_torchvision_normalizes_as_its_weights_say(name):
    models = real("torchvision").models
    x = image(300, 260)
    theirs = models.get_model_weights(name).DEFAULT.transforms()(x.float() / 255)
    theirs_of_bytes = models.get_model_weights(name).DEFAULT.transforms()(x)
    ours = preprocess_of(f"torchvision:{name}")(x)
    assert ours.shape == theirs.shape
    # a cubic is clamped only on bytes, and rounded there
    near = theirs if name == "resnet18" else theirs_of_bytes
    torch.testing.assert_close(ours, near, atol=1e-4 if name == "resnet18" else 0.02, rtol=0)


def test_torchvision_rebuilds_what_its_weights_need(monkeypatch):
    models = real("torchvision").models
    model = make_model("torchvision:googlenet", fetch=False)
    assert model.transform_input
    assert not make_model("torchvision:googlenet?pretrained=no").transform_input
    assert (
        make_model("torchvision:vit_b_16?weights=IMAGENET1K_SWAG_E2E_V1", fetch=False).image_size
        == 384
    )
    kind = type(models.get_model_weights("googlenet").DEFAULT)
    tensors = {**model.state_dict(), "aux1.conv.weight": torch.zeros(1)}
    monkeypatch.setattr(
        kind, "get_state_dict", lambda self, **given: dict(tensors) if given["weights_only"] else {}
    )
    fetched = make_model("torchvision:googlenet")
    assert all(torch.equal(value, tensors[name]) for name, value in fetched.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("torchvision:resnet81", UnknownName, "resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", UnknownName, "classifier"),
        ("torchvision:resnet18?weights=IMAGENET", UnknownName, "IMAGENET1K_V1"),
        ("torchvision:resnet18?num_classes=3", InvalidArgument, "classes of ImageNet"),
    ],
)
def test_torchvision_refuses(spec, error, says):
    real("torchvision")
    with pytest.raises(error, match=says):
        make_model(spec)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with tiny models: texts, images, no classifier, code of its own."""
    transformers = real("transformers")
    root = tmp_path_factory.mktemp("hf")
    texts = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, num_labels=3, **TINY)
    transformers.BertForSequenceClassification(texts).save_pretrained(root / "texts")
    transformers.BertModel(texts).save_pretrained(root / "headless")
    vit = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **TINY)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "images")
    said = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5] * 3,
        "resample": 3,
        "size": {"height": 32, "width": 32},
    }
    (root / "images" / "preprocessor_config.json").write_text(json.dumps(said))
    (root / "code").mkdir()
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "conf.Mine"}, "architectures": ["Mine"]}
    (root / "code" / "config.json").write_text(json.dumps(own))
    (root / "code" / "conf.py").write_text(f"open({str(root / 'ran')!r}, 'w')\nclass Mine: pass\n")
    return root


def test_hf_of_texts(folders, tmp_path):
    spec = f"hf:{folders / 'texts'}"
    model = make_model(spec)
    rows = {
        "input_ids": torch.randint(5, 60, (3, 8)),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
    }
    assert preprocess_of(spec) is None
    net = off.cut(model, rows, at=["bert.encoder.layer.0"], exits="linear_masked", spec=spec)
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match="give it again"):
        off.load(tmp_path / "net")
    again = off.load(tmp_path / "net", make_model(spec, fetch=False))
    with torch.no_grad():
        assert torch.equal(again(rows)[-1], model(**rows).logits)


def test_hf_of_images(folders):
    spec = f"hf:{folders / 'images'}"
    preprocess = preprocess_of(spec)
    assert preprocess.config()["size"] == (32, 32)
    assert preprocess.config()["interpolation"] == "bicubic"
    net = off.cut(
        make_model(spec), image(40, 40), at=["vit.layers.0"], preprocess=preprocess, exits="linear"
    )
    assert net(image(40, 40))[-1].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("headless", "trained to classify, but it has no weights for 2 tensors"),
        ("code", "Code that comes with a model is not run"),
        ("nothing", "must be followed by a folder"),
    ],
)
def test_hf_refuses(folders, name, says):
    with pytest.raises(InvalidArgument, match=says):
        make_model(f"hf:{folders / name}")
    assert not (folders / "ran").exists()
    assert "conf" not in sys.modules


def test_hf_without_preprocessing(folders):
    (folders / "plain").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folders / "plain" / name).write_bytes((folders / "images" / name).read_bytes())
    with pytest.raises(InvalidArgument, match="preprocessor_config"):
        preprocess_of(f"hf:{folders / 'plain'}")
    (folders / "plain" / "preprocessor_config.json").write_text("[]")
    with pytest.raises(BadFile, match="--preprocess"):
        preprocess_of(f"hf:{folders / 'plain'}")
