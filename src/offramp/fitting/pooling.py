"""Pooled features of a frozen backbone, computed once; large ones are memory-mapped.

With a folder, the features are written there under a name made of backbone, pooling, data and
augmentation, and a later run reads them again. A file with their digests is written next to them:
features that are damaged or incomplete are computed again.
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
LARGE = 512 << 20  # bytes of one node's features above which they are kept on disk


class Pooling:
    """The pooled features of a network's exits, by data set.

    They are kept as long as the backbone does not change: after a phase that trained it, they are
    computed again. Processes take whole batches in turn, so results match a single process bit for
    bit. Each process gets all features; the main one writes them.

    Args:
        network: the network.
        names: the exits that can pool.
        views: copies of the training rows, each one augmented differently.
        augment: the augmentation; None if there is none.
        seed: of the augmentation.
        folder: where features are written; None keeps them in memory only.
        progress: whether to show progress.
        processes: that pool together.
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
        self._columns: dict[str, dict[str, Array]] = {}  # by key

    def features(self, source: Rows, data: str, *, held: bool = False) -> dict[str, Array]:
        """The pooled features of a data set: from memory, from the folder, or computed.

        Args:
            source: the rows.
            data: their fingerprint.
            held: whether they are development rows: these are not augmented, and there is one copy.

        Returns:
            Float32 [views N, F] by node.
        """
        views = 1 if held else self.views
        augment = None if held else self.augment
        # The fingerprint ignores type and padding, but features depend on them.
        exact = digests_of(source.take_x(np.arange(min(LOOKED, len(source)))), form=1)
        seed = self.seed if augment else 0
        key = self._key([data, fingerprint_of(exact), views, plain(augment), seed])
        if key in self._columns:
            return self._columns[key]

        # A key begins with the digest of the backbone: drop the features of an earlier backbone.
        backbone = key.split("-")[0]
        for old in list(self._columns):
            if old.split("-")[0] != backbone:
                del self._columns[old]
        stored = self.processes.agreed(lambda: self._read(key))
        # All processes must have read them: another machine may not see the folder.
        if all(self.processes.gathered(stored is not None)):
            self._columns[key] = stored or {}
        else:
            self._columns[key] = self._computed(source, views, augment)
            self.processes.alone(lambda: self._store(key))
        return self._columns[key]

    def _computed(self, source: Rows, views: int, augment: Augment | None) -> dict[str, Array]:
        """Pool all rows, view by view.

        In each turn every process pools one batch, and all of them exchange the results. With 2
        processes, turn 3 is batch 6 in the first process and batch 7 in the second.
        """
        columns = dict[str, Array]()
        processes = self.processes
        total = len(source)
        turns = -(-total // (BATCH * processes.count))
        show = self.progress and processes.main
        for view in range(views):
            own_batches = source.batches(BATCH, processes.turn)
            for turn in track(range(turns), what="pooling", total=turns, show=show):
                first = turn * processes.count  # number of the first process's batch
                index = (view, first + processes.rank)
                pool = partial(self._batch, own_batches, index, augment)
                batches = processes.gathered(processes.agreed(pool))
                # write the batches of all processes to their rows
                for number, values in enumerate(batches, first):
                    start = view * total + number * BATCH
                    for name, value in values.items():
                        if name not in columns:
                            columns[name] = _room((views * total, value.shape[1]))
                        columns[name][start : start + len(value)] = value
        return columns

    def _batch(
        self, batches: Iterator[Batch], index: tuple[int, int], augment: Augment | None
    ) -> dict[str, Array]:
        """The features [b, F] of the next batch; empty if this process has no batch left."""
        batch = next(batches, None)
        if batch is None:
            return {}
        device = self.network.device()
        # the seed depends on view and batch, and not on the process that pools it
        seed_torch(drawn(self.seed, *index), device)
        pooled = pooled_of(self.network, augmented(batch.x, augment, device), self.names)
        return {name: value.float().cpu().numpy() for name, value in pooled.items()}

    def _key(self, details: list[Any]) -> str:
        """Two digests: of backbone and preprocessing, and of everything else."""
        network = self.network
        backbone = hashlib.sha256()
        for module in (network.backbone, network.fronts):
            backbone.update(repr(module).encode())  # the layers and their options
            # buffers include those that are not in the state dict
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                array = value.detach().cpu().contiguous().reshape(-1)
                backbone.update(name.encode())
                backbone.update(array.view(torch.uint8).numpy().tobytes())
        fronts = {name: described(preprocess) for name, preprocess in network.fronts.items()}
        pools = {name: described(network.exit_of(name)) for name in self.names}
        rest = hashlib.sha256(json.dumps([details, fronts, pools], sort_keys=True).encode())
        return f"{backbone.hexdigest()[:12]}-{rest.hexdigest()[:12]}"

    def _files(self, key: str) -> dict[str, Path]:
        """The file of each node's features; empty without a folder."""
        files = dict[str, Path]()
        if self.folder is not None:
            for index, name in enumerate(self.names):
                files[name] = self.folder / f"pooled-{key}-{index}.npy"
        return files

    def _digests(self, key: str) -> Path:
        """The file of digests. It is written last: without it, the features are incomplete."""
        assert self.folder is not None
        return self.folder / f"pooled-{key}.json"

    def _read(self, key: str) -> dict[str, Array] | None:
        """The features in the folder; None if any of them is missing or damaged."""
        files = self._files(key)
        if not files:
            return None
        if not all(file.is_file() for file in (self._digests(key), *files.values())):
            return None
        columns = dict[str, Array]()
        try:
            digests = read_json(self._digests(key), KIND, SCHEMA)[1]
            for file in files.values():
                if digest_file(file) != digests.get(file.name):
                    return None
            for name, file in files.items():
                columns[name] = np.load(file, mmap_mode="c", allow_pickle=False)
        except (BadFile, ValueError, EOFError, OSError):
            return None  # damaged in any way: they can be computed again
        return columns

    def _store(self, key: str) -> None:
        """Write the features and then their digests, if there is a folder."""
        files = self._files(key)
        if not files:
            return
        for name, file in files.items():
            with replacing(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, self._columns[key][name], allow_pickle=False)
        digests = {file.name: digest_file(file) for file in files.values()}
        # An earlier file there is replaced: it could not be read.
        with replacing(self._digests(key)) as temporary:
            write_json(temporary, KIND, SCHEMA, digests)


def _room(shape: tuple[int, int]) -> Array:
    """An empty float32 array: in memory, or in a file without a name that ends with the process."""
    if 4 * shape[0] * shape[1] < LARGE:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
