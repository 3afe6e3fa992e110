"""The networks of benchmarks/sst2.py: an encoder written plainly, exits hung on it, and how they
are trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sst2_texts import LONGEST
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import offramp as off
from offramp.recipes.joint import Joint

WIDTH = 128
HEADS = 4
INNER = 256
CLASSES = 2
RATE = 2e-3
BATCH = 128


class Layer(nn.Module):
    """Attention among the words of a text, then two linear layers at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)
        self.between = nn.LayerNorm(WIDTH)
        self.looks = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.drop = nn.Dropout(0.1)

    def forward(self, h: Tensor, seen: Tensor) -> Tensor:
        """h [B, T, F], seen bool [B, 1, 1, T] -> [B, T, F]."""
        query, key, value = (
            part.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for part in self.looks(self.before(h)).chunk(3, 2)
        )
        found = scaled_dot_product_attention(query, key, value, attn_mask=seen)
        h = h + self.drop(self.mix(found.transpose(1, 2).flatten(2)))
        return h + self.drop(self.feed(self.between(h)))


class Encoder(nn.Module):
    """Words [B, T] and a mask [B, T] -> logits [B, 2]."""

    def __init__(self, words: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH, padding_idx=0)
        self.candidates = nn.Embedding(LONGEST, WIDTH)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.candidates.weight, std=0.02)
        self.drop = nn.Dropout(0.3)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 each; every text has at least one word."""
        h = self.drop(self.words(input_ids)) + self.candidates.weight[: input_ids.shape[1]]
        seen = (attention_mask != 0)[:, None, None, :]
        for layer in self.layers:
            h = layer(h, seen)
        kept = attention_mask[:, :, None].to(h.dtype)
        logits: Tensor = self.head((h * kept).sum(1) / kept.sum(1))
        return logits


def untrained(layers: int, words: int, example: Any, seed: int) -> off.Network:
    """An encoder with exits after each layer but the last; one of a single layer has its exit on
    the words.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Encoder(words, layers).eval()
        at = [f"layers.{number}" for number in range(layers - 1)] or ["words"]
        length = ("input_ids", "attention_mask")
        return off.cut(model, example, at=at, exits="linear_masked", gate="max_prob", length=length)


def train_model(
    network: off.Network, specs: dict[str, str], alone: bool, rounds: int
) -> list[dict[str, float]]:
    """Rounds of short phrases, then long ones, at half the rate of the round before; the best round
    is kept.
    """
    weights = {name: float(not alone or name == "backbone") for name in network.topology.exits}
    told = []
    best = 0.0
    kept = network.state_dict()
    for number in range(rounds):
        recipe = Joint(weights, epochs=1, rate=RATE * 0.5**number)
        given: dict[str, Any] = {
            "recipe": recipe,
            "batch_size": BATCH,
            "seed": number,
            "progress": False,
        }
        off.fit(network, specs["short"], **given)
        done = off.fit(network, specs["long"], development=specs["held"], **given)
        told.append(
            {
                name: value
                for name, value in done.last.figures.items()
                if name.startswith("accuracy/")
            }
        )
        print(
            f"round {number + 1}:",
            ", ".join(f"{name} {value:.1%}" for name, value in told[-1].items()),
            flush=True,
        )
        mean = float(
            np.average(
                [told[-1][f"accuracy/{name}"] for name in weights], weights=[*weights.values()]
            )
        )
        if mean <= best:
            break
        best = mean
        kept = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return told


def network_of(
    specs: dict[str, str], words: int, cache: Path, layers: int, alone: bool, rounds: int
) -> off.Network:
    """A network with exits, or (alone) one whose last exit was all that was trained; from the cache
    or trained now.
    """
    path = cache / f"sst2-{layers}-{'alone' if alone else 'exits'}"
    if not path.exists():
        network = untrained(layers, words, off.rows(specs["dev"]).take(np.arange(8)).x, 0)
        print(f"training {path.name}", flush=True)
        told = train_model(network, specs, alone, rounds)
        off.save(network, path)
        (cache / f"{path.name}.json").write_text(json.dumps(told))
    return off.load(path, Encoder(words, layers).eval())
