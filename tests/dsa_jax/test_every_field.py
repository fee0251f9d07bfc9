"""Every field of every config changes a result, or is refused: no key is read and then used by nothing.

The row of a field names the value to change it to and the results that must differ. A field without a row fails.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.cache import init_cache
from dsa_jax.checkpoint import to_hf
from dsa_jax.checkpoint.names import leaf_shapes
from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig
from dsa_jax.transformer import Transformer

YARN = YarnConfig(factor=4.0, original_seq_len=4096, mscale=0.8, mscale_all_dim=1.0)
BASE = ModelConfig(
    vocab_size=32, d_model=32, n_layers=2, n_dense_layers=1, n_heads=2, d_ff=48, d_expert=16, q_lora_rank=24,
    kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, index_n_heads=8, index_head_dim=128,
    index_topk=4, n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, n_expert_groups=4,
    n_limited_groups=2, route_scale=1.5, max_seq_len=256, yarn=YARN, n_mtp_layers=1, init_std=0.3, bos_token_id=0,
    eos_token_ids=(1,), pad_token_id=2, fp8=Fp8Config(), dtype="float32",
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, BASE.vocab_size, (1, 24)), jnp.int32)
KEY = jax.random.key(0)

# What must differ, by name; each function takes a config.


@functools.cache
def shapes(config: ModelConfig) -> Any:
    return leaf_shapes(config)


@functools.cache
def exported(config: ModelConfig) -> Any:
    return to_hf(config)


@functools.cache
def dtypes(config: ModelConfig) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, jax.eval_shape(Transformer(config).init, KEY, TOKENS))


@functools.cache
def _initial(config: ModelConfig) -> Any:
    return jax.jit(Transformer(config).init)(KEY, TOKENS[:, :2])


def initial(config: ModelConfig) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(_initial(config))]


@functools.cache
def logits(config: ModelConfig) -> np.ndarray:
    """Of the main model with the base's parameters, which are irregular: no norm is 1, no bias 0."""
    return np.asarray(jax.jit(Transformer(config).apply)(_parameters(), TOKENS)[0])


@functools.cache
def index_scores(config: ModelConfig) -> np.ndarray:
    """Of the last layer's last query."""
    run = jax.jit(functools.partial(Transformer(config).apply, capture=("index_scores",)))
    return np.asarray(run(_parameters(), TOKENS)[2]["index_scores"][-1, :, -1])


@functools.cache
def mtp_logits(config: ModelConfig) -> np.ndarray:
    model, parameters = Transformer(config), _parameters()

    def both(parameters: Any) -> jax.Array:
        hidden = model.apply(parameters, TOKENS)[2]["hidden"]
        return model.apply(parameters, hidden, TOKENS, method="mtp_logits")[0]

    return np.asarray(jax.jit(both)(parameters))


def takes_a_selection(config: ModelConfig) -> bool:
    """Whether the MTP layer may read keys that it selected before."""
    hidden, selected = jnp.zeros((1, 24, config.d_model)), jnp.zeros((1, 24, 4), jnp.int32)
    model = Transformer(config)
    run = functools.partial(model.apply, selected=selected, method="mtp_logits")
    try:
        jax.eval_shape(run, _parameters(), hidden, TOKENS)
    except ValueError as error:
        assert "mtp_reuses_selection" in str(error)
        return False
    return True


def outputs(config: ModelConfig) -> list[str]:
    """What the model returns beside its logits."""
    return sorted(jax.eval_shape(Transformer(config).apply, _parameters(), TOKENS)[2])


@functools.cache
def program(config: ModelConfig) -> str:
    """What is computed, or why it cannot be, for a field that changes how and not what."""

    def loss(parameters: Any) -> jax.Array:
        return Transformer(config).apply(parameters, TOKENS)[0].sum()

    try:
        return str(jax.make_jaxpr(jax.grad(loss))(_parameters()))
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def longest_cache(config: ModelConfig) -> bool:
    """Whether a cache of 200 positions is allowed."""
    try:
        init_cache(config, 1, 200)
    except ValueError as error:
        assert "max_seq_len" in str(error)
        return False
    return True


@functools.cache
def _parameters() -> Any:
    rng = np.random.default_rng(1)

    def irregular(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(irregular, _initial(BASE))


MODEL: dict[str, tuple[Any, Any]] = {
    **{
        name: (value, (shapes, exported))
        for name, value in dict(
            vocab_size=40, d_model=48, n_layers=3, n_dense_layers=2, n_heads=4, d_ff=64, d_expert=24,
            q_lora_rank=32, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
            index_n_heads=4, index_head_dim=256, n_routed_experts=16, n_shared_experts=2, n_mtp_layers=0,
        ).items()
    },
    **{
        name: (value, (logits, exported))
        for name, value in dict(
            index_topk=6, n_activated_experts=3, n_expert_groups=2, n_limited_groups=1, route_scale=2.5,
            norm_topk_prob=False, norm_eps=1e-2, rope_theta=100.0, yarn=None, index_rope_interleaved=True,
        ).items()
    },
    "max_seq_len": (128, (longest_cache, exported)),
    # config.json has no key for these two: other values are refused on export.
    "latent_norm_eps": (1e-2, (logits, "latent_norm_eps must be 1e-6")),
    "index_norm_eps": (1.0, (logits, "index_norm_eps must be 1e-6")),
    "mtp_shared_embeddings": (True, (shapes, dtypes)),
    "mtp_hidden": ("pre_norm", (mtp_logits,)),
    "mtp_reuses_selection": (True, (takes_a_selection, exported)),
    "indexer_types": (("full", "shared"), (shapes, dtypes, "needs index_rope_interleaved=True")),
    "init_std": (0.1, (initial, exported)),
    "bos_token_id": (3, (exported,)),
    "eos_token_ids": ((1, 3), (exported,)),
    "pad_token_id": (3, (exported,)),
    "fp8": (None, (exported,)),
    "attention": ("dense", (logits,)),
    "attention_form": ("mqa", (program,)),
    "index_fp8": (True, (index_scores,)),
    "index_loss": (True, (outputs,)),
    "kv_fp8": (True, (logits,)),
    "implementation": ("mosaic_gpu", (program,)),
    "dtype": ("bfloat16", (logits,)),
    "param_dtype": ("bfloat16", (dtypes,)),
    "query_block": (8, (program,)),
    "remat": ("layer", (program,)),
}  # fmt: skip
ROWS = {
    ModelConfig: MODEL,
    YarnConfig: {
        name: (value, (logits, exported))
        for name, value in dict(
            factor=8.0, original_seq_len=64, beta_fast=4.0, beta_slow=16.0, mscale=0.6, mscale_all_dim=0.7,
            attention_factor=1.2,
        ).items()
    },
    Fp8Config: {
        "block": ((64, 64), "block must be \\(128, 128\\)"),
        "scale_fmt": (None, (exported,)),
    },
}  # fmt: skip
INSIDE = {ModelConfig: None, YarnConfig: "yarn", Fp8Config: "fp8"}


def changed(owner: type, field: str, value: Any) -> ModelConfig:
    if (place := INSIDE[owner]) is None:
        return dataclasses.replace(BASE, **{field: value})
    return dataclasses.replace(BASE, **{place: dataclasses.replace(getattr(BASE, place), **{field: value})})


@pytest.mark.parametrize("owner", ROWS)
def test_every_field_has_a_row(owner) -> None:
    assert set(ROWS[owner]) == {field.name for field in dataclasses.fields(owner)}


@pytest.mark.parametrize(("owner", "field"), [(owner, field) for owner in ROWS for field in ROWS[owner]])
def test_a_changed_field_changes_a_result_or_is_refused(owner, field) -> None:
    value, results = ROWS[owner][field]
    if isinstance(results, str):
        with pytest.raises(ValueError, match=results):
            changed(owner, field, value)
        return
    config = changed(owner, field, value)
    for result in results:
        if isinstance(result, str):
            with pytest.raises(ValueError, match=result):
                to_hf(config)
            continue
        before, after = result(BASE), result(config)
        if isinstance(before, np.ndarray):
            assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-4, result.__name__
        elif result is initial:
            assert any((a != b).any() for a, b in zip(before, after, strict=True))
        else:
            assert before != after, result.__name__
