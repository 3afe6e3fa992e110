"""The models of zoo.txt: random weights, small inputs, no statistic or scale at its default."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
ROWS = 7
LENGTH = 16
WORDS = 120
SIZES = {  # of images, where 64 pixels will not do
    "inception_v3": 96,
    "swinv2_cr_tiny_224": 224,
    "crossvit_tiny_240": 240,
    "levit_128s": 224,
    "coatnet_nano_rw_224": 224,
    "maxvit_nano_rw_256": 256,
    "efficientformer_l1": 224,
    "tiny_vit_5m_224": 224,
    "botnet26t_256": 256,
    "eva02_tiny_patch14_224": 56,
    "resmlp_12_224": 224,
    "gmlp_ti16_224": 224,
    "mixer_s32_224": 224,
    "pit_ti_224": 224,
    "volo_d1_224": 224,
    "mvitv2_tiny": 224,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "vit_b_16": {"image_size": 64},
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56},
}
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TEXT: dict[str, dict[str, Any]] = {
    "DistilBert": {
        "vocab_size": WORDS,
        "dim": 32,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 48,
        "pad_token_id": 1,
    },
    "Albert": {**BERT, "embedding_size": 16, "num_hidden_groups": 4},
    "Albert-shared": {**BERT, "embedding_size": 16, "num_hidden_groups": 1},
    "Electra": {**BERT, "embedding_size": 16},
    "ConvBert": {**BERT, "embedding_size": 16, "conv_kernel_size": 3},
    "Deberta": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {
        **BERT,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
    },
    "Funnel": {
        "vocab_size": WORDS,
        "block_sizes": [2, 2, 2],
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
    },
    "SqueezeBert": {**BERT, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2},
    "MobileBert": {**BERT, "embedding_size": 16, "intra_bottleneck_size": 16},
    "RemBert": {**BERT, "input_embedding_size": 16},
    "Nystromformer": {**BERT, "num_landmarks": LENGTH, "segment_means_seq_len": LENGTH},
    "NomicBert": {**BERT, "head_dim": 8},
    "XLM": {
        "vocab_size": WORDS,
        "emb_dim": 32,
        "n_layers": 4,
        "n_heads": 4,
        "pad_index": 1,
        "max_position_embeddings": 64,
    },
    "GPT2": {
        "vocab_size": WORDS,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": 1,
    },
    "XLNet": {
        "vocab_size": WORDS,
        "d_model": 32,
        "n_layer": 4,
        "n_head": 4,
        "d_inner": 48,
        "pad_token_id": 1,
    },
    "T5": {
        "vocab_size": WORDS,
        "d_model": 32,
        "num_layers": 3,
        "num_heads": 4,
        "d_ff": 48,
        "d_kv": 8,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        "vocab_size": WORDS,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": 64,
    },
}
TEXT["Flaubert"] = TEXT["XLM"]
_VIT = {**BERT, "image_size": 32, "patch_size": 8}
IMAGES: dict[str, dict[str, Any]] = {
    "ViT": _VIT,
    "Dinov2": {**_VIT, "mlp_ratio": 2},
    "Beit": _VIT,
    "Swin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1, 2],
        "num_heads": [2, 4, 4],
    },
    "ResNet": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 2, 1],
        "layer_type": "basic",
    },
}
IMAGES["Swin"]["window_size"] = 4


def build(name: str) -> tuple[nn.Module, Any]:
    """A model of the list in eval mode, and seven rows for it. Raises ImportError where its package
    is missing.
    """
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    if library == "odd":
        model, example = importlib.import_module("zoo_odd").build(short)
    elif library == "hf":
        model, example = _transformer(short)
    else:
        model, example = _vision(library, short)
    return unsettled(model, example), example


def unsettled(model: nn.Module, example: Any) -> nn.Module:
    """The model in eval mode with noise on everything: no scale is one, no shift zero, no statistic
    at its default.

    Statistics are first those of the example, or some models would say the same for every row; then
    they are moved.
    """
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn_like(value) * (
                0.1 if value.dim() < 2 else 0.5 / value[0].numel() ** 0.5
            )
        model.eval()
        for norm in norms:
            norm.train().momentum = 1.0
        model(**example) if isinstance(example, dict) else model(example)
        for norm in filter(lambda norm: norm.track_running_stats, norms):
            norm.running_mean += 0.3 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
            norm.running_var *= 0.5 + 1.5 * torch.rand_like(norm.running_var)
    return model.eval()


def _vision(library: str, name: str) -> tuple[nn.Module, Tensor]:
    options = OPTIONS.get(name, {})
    if library == "torchvision":
        without_compiled_operations()
        make = getattr(importlib.import_module("torchvision.models"), name)
        model = make(weights=None, num_classes=CLASSES, **options)
    else:
        without_compiled_operations()  # timm imports torchvision
        model = importlib.import_module("timm").create_model(name, num_classes=CLASSES, **options)
    size = SIZES.get(name, 64)
    return model, torch.randn(ROWS, 3, size, size)


def _transformer(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    without_compiled_operations()
    library = importlib.import_module("transformers")
    kind = name.removesuffix("-shared")
    image = name in IMAGES
    options = IMAGES[name] if image else TEXT.get(name, BERT)
    config = getattr(library, f"{kind}Config")(num_labels=CLASSES, **options)
    model = getattr(library, f"{kind}For{'Image' if image else 'Sequence'}Classification")(config)
    if image:
        size = getattr(config, "image_size", 32)
        channels = config.num_channels
        return model, {"pixel_values": torch.randn(ROWS, channels, size, size)}
    return model, _sentences(kind, config)


def _sentences(kind: str, config: Any) -> dict[str, Tensor]:
    """Rows of words, padded at the end to one length, with the mask that says so."""
    lengths = torch.tensor([16, 11, 7, 3, 16, 5, 13])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    words = torch.randint(5, WORDS, (ROWS, LENGTH))
    if kind in ("T5", "Bart"):
        words[torch.arange(ROWS), lengths - 1] = config.eos_token_id
    found = {
        "input_ids": words.where(mask.bool(), torch.tensor(config.pad_token_id or 0)),
        "attention_mask": mask,
    }
    if kind == "FNet":
        del found["attention_mask"]  # it has none: its Fourier transform mixes padding in
    if kind == "LayoutLM":
        found["bbox"] = torch.randint(0, 60, (ROWS, LENGTH, 2)).repeat(1, 1, 2).cumsum(2)
    if getattr(config, "type_vocab_size", 0) == 2:
        found["token_type_ids"] = (torch.arange(LENGTH) >= lengths[:, None] // 2).long() * mask
    return found


def without_compiled_operations() -> None:
    """Let torchvision from PyPI be imported beside a CPU build of torch: its operations are
    declared, and never run.
    """
    if {"torchvision"} & (_DECLARED.keys() | sys.modules.keys()) or importlib.util.find_spec(
        "torchvision"
    ) is None:
        return
    library = _DECLARED["torchvision"] = torch.library.Library("torchvision", "DEF")
    backward = [
        f"_{name}_backward"
        for name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
    ]
    plain = [name[1:].removesuffix("_backward") for name in backward]
    for name in ("nms", "qnms", "qroi_align", *plain, *backward):
        library.define(f"{name}(Tensor x) -> Tensor")


_DECLARED: dict[str, torch.library.Library] = {}
