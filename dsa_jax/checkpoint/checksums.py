"""The checksums that a conversion leaves in the folder it writes, and `verify` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_jax.checkpoint import pieces
from dsa_jax.checkpoint.files import read_json_object, write_atomically

CHECKSUMS_FILE = "dsa_jax_tensors.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checksums:
    """tensors: released name -> {"source": its dtype in the source, "sha256": digest of each of its pieces}.

    piece_bytes: the size limit that the pieces were cut with.
    """

    tensors: Mapping[str, dict[str, Any]]
    piece_bytes: int


def write_checksums(path: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    """Writes the file into the folder; tensors as in `Checksums`, of pieces as `pieces.cut` makes them."""
    content = {"piece_bytes": pieces.PIECE_BYTES, "tensors": tensors}
    write_atomically(path / CHECKSUMS_FILE, json.dumps(content, indent=0).encode())


def read_checksums(path: Path) -> Checksums | None:
    """The folder's checksums, None when it has none. Raises ValueError for a damaged file."""
    if not (path / CHECKSUMS_FILE).is_file():
        return None
    content = read_json_object(path / CHECKSUMS_FILE)
    tensors, piece_bytes = content.get("tensors"), content.get("piece_bytes")
    if not isinstance(tensors, dict) or type(piece_bytes) is not int or piece_bytes < 1:
        raise ValueError(
            f"{path / CHECKSUMS_FILE} lacks tensors or piece_bytes; convert the checkpoint again"
        )
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or "source" not in entry or not isinstance(entry.get("sha256"), list):
            raise ValueError(
                f"{path / CHECKSUMS_FILE}: {name} lacks source or sha256; convert the checkpoint again"
            )
    return Checksums(tensors=tensors, piece_bytes=piece_bytes)
