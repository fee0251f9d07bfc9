"""What attention reads: the queries of one call, the keys of a layer, and the cache that holds the keys of all layers.

Per layer and token the cache stores ``kv_lora_rank + qk_rope_head_dim + index_head_dim`` values (704 for V3.2), not
the keys and values of every head. Each row fills its slots in order, so the keys that a query may see are one interval
of slots: from the first token of its document to the query itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax.config import ModelConfig

# Fields of type Any are not checked: a tree of shapes, shardings or logical axes has the same structure.


class Keys(NamedTuple):
    """The keys of one layer: latent [B S C], k_rope [B S R] and index_k [B S J]; of all layers: [L B S ...].

    latent: the compressed keys and values of all heads. k_rope: the rotated key, which all heads share.
    index_k: the indexer's key; None for a layer without one, and [full layers, B S J] of all layers.
    """

    latent: Any
    k_rope: Any
    index_k: Any


@flax.struct.dataclass
class Queries:
    """The queries of one layer, before they are projected to heads.

    hidden [B T D]: the normalised hidden state; q_compressed [B T Q]: the normalised query latent; rotation: RoPE at
    the queries' positions. Query t sees the keys key_start .. key_stop - 1 (both [B T]); padding sees none.
    """

    hidden: Any
    q_compressed: Any
    rotation: Any
    key_start: Any
    key_stop: Any

    @staticmethod
    def axes(queries: str) -> Queries:
        """The logical axes of each array, for ``shard_map``, with T split as the axis of that name is."""
        per_query = ("batch", queries, None)
        return Queries(
            hidden=per_query,
            q_compressed=per_query,
            rotation=per_query,
            key_start=per_query[:2],
            key_stop=per_query[:2],
        )


@flax.struct.dataclass
class Cache:
    """latent [L B S C], k_rope [L B S R], index_k [full layers B S J]; segment_ids [B S], 0 = empty; length [B].

    ``length`` is the slot that the row's next token takes. Padding after the last token of a call does not advance
    it and is overwritten by the next call; padding before a token keeps its slot, which stays empty.
    """

    latent: Any
    k_rope: Any
    index_k: Any
    segment_ids: Any
    length: Any

    @property
    def keys(self) -> Keys:
        """The keys of all layers."""
        return Keys(self.latent, self.k_rope, self.index_k)

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.segment_ids.shape[1]


class LayerIndex(NamedTuple):
    """Where the cache holds the keys of one layer: latent and k_rope at ``layer``, index_k at ``full``.

    full: the number of full layers up to and with this one, less 1.
    """

    layer: Any
    full: Any


@flax.struct.dataclass
class Placement:
    """Where T new tokens are placed, each array [B T].

    slots: the slot each token takes. key_start, key_stop: it sees the keys key_start .. key_stop - 1.
    positions: its index inside its document. All are int32; valid: bool, False for padding.
    """

    slots: Any
    key_start: Any
    key_stop: Any
    positions: Any
    valid: Any


def init_cache(config: ModelConfig, batch: int, capacity: int, n_layers: int | None = None) -> Cache:
    """An empty cache for ``capacity`` tokens per row (``n_layers=1`` for the MTP layer's own).

    Raises:
      ValueError: capacity is not within 1 .. config.max_seq_len.
    """
    if not 1 <= capacity <= config.max_seq_len:
        raise ValueError(
            f"cache capacity must be within 1 .. max_seq_len={config.max_seq_len}, got {capacity}"
        )
    layers, shape, dtype = n_layers or config.n_layers, (batch, capacity), jnp.dtype(config.dtype)
    return Cache(
        latent=jnp.zeros((layers, *shape, config.kv_lora_rank), dtype),
        k_rope=jnp.zeros((layers, *shape, config.qk_rope_head_dim), dtype),
        index_k=jnp.zeros((n_layers or len(config.full_layers), *shape, config.index_head_dim), dtype),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def place(segment_ids: Int[Array, "B T"], cache: Cache | None) -> tuple[Placement, Cache | None]:
    """Assigns slots to T new tokens (id 0 = padding), and to each the interval of keys that it may see.

    Without a cache the slots are 0 .. T-1. A run of equal non-zero ids is one document; with a cache the run
    continues across calls. Returns the placement and the cache with the new ids and lengths.
    """
    B, T = segment_ids.shape
    valid = segment_ids != 0
    if cache is None:
        slots = jnp.broadcast_to(jnp.arange(T), (B, T))
        starts = _run_starts(segment_ids)
    else:
        slots = cache.length[:, None] + jnp.arange(T)
        all_ids = cache.segment_ids.at[jnp.arange(B)[:, None], slots].set(segment_ids, mode="drop")
        starts = jnp.take_along_axis(_run_starts(all_ids), jnp.minimum(slots, cache.capacity - 1), axis=1)
        used = jnp.max(jnp.where(valid, jnp.arange(1, T + 1), 0), axis=1)
        cache = dataclasses.replace(cache, segment_ids=all_ids, length=cache.length + used)
    placement = Placement(
        slots=slots,
        key_start=jnp.where(valid, starts, 0).astype(jnp.int32),
        key_stop=jnp.where(valid, slots + 1, 0).astype(jnp.int32),
        positions=jnp.where(valid, slots - starts, 0),
        valid=valid,
    )
    return placement, cache


def store(cached: Keys, index: LayerIndex, slots: Int[Array, "B T"], new: Keys) -> tuple[Keys, Keys]:
    """Writes one layer's keys of T new tokens ([B T ...]); slots past the capacity are dropped.

    Returns the keys of all layers, and those of this layer [B S ...].
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    of_layer = new._asdict()
    at = {"latent": index.layer, "k_rope": index.layer, "index_k": index.full}
    for name, x in of_layer.items():
        if x is not None:
            written = getattr(cached, name).at[at[name], rows, slots].set(x, mode="drop")
            cached = cached._replace(**{name: written})
            of_layer[name] = jax.lax.dynamic_index_in_dim(written, at[name], keepdims=False)
    return cached, Keys(**of_layer)


def _run_starts(segment_ids: jax.Array) -> jax.Array:
    """For each slot, the first slot of its run of equal ids."""
    index = jnp.arange(segment_ids.shape[1])
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
