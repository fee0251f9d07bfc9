"""The measured operations: random inputs of a case, and the call that is timed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels import private_jax
from pallas_kernels.arithmetic import WEIGHT_BLOCK
from pallas_kernels.blocking import map_query_blocks
from pallas_kernels.cases import Case

QUERY_BLOCK = 2048  # queries of dsa_attention whose scores exist at a time
DISTINCT = 4096  # different attention queries of dsa_attention; longer sequences repeat them
INDEXED = ("q", "weights", "key_start", "key_stop")  # per-query arguments of select_keys
ATTENDED = ("q_latent", "q_rope")  # per-query arguments of sparse_mla

Inputs = dict[str, jax.Array]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs of one call, on the device."""
    return jax.jit(_random, static_argnums=0)(case, jax.random.split(jax.random.key(seed), 16))


def _random(case: Case, random_keys: jax.Array) -> Inputs:
    keys = iter(random_keys)
    normal = lambda *shape, dtype=jnp.bfloat16: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
    B, T, S, N, dtype = case.B, case.T, case.S, case.N, jnp.dtype(case.dtype)
    stop = jnp.full((B, T), S, jnp.int32)
    if case.mask == "causal":
        stop = jnp.broadcast_to((jnp.arange(1, T + 1) * (S // T)).astype(jnp.int32), (B, T))
    inputs = {"key_start": jnp.zeros((B, T), jnp.int32), "key_stop": stop}
    if case.operation in ("index_scores", "dsa_attention", "dsa_attention_mha"):
        inputs |= {
            "q": normal(B, T, case.I, case.J, dtype=dtype),
            "k": normal(B, S, case.J, dtype=dtype),
            "weights": normal(B, T, case.I, dtype=jnp.float32),
        }
        if dtype == jnp.float8_e4m3fn:
            inputs["k_scale"] = jnp.exp2(jax.random.randint(next(keys), (B, S), -6, 3).astype(jnp.float32))
    if case.operation in ("dsa_attention_mha", "dense_attention"):
        inputs |= {
            "q_nope": normal(B, T, N, case.P),
            "q_rope": normal(B, T, N, case.R),
            "k_nope": normal(B, S, N, case.P),
            "k_rope": normal(B, S, case.R),
            "v": normal(B, S, N, case.H),
        }
    if case.operation == "dense_attention":
        repeated = jnp.broadcast_to(inputs.pop("k_rope")[:, :, None], (B, S, N, case.R))
        inputs["q"] = jnp.concatenate([inputs.pop("q_nope"), inputs.pop("q_rope")], axis=-1)
        inputs["k"] = jnp.concatenate([inputs.pop("k_nope"), repeated], axis=-1)
        inputs = {name: inputs[name] for name in ("q", "k", "v")}
    if case.operation == "grouped_matmul":
        inputs = {"rows": normal(B * T, case.D), "weights": normal(case.E, case.D, case.F, dtype=dtype)}
        # Random groups: every row draws its expert.
        experts = jax.random.randint(next(keys), (B * T,), 0, case.E)
        inputs["group_sizes"] = jnp.bincount(experts, length=case.E).astype(jnp.int32)
        if dtype == jnp.float8_e4m3fn:
            blocks = (case.E, -(-case.D // WEIGHT_BLOCK), -(-case.F // WEIGHT_BLOCK))
            inputs["weight_scales"] = jnp.exp2(
                jax.random.randint(next(keys), blocks, -6, 3).astype(jnp.float32)
            )
    if case.operation == "select_topk":
        inputs["scores"] = normal(B, T, S, dtype=jnp.float32)
    if case.operation in ("sparse_mla", "dsa_attention"):
        distinct = min(T, DISTINCT)
        inputs |= {
            "q_latent": jnp.tile(normal(B, distinct, N, case.C), (1, T // distinct, 1, 1)),
            "q_rope": jnp.tile(normal(B, distinct, N, case.R), (1, T // distinct, 1, 1)),
            "latent": normal(B, S, case.C),
            "k_rope": normal(B, S, case.R),
        }
    if case.operation == "sparse_mla":
        del inputs["key_start"], inputs["key_stop"]
        indices = jax.random.randint(next(keys), (B, T, case.K), 0, S // case.K or 1)
        indices = indices + jnp.arange(case.K) * max(S // case.K, 1)  # one out of every S / K: no key twice
        inputs["topk_indices"] = jnp.where(indices < S, indices, -1).astype(jnp.int32)
        if dtype == jnp.float8_e4m3fn:
            blocks = inputs["latent"].astype(jnp.float32).reshape(B, S, -1, 128)
            scales = jnp.abs(blocks).max(axis=-1) / 448.0
            inputs["latent"] = (blocks / scales[..., None]).astype(dtype).reshape(B, S, case.C)
            inputs["latent_scale"] = scales
    return inputs


def call(case: Case, inputs: Inputs, implementation: str | None) -> Any:
    """What is timed."""
    if case.operation == "grouped_matmul":
        return pk.grouped_matmul(**inputs, implementation=implementation)
    if case.operation == "index_scores":
        return pk.index_scores(**inputs, implementation=implementation)
    if case.operation == "select_topk":
        scores, bounds = inputs["scores"], {name: inputs[name] for name in ("key_start", "key_stop")}
        return pk.select_topk(scores, case.K, **bounds, implementation=implementation)
    if case.operation == "dense_attention":
        return dense_attention(inputs["q"], inputs["k"], inputs["v"])
    if case.operation == "dsa_attention":
        return dsa_attention(case, inputs, implementation)
    if case.operation == "dsa_attention_mha":
        select = lambda *queries: select_keys(case, inputs, queries, implementation)  # noqa: E731
        indices = map_query_blocks(select, QUERY_BLOCK, *(inputs[name] for name in INDEXED))
        expanded = {name: x for name, x in inputs.items() if name not in ("q", "k", "k_scale", "weights")}
        scale = (case.P + case.R) ** -0.5
        return pk.masked_mha(**expanded, topk_indices=indices, scale=scale, implementation=implementation)
    return pk.sparse_mla(**inputs, scale=(case.C + case.R) ** -0.5, implementation=implementation)


def select_keys(
    case: Case, inputs: Inputs, queries: Sequence[jax.Array], implementation: str | None
) -> jax.Array:
    """topk_indices [B T K] of the queries (q, weights, key_start, key_stop)."""
    q, weights, key_start, key_stop = queries
    scores = pk.index_scores(
        q, inputs["k"], weights, key_start, key_stop,
        k_scale=inputs.get("k_scale"), implementation=implementation,
    )  # fmt: skip
    return pk.select_topk(
        scores, case.K, key_start=key_start, key_stop=key_stop, implementation=implementation
    )


def dsa_attention(case: Case, inputs: Inputs, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    """(out [B T N C], lse [B T N]) of one layer's sparse attention."""

    def attend(q_latent, q_rope, *queries):
        indices = select_keys(case, inputs, queries, implementation)
        return pk.sparse_mla(
            q_latent, q_rope, inputs["latent"], inputs["k_rope"], indices,
            scale=(case.C + case.R) ** -0.5, implementation=implementation,
        )  # fmt: skip

    return map_query_blocks(attend, QUERY_BLOCK, *(inputs[name] for name in ATTENDED + INDEXED))


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention [B T N H] by cuDNN; q and k [B T N P+R], v [B T N H]."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("cuDNN runs on GPUs")
    return private_jax.cudnn_attention(q, k, v, None, scale=q.shape[-1] ** -0.5, causal=True)[0]
