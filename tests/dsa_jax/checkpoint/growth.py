"""How many lines of dsa_jax run per operation on a checkpoint: `python -m tests.dsa_jax.checkpoint.growth SIZE ...`.

A process of its own, because the shape checks of the tests add lines to every call. Prints {size: {operation: lines}}.
"""

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dsa_jax
from dsa_jax.checkpoint import convert, load_config, load_params, verify, write_hf
from dsa_jax.checkpoint.compare_tensors import compare_tensors
from dsa_jax.checkpoint.hf_plan import HfOptions, plan_hf
from dsa_jax.checkpoint.names import _expanded, leaf_shapes, tensor_table
from dsa_jax.checkpoint.orbax_plan import plan_orbax
from dsa_jax.checkpoint.save import ParamsTensors
from dsa_jax.checkpoint.tensors import find_faults
from dsa_jax.config import ModelConfig, tiny

SHARD = 2000  # bytes: shards hold some tens of tensors, so that their number grows too


def config_of(experts: int) -> ModelConfig:
    """One layer of width 8; each expert adds three tensors of 8 values."""
    return tiny(
        vocab_size=8, d_model=8, d_ff=8, d_expert=1, n_layers=1, n_dense_layers=0, n_heads=1, q_lora_rank=4,
        kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2, index_n_heads=1, index_head_dim=2,
        n_routed_experts=experts, n_activated_experts=1, n_expert_groups=1, n_limited_groups=1, n_mtp_layers=0,
        fp8=None, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip


def params_of(config: ModelConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, shape in leaf_shapes(config).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.zeros(shape, np.float32)
    return {"params": tree}


def lines_of(work: Callable[[], Any]) -> int:
    """Lines of dsa_jax that the work executes, in all threads; one of a loop or comprehension counts each time."""
    counts: dict[int, int] = {}
    package = str(Path(dsa_jax.__file__).parent)

    def on_line(frame, event, argument):
        thread = threading.get_ident()
        counts[thread] = counts.get(thread, 0) + 1
        return on_line

    def on_call(frame, event, argument):
        return on_line if frame.f_code.co_filename.startswith(package) else None

    before = sys.gettrace()
    threading.settrace(on_call)
    sys.settrace(on_call)
    try:
        work()
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]
    return sum(counts.values())


def operations(folder: Path, experts: int) -> dict[str, int]:
    """What is done with a checkpoint of this size -> lines."""
    folder.mkdir()
    hf, orbax, back = (folder / name for name in ("hf", "orbax", "back"))
    config = config_of(experts)
    steps: dict[str, Callable[[], Any]] = {
        "write": lambda: write_hf(hf, params_of(config), config, max_shard_bytes=SHARD),
        "convert to Orbax": lambda: convert(hf, orbax),
        "convert to Hugging Face": lambda: convert(orbax, back, max_shard_bytes=SHARD),
        "verify Hugging Face": lambda: verify(back),
        "verify Orbax": lambda: verify(orbax),
        "compare": lambda: compare_tensors(hf, orbax),
        "load Hugging Face": lambda: load_params(hf, load_config(hf)),
        "load Orbax": lambda: load_params(orbax, load_config(orbax)),
    }
    tensor_table(config)
    return {name: lines_of(work) for name, work in steps.items()}


def plans(experts: int) -> dict[str, int]:
    """What is decided before the first byte is written -> lines."""
    config = config_of(experts)
    tensors = ParamsTensors(Path("nowhere"), params_of(config), config, mtp_copies=True)
    table = tensor_table(config)
    steps: list[dict[str, Any]] = [{"pieces": [[name, 0] for name in table]}]
    hf = plan_hf(tensors, config, {}, HfOptions(max_shard_bytes=SHARD))
    return {
        "names": lines_of(lambda: _expanded.__wrapped__(config)),
        "faults": lines_of(lambda: find_faults(tensors, config, read_scales=True)),
        "plan Orbax": lines_of(lambda: plan_orbax(tensors, config, None).recorded_bytes(steps)),
        "plan Hugging Face": lines_of(lambda: plan_hf(tensors, config, {}, HfOptions(max_shard_bytes=SHARD))),
        "resume Hugging Face": lines_of(
            lambda: hf.recorded_bytes([{"shard": name} for name, _ in hf.files()])
        ),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {size: operations(Path(folder) / size, int(size)) for size in sys.argv[1:]}
    print(json.dumps(found))
