"""The named runs of `python -m train`: what each needs, how long it takes and what to expect."""

from collections.abc import Callable

from dsa_jax.config import ModelConfig, YarnConfig
from train.config import Run, Source, dense, indexer_warmup, sparse
from train.data.synthetic import AssociativeRecall

STDLIB = "data/stdlib"  # python -m train.data.prepare stdlib --out data/stdlib


def needles(folder: str, n_needles: int, weight: float = 1.0) -> Source:
    """Facts hidden in the text of ``folder`` and asked for at the end of the row; keys and values are text tokens."""
    options = {"n_needles": n_needles, "first_key": 1024, "n_keys": 512, "first_value": 1536, "n_values": 512}
    return Source(kind="needles", folder=folder, weight=weight, options=tuple(options.items()))


def nano_cpu() -> Run:
    """All three stages on associative recall, in under four minutes on two CPU cores.

    Each pair is one token, so one attention layer suffices; pairs of two tokens would take a model of this size
    thousands of steps. Expected: accuracy 1.0 after the dense stage. With sparse attention, accuracy is near
    chance (1/8) before the warm-up and near 1.0 after it.
    """
    options = (("n_keys", 16), ("n_values", 8), ("n_pairs", 12))
    task = AssociativeRecall(seq_len=64, **dict(options))
    model = ModelConfig(
        vocab_size=task.vocab_size, d_model=64, n_layers=2, n_dense_layers=1, n_heads=4, d_ff=128, d_expert=32,
        q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        index_n_heads=4, index_head_dim=32, index_topk=8, n_routed_experts=8, n_shared_experts=1,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, route_scale=1.0, max_seq_len=128,
        n_mtp_layers=1, mtp_shared_embeddings=True, init_std=0.1, dtype="float32",
    )  # fmt: skip
    return Run(
        model=model,
        stages=(
            dense(200, lr=3e-3, lr_warmup=20, bias_step=0.01),
            indexer_warmup(150, index_lr=3e-3),
            sparse(50, lr=3e-4, index_lr=1e-3, bias_step=0.01),
        ),
        data=(Source(kind="associative_recall", options=options),),
        batch=32,
        seq_len=64,
        checkpoint_every=100,
        log_every=25,
    )


def nano() -> Run:
    """All stages of a 15 M parameter model on Python's own sources and documentation: dsa_jax/nano.

    Needs `python -m train.data.prepare stdlib --tests --out data/stdlib`. Five minutes on one NVIDIA H200, compilation
    included. Expected: held-out cross entropy 2.6 after the dense stage, 2.5 at the end, dense and sparse alike; mass
    recall 0.98 of the oracle after the warm-up (docs/training.md).
    """
    model = ModelConfig(
        vocab_size=4096, d_model=256, n_layers=6, n_dense_layers=1, n_heads=4, d_ff=768, d_expert=128,
        q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        index_n_heads=4, index_head_dim=64, index_topk=256, n_routed_experts=16, n_shared_experts=1,
        n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, route_scale=2.5, max_seq_len=8192,
        yarn=YarnConfig(factor=2.0, original_seq_len=4096), n_mtp_layers=1, mtp_shared_embeddings=True,
        init_std=0.04, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2,
    )  # fmt: skip
    return Run(
        model=model,
        stages=(
            dense(770, lr=2e-3, lr_warmup=100, lr_end=0.1),
            indexer_warmup(200),
            sparse(110, lr=2e-4, index_lr=1e-3),
        ),
        data=(Source(kind="text", folder=STDLIB, weight=0.85), needles(STDLIB, 64, weight=0.15)),
        batch=8,
        seq_len=4096,
        checkpoint_every=500,
        log_every=20,
    )


RUNS: dict[str, Callable[[], Run]] = {"nano_cpu": nano_cpu, "nano": nano}
