"""Pooled features of a frozen backbone, computed once: in memory, or memory-mapped where they are
large.

With a folder they are kept there under a name made of backbone, exits' pooling, data and
augmentation, and a later run finds them again. Beside them stands a digest of each file: features
that are damaged, or not whole, are computed again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp._support.files import digest_file, read_json, write_json
from offramp._support.processes import ALONE, Processes
from offramp._support.progress import track
from offramp._support.replacement import replacing
from offramp.data.rows import Batch, Rows, digests_of, fingerprint_of
from offramp.errors import BadFile
from offramp.fitting.forward import pooled_of
from offramp.fitting.loader import LOOKED, Array, Augment, augmented, drawn, seed_torch
from offramp.networks.network import Network, described
from offramp.networks.recipe import plain

KIND = "pooled"
SCHEMA = 1
BATCH = 128
LARGE = 512 << 20  # bytes of one node's features from which on they lie on disk


class Pooling:
    """The pooled features of a network's exits `names`, by data set; `views` copies of the rows,
    each augmented anew.

    Kept while the backbone is what it was: a phase that trained it makes the next one compute them
    again. Several processes take whole batches by turns, so that the features are those of one;
    each gets all, the main one writes.
    """

    def __init__(
        self,
        network: Network,
        names: tuple[str, ...],
        views: int,
        augment: Augment | None,
        *,
        seed: int = 0,
        folder: Path | None = None,
        progress: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        self.network = network
        self.names = names
        self.folder = folder
        self.progress = progress
        self.processes = processes
        self.views = views
        self.augment = augment
        self.seed = seed
        self._kept: dict[str, dict[str, Array]] = {}

    def features(self, source: Rows, data: str, *, held: bool = False) -> dict[str, Array]:
        """Float32 [views N, F] by node; data: the rows' fingerprint. held: rows to look at, one
        copy as they are.
        """
        views, augment = (1, None) if held else (self.views, self.augment)
        # type and padding too
        exact = digests_of(source.take_x(np.arange(min(LOOKED, len(source)))), form=1)
        key = self._key(
            [data, fingerprint_of(exact), views, plain(augment), self.seed if augment else 0]
        )
        if key not in self._kept:
            for old in [other for other in self._kept if other.split("-")[0] != key.split("-")[0]]:
                del self._kept[old]  # of the backbone as it was
            found = self.processes.agreed(lambda: self._found(key))
            # another machine may not see the folder
            if all(self.processes.gathered(found is not None)):
                self._kept[key] = found or {}
                return self._kept[key]
            self._kept[key] = self._computed(source, views, augment)
            self.processes.alone(lambda: self._store(key))
        return self._kept[key]

    def _computed(self, source: Rows, views: int, augment: Augment | None) -> dict[str, Array]:
        columns = dict[str, Array]()
        many = self.processes
        total = len(source)
        turns = -(-total // (BATCH * many.count))
        for view in range(views):
            mine = source.batches(BATCH, many.turn)
            for turn in track(
                range(turns), what="pooling", total=turns, show=self.progress and many.main
            ):
                index = (view, turn * many.count + many.rank)
                found = many.gathered(many.agreed(partial(self._batch, mine, index, augment)))
                for number, values in enumerate(found, turn * many.count):
                    start = view * total + number * BATCH
                    for name, value in values.items():
                        if name not in columns:
                            columns[name] = _room((views * total, value.shape[1]))
                        columns[name][start : start + len(value)] = value
        return columns

    def _batch(
        self, batches: Iterator[Batch], index: tuple[int, int], augment: Augment | None
    ) -> dict[str, Array]:
        """The features of the next batch; nothing for a process that has no more."""
        batch = next(batches, None)
        if batch is None:
            return {}
        device = self.network.device()
        seed_torch(drawn(self.seed, *index), device)
        found = pooled_of(self.network, augmented(batch.x, augment, device), self.names)
        return {name: value.float().cpu().numpy() for name, value in found.items()}

    def _key(self, told: list[Any]) -> str:
        """Digests of backbone and preprocessing, and of all else."""
        mark = hashlib.sha256()
        for part in (self.network.backbone, self.network.fronts):
            mark.update(repr(part).encode())  # what computes
            for key, value in (
                *part.named_parameters(),
                *part.named_buffers(),
            ):  # also buffers that are no state
                array = value.detach().cpu().contiguous().reshape(-1)
                mark.update(key.encode())
                mark.update(array.view(torch.uint8).numpy().tobytes())
        fronts = {name: described(preprocess) for name, preprocess in self.network.fronts.items()}
        pools = {name: described(self.network.exit_of(name)) for name in self.names}
        rest = hashlib.sha256(json.dumps([told, fronts, pools], sort_keys=True).encode())
        return f"{mark.hexdigest()[:12]}-{rest.hexdigest()[:12]}"

    def _files(self, key: str) -> dict[str, Path]:
        home = self.folder
        if home is None:
            return {}
        return {n: home / f"pooled-{key}-{index}.npy" for index, n in enumerate(self.names)}

    def _digests(self, key: str) -> Path:
        """The file of digests, which is written last: where it is missing, the features are not
        whole.
        """
        assert self.folder is not None
        return self.folder / f"pooled-{key}.json"

    def _found(self, key: str) -> dict[str, Array] | None:
        """The features in the folder; None where there are none, or where any of them is not as it
        was written.
        """
        files = self._files(key)
        if not files or not all(file.is_file() for file in (self._digests(key), *files.values())):
            return None
        try:
            digests = read_json(self._digests(key), KIND, SCHEMA)[1]
            if any(digest_file(file) != digests.get(file.name) for file in files.values()):
                return None
            return {
                name: np.load(file, mmap_mode="c", allow_pickle=False)
                for name, file in files.items()
            }
        except (
            BadFile,
            ValueError,
            EOFError,
            OSError,
        ):  # damaged in any way: a cache is never worth an error
            return None

    def _store(self, key: str) -> None:
        files = self._files(key)
        if not files:
            return
        for name, file in files.items():
            with replacing(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, self._kept[key][name], allow_pickle=False)
        digests = {file.name: digest_file(file) for file in files.values()}
        with replacing(self._digests(key)) as temporary:  # whatever is there could not be read
            write_json(temporary, KIND, SCHEMA, digests)


def _room(shape: tuple[int, int]) -> Array:
    """Room for float32 of a shape: in memory, or in a file without a name that goes with the
    process.
    """
    if 4 * shape[0] * shape[1] < LARGE:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
