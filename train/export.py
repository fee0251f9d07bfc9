"""`python -m train.export RUN_FOLDER OUT`: the newest checkpoint of a run in DeepSeek's released layout.

OUT can be read by `dsa-jax generate` and transformers: FP8 blocks with scales, config.json and, for a run on text,
tokenizer.json. A run that started from a checkpoint also passes on that checkpoint's generation_config.json,
tokenizer_config.json, chat template and the like. ``--dtype bfloat16`` and ``float32`` store the weights unquantised.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.checkpoint import write_hf
from dsa_jax.checkpoint.hf_plan import HfOptions
from dsa_jax.checkpoint.open_checkpoint import files_to_carry
from dsa_jax.checkpoint.save import refuse_taken
from dsa_jax.commands.errors import run_command
from dsa_jax.commands.outputs import outputs_locked
from train.checkpoint import Checkpoints
from train.config import Run
from train.data.provenance import tokenizer_of
from train.initial import initial_params, lora_scale
from train.lora import merged
from train.run_folder import described_run


def trained(folder: str | os.PathLike[str]) -> tuple[Run, Any]:
    """The run in ``folder`` and the {"params": tree} of its newest checkpoint, adapters merged.

    Raises:
      ValueError: the folder holds no run, a description of it that is damaged, or no readable checkpoint.
    """
    folder = Path(folder)
    run = described_run(folder)
    checkpoints = Checkpoints(folder / "checkpoints", run.keep, read_only=True)
    restored = checkpoints.restore(run, jax.eval_shape(lambda: initial_params(run, load=False)))
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{folder / 'checkpoints'} holds no readable checkpoint")
    return run, merged(restored.state.params, lora_scale(run))


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str = "fp8",
    max_shard_bytes: int = 16_000_000,
) -> None:
    """Writes the newest checkpoint of the run in ``folder`` to ``out``, which must not exist."""
    out, quantize = Path(out), "fp8" if dtype == "fp8" else None
    HfOptions(quantize=quantize, max_shard_bytes=max_shard_bytes)
    refuse_taken(out)
    run, params = trained(folder)
    carried = carried_files(run)
    if dtype != "fp8":
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    write_hf(
        out,
        params,
        run.model,
        quantize=quantize,
        max_shard_bytes=max_shard_bytes,
        # A model that came without copies of embedding and head in its MTP layer is passed on without them.
        mtp_copies=run.init_from is None,
        carried=carried,
    )


def carried_files(run: Run) -> tuple[Path, ...]:
    """Files that OUT gets besides the model: those of ``init_from``, and the tokenizer.json of the run's data.

    Raises:
      ValueError: the folder ``init_from`` is no longer there.
    """
    found: dict[str, Path] = {}
    if run.init_from:
        if not Path(run.init_from).is_dir():
            raise ValueError(
                f"the run started from {run.init_from}, whose tokenizer files and generation_config.json belong into "
                "the export, and that folder is not there; put it back, or a folder with these files in its place"
            )
        found = {file.name: file for file in files_to_carry(Path(run.init_from))}
    sources = [source for source in run.data if source.folder]
    if sources and (tokenizer := tokenizer_of(sources[0])):
        found["tokenizer.json"] = tokenizer
    return tuple(found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=("fp8", "bfloat16", "float32"), default="fp8")
    parser.add_argument("--max-shard-bytes", type=int, default=16_000_000)
    options = parser.parse_args(arguments)

    def write() -> int:
        with outputs_locked(options.out):
            export(options.run, options.out, options.dtype, options.max_shard_bytes)
        return 0

    return run_command("python -m train.export", write)


if __name__ == "__main__":
    sys.exit(main())
