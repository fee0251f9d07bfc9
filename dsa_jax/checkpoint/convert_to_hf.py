"""A checkpoint -> Hugging Face folder, resumable after every shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dsa_jax.checkpoint.checksums import write_checksums
from dsa_jax.checkpoint.hf_config import to_hf
from dsa_jax.checkpoint.hf_plan import HfPlan
from dsa_jax.checkpoint.hf_writer import finish_folder, write_shards
from dsa_jax.checkpoint.job import Job
from dsa_jax.checkpoint.open_checkpoint import Checkpoint
from dsa_jax.checkpoint.pieces import digest
from dsa_jax.checkpoint.tensors import FP8
from dsa_jax.config import Fp8Config


def write_hf_folder(
    job: Job, checkpoint: Checkpoint, plan: HfPlan, *, on_bytes: Callable[[int], None]
) -> None:
    """Fills job.path with shards, checksums, carried files, index and config.json, from where an earlier run stopped.

    on_bytes is told of every piece written. Raises OSError when the disk is full; the job can then be resumed.
    """
    digests: dict[str, list[str]] = {}
    for step in job.steps:
        digests |= step["sha256"]
    found: dict[str, list[str]] = {}

    def on_array(name: str, array: np.ndarray) -> None:
        found.setdefault(name, []).append(digest(array))
        on_bytes(array.nbytes)

    shards = write_shards(
        job.path,
        checkpoint.tensors,
        plan,
        scale_fmt=(checkpoint.config.fp8 or Fp8Config()).scale_fmt,
        finished={step["shard"] for step in job.steps},
        on_array=on_array,
    )
    for file_name in shards:
        job.record({"shard": file_name, "sha256": dict(found)})
        digests |= found
        found.clear()
    listed = {
        name: {"source": dtype, "sha256": digests[name]}
        for _, shard in plan.files()
        for output in shard
        for name, (dtype, _) in output.tensors.items()
    }
    write_checksums(job.path, listed)
    finish_folder(job.path, plan, _config_json(checkpoint, plan), checkpoint.carried.files)


def _config_json(checkpoint: Checkpoint, plan: HfPlan) -> dict[str, Any]:
    """The config.json that was carried along, or one made from the config, with the dtypes of the plan."""
    config, carried = checkpoint.config, checkpoint.carried
    dtypes = {output.dtype for shard in plan.shards for output in shard if output.row.quantized}
    fp8 = (config.fp8 or Fp8Config()) if FP8 in dtypes else None
    param_dtype: Literal["bfloat16", "float32"] = "float32" if dtypes == {"F32"} else "bfloat16"
    made = to_hf(dataclasses.replace(config, fp8=fp8, param_dtype=param_dtype))
    if carried.hf_config is None:
        return made
    values = dict(carried.hf_config)
    if fp8 is None:
        values.pop("quantization_config", None)
        values |= {key: param_dtype for key in ("torch_dtype", "dtype") if key in values}
    elif not values.get("quantization_config"):
        values["quantization_config"] = made["quantization_config"]
    return values
