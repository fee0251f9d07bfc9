"""Work grows with the number of tensors, not with its square: lines of our code are counted, no time is measured."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

    def on_line(frame, event, argument):
        thread = threading.get_ident()
        counts[thread] = counts.get(thread, 0) + 1
        return on_line

    def on_call(frame, event, argument):
        return on_line if "/dsa_jax/" in frame.f_code.co_filename else None

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


def assert_linear(counts: dict[int, dict[str, int]]) -> None:
    """Each tensor more costs as much between the larger sizes as between the smaller ones, within 10 %."""
    small, middle, large = sorted(counts)
    for name in counts[small]:
        first = (counts[middle][name] - counts[small][name]) / (middle - small)
        second = (counts[large][name] - counts[middle][name]) / (large - middle)
        assert second < 1.1 * first, f"{name}: {first:.1f} lines per expert, then {second:.1f}"


def test_work_grows_linearly_with_the_number_of_tensors(tmp_path) -> None:
    assert_linear({experts: operations(tmp_path / str(experts), experts) for experts in (40, 120, 360)})


@pytest.mark.slow
def test_work_grows_linearly_from_1_000_to_10_000_tensors(tmp_path) -> None:
    assert_linear({experts: operations(tmp_path / str(experts), experts) for experts in (333, 1_000, 3_333)})


def test_plans_grow_linearly_to_3_000_tensors() -> None:
    assert_linear({experts: plans(experts) for experts in (100, 300, 1_000)})


@pytest.mark.slow
def test_plans_grow_linearly_to_100_000_tensors() -> None:
    assert_linear({experts: plans(experts) for experts in (333, 3_333, 33_333)})


def test_the_count_notices_a_sum_over_everything_for_each_tensor() -> None:
    def quadratic(experts: int) -> int:
        config = config_of(experts)
        tensors = ParamsTensors(Path("nowhere"), params_of(config), config, mtp_copies=True)
        plan = plan_hf(tensors, config, {}, HfOptions())
        return lines_of(lambda: [plan.n_bytes for _ in tensors.entries])

    with pytest.raises(AssertionError, match="lines per expert"):
        assert_linear({experts: {"sum": quadratic(experts)} for experts in (5, 10, 20)})
