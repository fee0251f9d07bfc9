"""`dsa-jax verify`."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from dsa_jax.commands.outputs import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a whole checkpoint and check every tensor against its checksum.

    For example:
      dsa-jax verify v32-orbax
      dsa-jax verify runs/nano
      dsa-jax verify runs/nano/checkpoints/500

    Exits with 1 if anything is wrong. Of a training run, all its checkpoints are read. A folder that neither
    `convert` nor a training run wrote has no checksums: then names, shapes, dtypes and block scales are checked.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Checkpoint of any kind, or a training run."""
    ignore: tuple[str, ...] = ()
    """Keys of config.json that are unknown here and do not change the model."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        from dsa_jax.checkpoint import verify

        started = time.perf_counter()
        with progress_bar("verifying") as on_progress:
            found = verify(self.folder, ignore=self.ignore, on_progress=on_progress)
        seconds = time.perf_counter() - started
        for fault in found.faults:
            print(fault)
        good = "match their checksums" if found.checksums else "are readable; the folder has no checksums"
        verdict = f"{len(found.faults)} faults" if found.faults else f"{found.tensors:,} tensors {good}"
        rate = found.bytes_read / seconds / 1e6
        print(f"{self.folder}: {verdict} ({found.bytes_read:,} bytes, {rate:.0f} MB/s)")
        return 1 if found.faults else 0
