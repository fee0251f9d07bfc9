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
    if not isinstance(content.get("tensors"), dict) or type(content.get("piece_bytes")) is not int:
        raise ValueError(
            f"{path / CHECKSUMS_FILE} lacks tensors or piece_bytes; convert the checkpoint again"
        )
    return Checksums(tensors=content["tensors"], piece_bytes=content["piece_bytes"])
