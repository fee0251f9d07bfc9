"""A model, batches and runs that train within a test; `python -m tests.train.small FOLDER` trains one."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.transformer import Transformer
from train.config import Run, Source, Stage, dense, indexer_warmup, sparse
from train.data.synthetic import AssociativeRecall

OPTIONS = (("n_keys", 4), ("n_values", 4), ("n_pairs", 4))
T = 32
TASK = AssociativeRecall(seq_len=T, **dict(OPTIONS))

CONFIG = ModelConfig(
    vocab_size=TASK.vocab_size, d_model=32, n_layers=2, n_dense_layers=1, n_heads=2, d_ff=48, d_expert=16,
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    index_n_heads=2, index_head_dim=16, index_topk=8, n_routed_experts=8, n_shared_experts=1,
    n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, route_scale=1.0, max_seq_len=T,
    n_mtp_layers=1, init_std=0.1, dtype="float32",
)  # fmt: skip
STAGES = (
    dense(20, lr=3e-3, lr_warmup=5, bias_step=0.01),
    indexer_warmup(15, index_lr=3e-3),
    sparse(15, lr=3e-4, index_lr=1e-3, lr_warmup=2, lr_end=0.1, bias_step=0.01),
)


def small_run(*stages: Stage, **changes: Any) -> Run:
    """A run of 50 steps through all three stages, or of ``stages``."""
    run = Run(
        model=CONFIG, stages=stages or STAGES, batch=2, seq_len=T, checkpoint_every=7, log_every=1,
        data=(Source(kind="associative_recall", options=OPTIONS),), eval_batches=0,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


@functools.cache
def initial() -> Any:
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def batch_of(*rows: list[int], seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens. Each row is given by the lengths of its documents; the rest is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), T)
    batch = {"tokens": np.zeros(shape, np.int32), "segment_ids": np.zeros(shape, np.int32)}
    batch["targets"] = np.full(shape, -1, np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            document = rng.integers(CONFIG.vocab_size, size=length)
            span = slice(start, start + length)
            batch["tokens"][row, span] = document
            batch["segment_ids"][row, span] = number
            batch["targets"][row, start : start + length - 1] = document[1:]
            start += length
    return {name: jnp.asarray(array) for name, array in batch.items()}


if __name__ == "__main__":
    from flax import traverse_util

    from train.trainer import train

    trained = train(small_run(), Path(sys.argv[1]))
    np.savez(Path(sys.argv[1]) / "final.npz", **traverse_util.flatten_dict(trained, sep="."))
