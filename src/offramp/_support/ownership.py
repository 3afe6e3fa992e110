"""The folders that offramp may replace: their manifest is valid, and offramp wrote every file in
them.

Any other folder belongs to the user. A web application has a manifest.json too, and somebody may
have put notes into a folder of offramp. Such a folder is refused with the names of the foreign
files, and nothing in it is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp._support.files import read_json
from offramp._support.replacement import is_regular, unwritable
from offramp._support.sentences import few
from offramp.errors import BadFile, OfframpError

SHOWN = 3  # files that a message names
ANY_VERSION = 10**6  # a later offramp's folder is also offramp's


def _nothing(_body: Mapping[str, Any]) -> Iterable[str]:
    """No further files."""
    return ()


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that offramp writes.

    Args:
        what: its name for messages, such as "a network".
        manifest: the file that every such folder has, a document.
        schema: the kind of the document.
        files: names of all files that the folder may have.
        listed: returns further names from the body of the manifest.
        python: whether Python may write compiled files into its `__pycache__`.
    """

    what: str
    manifest: str
    schema: str
    files: frozenset[str]
    listed: Callable[[Mapping[str, Any]], Iterable[str]] = _nothing
    python: bool = False

    def require_own(self, folder: Path) -> None:
        """Raise BadFile, except for a new, an empty or an earlier folder of this kind."""
        try:
            if not os.path.lexists(folder):
                return
            if folder.is_symlink():
                raise BadFile(
                    f"{folder} must be a folder, got a link to one. Name the folder itself"
                )
            if not folder.is_dir():
                raise BadFile(f"{folder} must be a new or an empty folder, got a file")
            names = sorted(os.listdir(folder))
        except OSError as problem:
            raise unwritable(folder, problem) from problem
        if names:
            self._require_manifest(folder, names)

    def _require_manifest(self, folder: Path, names: list[str]) -> None:
        """Raise BadFile for a folder without a valid manifest, or with other files than its own."""
        manifest = folder / self.manifest
        if not is_regular(manifest):
            raise BadFile(
                f"{folder} was not written by offramp as {self.what} (it has {few(names, SHOWN)}, "
                f"but not {self.manifest}). Name a new or an empty folder"
            )
        try:
            _, body = read_json(manifest, self.schema, ANY_VERSION)
            known = self.files | set(self.listed(body))
        except (OfframpError, AttributeError, KeyError, TypeError) as problem:
            raise BadFile(
                f"{folder} was not written by offramp as {self.what} (its {self.manifest} is "
                f"damaged or something else). Name a new or an empty folder, or remove this one"
            ) from problem
        foreign = [name for name in names if not self._is_ours(folder / name, known)]
        if foreign:
            raise BadFile(
                f"{folder} has {few(foreign, SHOWN)}, which offramp did not write there and would "
                f"remove. Move it away, or name another folder"
            )

    def _is_ours(self, path: Path, known: Iterable[str]) -> bool:
        """Whether a path in the folder is one that offramp, or Python, writes there."""
        if self.python and path.name == "__pycache__" and path.is_dir() and not path.is_symlink():
            for file in path.iterdir():
                if not is_regular(file) or file.suffix != ".pyc":
                    return False
            return True
        return path.name in known and is_regular(path)
