"""How far a result is from ``xla`` in float32 on the same data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.arithmetic import dequantize_blocks
from pallas_kernels.bench.operations import ATTENDED, INDEXED, Inputs, call, select_keys
from pallas_kernels.cases import Case

SAMPLE = 16  # queries whose result is checked


def error(case: Case, inputs: Inputs, result: Any, implementation: str | None) -> dict[str, float | int]:
    """Relative errors by name, for a sample of the queries; of a grouped product for all rows."""
    if case.operation in ("dsa_attention_mha", "dense_attention"):
        return {}
    if case.operation == "grouped_matmul":
        rows, weights, group_sizes = (inputs[name] for name in ("rows", "weights", "group_sizes"))
        if "weight_scales" in inputs:  # the operation's own rounding is not an error
            weights = dequantize_blocks(weights, inputs["weight_scales"], rows.dtype)
        exact = rows.astype(jnp.float32), weights.astype(jnp.float32)
        reference = pk.grouped_matmul(*exact, group_sizes, implementation="xla")
        return {"relative": _relative(np.asarray(result), np.asarray(reference))}
    sample = np.unique(np.linspace(0, case.T - 1, SAMPLE).astype(int))
    per_query = {*INDEXED, *ATTENDED, "scores", "topk_indices"}
    sampled = {name: x[:, sample] if name in per_query else x for name, x in inputs.items()}
    if "latent_scale" in sampled:  # the operation's own rounding is not an error
        scale = jnp.repeat(sampled.pop("latent_scale"), 128, axis=-1)
        sampled["latent"] = (sampled["latent"].astype(jnp.float32) * scale).astype(sampled["q_latent"].dtype)
    in_float32 = {name: x.astype(jnp.float32) if _is_float(x) else x for name, x in sampled.items()}
    if case.operation == "dsa_attention":
        return _error_of_layer(case, sampled, in_float32, [x[:, sample] for x in result], implementation)
    reference = call(case, in_float32, "xla")
    result, reference = jax.tree.map(np.asarray, (jax.tree.map(lambda x: x[:, sample], result), reference))
    if case.operation == "select_topk":
        return {"rows that differ": int((result != reference).any(axis=-1).sum())}
    if case.operation == "index_scores":
        visible = np.isfinite(reference)
        if not (np.isneginf(result) == ~visible).all():
            return {"relative": float("nan")}
        return {"relative": _relative(result[visible], reference[visible])}
    return {"out": _relative(result[0], reference[0]), "lse": _relative(result[1], reference[1])}


def _error_of_layer(case, sampled, in_float32, result, implementation) -> dict[str, float | int]:
    """The attention's error over the keys that were selected, and the share of keys that float32 would not select."""
    indices, expected = (
        select_keys(case, inputs, [inputs[name] for name in INDEXED], name_)
        for inputs, name_ in ((sampled, implementation), (in_float32, "xla"))
    )
    attended = {name: in_float32[name] for name in (*ATTENDED, "latent", "k_rope")}
    scale = (case.C + case.R) ** -0.5
    reference = pk.sparse_mla(**attended, topk_indices=indices, scale=scale, implementation="xla")
    errors = {
        name: _relative(np.asarray(x), np.asarray(y))
        for name, x, y in zip(("out", "lse"), result, reference, strict=True)
    }
    rows = zip(np.asarray(indices).reshape(-1, case.K), np.asarray(expected).reshape(-1, case.K), strict=True)
    differ = [np.setdiff1d(row, other).size / (row >= 0).sum() for row, other in rows]
    return errors | {"keys that differ": float(np.mean(differ))}


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _relative(x: np.ndarray, reference: np.ndarray) -> float:
    x, reference = x.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
