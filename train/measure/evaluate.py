"""Evaluation: cross entropy, accuracy on answers, and how well each indexer predicts the attention of its layer.

``params`` is what ``Transformer(config).init`` returns. A batch is a dict of ``tokens``, ``targets`` (-1 = no target)
and ``segment_ids`` (0 = padding), each [B T] int32. All of it runs on the default device or on the mesh in use, and
compiles once per shape and config.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from dsa_jax.cache import Keys, Placement, Queries, place
from dsa_jax.config import ModelConfig
from dsa_jax.indexer import index_queries
from dsa_jax.layers import stacks
from dsa_jax.mla import PER_KEY, compress, expand, query_heads
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation, rotation
from dsa_jax.sharding import constrain, shard_map
from dsa_jax.transformer import Transformer
from pallas_kernels.arithmetic import einsum, exponentials
from pallas_kernels.blocking import block_size, map_query_blocks
from pallas_kernels.keys import visible
from train.data.synthetic import Needles
from train.loss import cross_entropy_per_token

Batch = Mapping[str, Any]
Parameters = Mapping[str, Any]

RECENCY_TAUS = np.float32(2.0) ** np.arange(0, 18.5, 0.5, dtype=np.float32)  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Over all targets of some batches: their number, the mean cross entropy in nats, and the fraction predicted."""

    n_targets: int
    cross_entropy: float
    accuracy: float


def score(
    params: Parameters, config: ModelConfig, batches: Iterable[Batch], attention: str | None = None
) -> Score:
    """Cross entropy and accuracy of the next token, with this attention ("dense", "sparse"; None: the config's).

    Raises:
      ValueError: the batches hold no target.
      FloatingPointError: the cross entropy is not finite.
    """
    config = _inference(config, attention)
    nats, right, count = 0.0, 0, 0
    for batch in batches:
        sums = _score_sums(params, config, batch["tokens"], batch["targets"], batch["segment_ids"])
        nats, right, count = nats + float(sums[0]), right + int(sums[1]), count + int(sums[2])
    if count == 0:
        raise ValueError(
            "a cross entropy needs at least one target (an entry of targets >= 0), the batches hold 0"
        )
    if not math.isfinite(nats):
        raise FloatingPointError(
            f"the cross entropy over {count} targets with {config.attention} attention is {nats / count}: a parameter "
            "is not finite, or the computation overflowed"
        )
    return Score(n_targets=count, cross_entropy=nats / count, accuracy=right / count)


def cross_entropy(
    params: Parameters, config: ModelConfig, batches: Iterable[Batch], attention: str | None = None
) -> float:
    """Mean nats per target; see ``score``."""
    return score(params, config, batches, attention).cross_entropy


@functools.partial(jax.jit, static_argnames="config")
def _score_sums(
    params: Parameters, config: ModelConfig, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(nats, predictions that were right, targets), each summed over the batch."""
    _, _, aux = Transformer(config).apply(params, tokens, segment_ids=segment_ids, return_logits=False)
    nats, right = cross_entropy_per_token(aux["final_hidden"], params["params"]["head"], targets)
    return nats.sum(), right.sum(), (targets >= 0).sum()


def _inference(config: ModelConfig, attention: str | None) -> ModelConfig:
    changes: dict[str, Any] = {} if attention is None else {"attention": attention}
    return dataclasses.replace(config, index_loss=False, remat="none", **changes)


def needle_accuracy(
    params: Parameters,
    config: ModelConfig,
    needles: Needles,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    rows: int = 64,
    tokens_per_batch: int = 65536,
) -> list[dict[str, float | int]]:
    """Accuracy of retrieving one needle by length of the row and depth of the needle, with dense and sparse attention.

    ``needles`` sets the rest of the task; ``rows`` is rounded up to whole batches.

    Returns:
      length, depth, rows, accuracy_dense and accuracy_sparse for every pair of length and depth. Both accuracies are
      of the same rows; where length <= index_topk they are equal by construction.
    """
    table = []
    for length in lengths:
        batch = min(rows, max(1, tokens_per_batch // length))
        for depth in depths:
            task = dataclasses.replace(needles, seq_len=length, depth=depth, n_queries=None, text_loss=False)
            batches = [
                _stack([task[i] for i in range(first, first + batch)]) for first in range(0, rows, batch)
            ]
            entry: dict[str, float | int] = {"length": length, "depth": depth, "rows": batch * len(batches)}
            for attention in ("dense", "sparse"):
                entry[f"accuracy_{attention}"] = score(params, config, batches, attention).accuracy
            table.append(entry)
    return table


def _stack(rows: Sequence[Batch]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def indexer_quality(params: Parameters, config: ModelConfig, batch: Batch) -> list[dict[str, float | int]]:
    """How far each layer's indexer is from the dense attention of its layer, next to baselines that need no training.

    The target p of a query is the softmax over all its visible keys, averaged over the heads (DeepSeek-V3.2-Exp
    report, eq. 3). It is computed from the layer inputs of a forward pass with ``config.attention``. All numbers are
    means over the queries that see more than K = ``config.index_topk`` keys; the others have nothing to select.

    Returns:
      One dict per layer that has an indexer. The MTP layer is last, with ``layer == config.n_layers``; there the last
      query of each document, which has no next token, is left out. In nats per query:
        kl           KL(p || softmax of the index scores)
        entropy      H(p), the cross entropy that is left when kl is 0
        kl_uniform   KL(p || equal weights for all visible keys) = log(visible keys) - entropy
        kl_recency   KL(p || weights exp(-distance / tau)), with the tau of ``RECENCY_TAUS`` that fits this layer and
                     batch best: ``recency_tau``, in tokens
      The mass of p on K keys:
        recall          those selected by the indexer
        recall_oracle   the K largest of p, an upper bound
        recall_recency  the last K
        recall_random   K keys at random, in expectation: K / visible keys
      overlap: the fraction of the oracle's K keys that the indexer selected. queries: how many were counted.
      A layer without such queries has no dict.

    Raises:
      FloatingPointError: a number of a layer is not finite.
    """
    means = jax.device_get(_quality(params, _inference(config, None), batch["tokens"], batch["segment_ids"]))
    queries = means.pop("queries")
    numbers = [*config.full_layers, config.n_layers]
    layers = [
        {"layer": numbers[i], "queries": int(n)} | {name: float(mean[i]) for name, mean in means.items()}
        for i, n in enumerate(queries)
        if n
    ]
    for found in layers:
        if bad := [f"{name} {number}" for name, number in found.items() if not math.isfinite(number)]:
            raise FloatingPointError(f"layer {found['layer']}: {', '.join(bad)}: a parameter is not finite, or the "
                                     "computation overflowed")  # fmt: skip
    return layers


@functools.partial(jax.jit, static_argnames="config")
def _quality(
    params: Parameters, config: ModelConfig, tokens: jax.Array, segment_ids: jax.Array
) -> dict[str, jax.Array]:
    """Name -> mean per full layer, the MTP layer last; "queries" is the number of queries counted."""
    placement, _ = place(segment_ids, None)
    rope = rotation(placement.positions, config)
    tree, run = params["params"], functools.partial(Transformer(config).apply, params, return_logits=False)
    _, _, main = run(tokens, segment_ids=segment_ids, capture=("input",))

    with_indexer = [tree[stack.name] for stack in stacks(config) if stack.has_indexer]
    layers = [{name: stack[name] for name in ("attn", "attn_norm")} for stack in with_indexer]
    inputs = main["input"] if config.indexer_types is None else main["input"][np.array(config.full_layers)]

    def one_layer(layer: tuple[jax.Array, Parameters]) -> dict[str, jax.Array]:
        x, parameters = layer
        return _layer_quality(x, rope, placement, placement.valid, parameters, config)

    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)
    means = jax.lax.map(one_layer, (inputs, stacked))
    if not config.n_mtp_layers:
        return {name: constrain(mean, None) for name, mean in means.items()}
    next_tokens, next_ids = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, segment_ids))
    has_next = (next_ids == segment_ids) & placement.valid
    _, _, mtp = run(
        main["hidden"], next_tokens, segment_ids=segment_ids, capture=("input",), method="mtp_logits"
    )
    last = _layer_quality(mtp["input"], rope, placement, has_next, tree["mtp"]["layer"], config)
    return {name: constrain(jnp.append(means[name], last[name]), None) for name in means}


def _layer_quality(
    x: Float[Array, "B T D"],
    rope: Rotation,
    placement: Placement,
    counted: Array,
    parameters: Parameters,
    config: ModelConfig,
) -> dict[str, jax.Array]:
    """The means of one layer with input x, over its ``counted`` queries; ``parameters`` holds attn and attn_norm."""
    attn = parameters["attn"]
    h = rms_norm(x, parameters["attn_norm"], config.norm_eps)
    queries, keys = compress(h, rope, placement, attn, config)
    of_queries = shard_map(
        functools.partial(_of_queries, config=config),
        in_axes=(Queries.axes("queries"), PER_KEY, ()),
        out_axes=("batch", "queries"),
    )
    return _means(of_queries(queries, keys, attn), placement, counted, config)


def _of_queries(queries: Queries, keys: Keys, attn: Parameters, config: ModelConfig) -> dict[str, jax.Array]:
    """Numbers per query [B T] from the dense attention and the index scores over all keys of its row."""
    K, S = config.index_topk, keys.latent.shape[1]
    k_nope, _ = expand(keys.latent, attn, config)

    def one_block(queries: Queries) -> dict[str, jax.Array]:
        key_start, key_stop = queries.key_start, queries.key_stop
        q_nope, q_rope = query_heads(queries, attn, config)
        logits = einsum("BTNP,BSNP->BTNS", q_nope, k_nope) + einsum("BTNR,BSR->BTNS", q_rope, keys.k_rope)
        seen = visible(key_start, key_stop, S)
        e, total, _ = exponentials(jnp.where(seen[:, :, None], logits * config.softmax_scale, -jnp.inf))
        p = (e / total).mean(axis=2)

        q, weights = index_queries(queries, attn["indexer"], config)
        scores = kernels.index_scores(
            q, keys.index_k, weights, key_start, key_stop, implementation=config.implementation
        )
        chosen = kernels.select_topk(
            scores, K, key_start=key_start, key_stop=key_stop, implementation=config.implementation
        )
        _, _, lse = exponentials(scores)
        log_q = jnp.where(seen, scores - lse[..., None], 0.0)

        best, oracle = jax.lax.top_k(jnp.where(seen, p, -1.0), min(K, S))
        slots = jnp.arange(S)
        return {
            "entropy": -xlogy(p, p).sum(axis=-1),
            "cross_entropy": -(p * log_q).sum(axis=-1),
            "distance": (p * (key_stop[..., None] - 1 - slots)).sum(axis=-1),
            "recall": (p * _listed(chosen, S)).sum(axis=-1),
            "recall_oracle": jnp.maximum(best, 0.0).sum(axis=-1),
            "recall_recency": jnp.where(slots >= key_stop[..., None] - K, p, 0.0).sum(axis=-1),
            "overlap": jnp.take_along_axis(_listed(chosen, S), oracle, axis=-1).sum(axis=-1) / K,
        }

    B, T = queries.key_start.shape
    numbers = 3 * config.n_heads + config.index_n_heads + 8  # logits, exp, p of the heads; dots; what follows
    return map_query_blocks(one_block, block_size(T, 4 * B * S * numbers), queries)


def _means(
    per_query: dict[str, jax.Array], placement: Placement, counted: Array, config: ModelConfig
) -> dict[str, jax.Array]:
    """Means over the ``counted`` queries that see more than K keys."""
    K = config.index_topk
    n_keys = (placement.key_stop - placement.key_start).astype(jnp.float32)
    counted &= n_keys > K
    entropy = per_query["entropy"]
    per_query["kl"] = per_query.pop("cross_entropy") - entropy
    per_query["kl_uniform"] = jnp.log(jnp.maximum(n_keys, 1.0)) - entropy
    per_query["recall_random"] = K / jnp.maximum(n_keys, 1.0)
    distance = per_query.pop("distance")

    n_counted = counted.sum()

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(counted, values, 0.0).sum() / jnp.maximum(n_counted, 1)

    recency = jax.vmap(lambda tau: mean(_recency_kl(entropy, distance, n_keys, tau)))(RECENCY_TAUS)
    means = {name: mean(values) for name, values in per_query.items()}
    means |= {"kl_recency": recency.min(), "recency_tau": jnp.asarray(RECENCY_TAUS)[recency.argmin()]}
    return means | {"queries": n_counted}


def _recency_kl(entropy: jax.Array, distance: jax.Array, n_keys: jax.Array, tau: jax.Array) -> jax.Array:
    """KL(p || exp(-d / tau) / Z) over d = 0 .. n_keys - 1; p enters only by its entropy and its mean distance."""
    log_z = jnp.log(-jnp.expm1(-jnp.maximum(n_keys, 1.0) / tau)) - jnp.log(-jnp.expm1(-1.0 / tau))
    return distance / tau + log_z - entropy


def _listed(indices: Int[Array, "B T K"], S: int) -> Float[Array, "B T S"]:
    """1 at the listed keys, 0 elsewhere; -1 stands for no key."""
    mark = jax.vmap(jax.vmap(lambda row, i: row.at[i].set(1.0)))
    return mark(jnp.zeros((*indices.shape[:2], S + 1)), jnp.where(indices < 0, S, indices))[..., :S]
