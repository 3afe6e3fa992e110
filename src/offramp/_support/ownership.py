"""Which folders are ours to replace: those whose manifest is sound, and in which every file is one
that we write.

Anything else belongs to somebody: a web application has a manifest.json too, and a folder of ours
may hold notes. It is refused, what is foreign is named, and nothing in it is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp._support.files import read_json
from offramp._support.replacement import is_regular, unwritable
from offramp.errors import BadFile, OfframpError

SHOWN = 3  # foreign files that are named
ANY_VERSION = 10**6


def _nothing(_body: Mapping[str, Any]) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that offramp writes.

    what: its name in a sentence. manifest: the file that is always there, a document of the schema
    `schema`. files: the names of all files that may be there. listed: further names, from the body
    of the manifest.
    """

    what: str
    manifest: str
    schema: str
    files: frozenset[str]
    listed: Callable[[Mapping[str, Any]], Iterable[str]] = _nothing
    python: bool = False  # whether Python may keep compiled files there, in __pycache__

    def require_own(self, folder: Path) -> None:
        """Raise BadFile for anything but a new, an empty or an earlier folder of this kind."""
        try:
            if not os.path.lexists(folder):
                return
            if folder.is_symlink():
                raise BadFile(
                    f"{folder} is a link, and only a folder itself is replaced; name the folder"
                )
            if not folder.is_dir():
                raise BadFile(f"{folder} exists and is no folder; name a new or an empty folder")
            names = sorted(os.listdir(folder))
        except OSError as problem:
            raise unwritable(folder, problem) from problem
        if names:
            self._require_manifest(folder, names)

    def _require_manifest(self, folder: Path, names: list[str]) -> None:
        manifest = folder / self.manifest
        if not is_regular(manifest):
            raise BadFile(
                f"{folder} was not written by offramp as {self.what} (it holds {_few(names)}, and "
                f"no {self.manifest}); "
                "name a new or an empty folder"
            )
        try:
            _, body = read_json(manifest, self.schema, ANY_VERSION)
            known = self.files | set(self.listed(body))
        except (OfframpError, AttributeError, KeyError, TypeError) as problem:
            raise BadFile(
                f"{folder} was not written by offramp as {self.what} (its {self.manifest} is "
                f"something else, or "
                "damaged); name a new or an empty folder, or remove this one"
            ) from problem
        foreign = [name for name in names if not self._is_ours(folder / name, known)]
        if foreign:
            raise BadFile(
                f"{folder} holds {_few(foreign)}, which offramp did not write there, and would be "
                f"replaced whole; move "
                "it away, or name another folder"
            )

    def _is_ours(self, path: Path, known: Iterable[str]) -> bool:
        if self.python and path.name == "__pycache__" and path.is_dir() and not path.is_symlink():
            return all(is_regular(each) and each.suffix == ".pyc" for each in path.iterdir())
        return path.name in known and is_regular(path)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
