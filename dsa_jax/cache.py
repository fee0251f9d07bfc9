"""The cache of one model: latents, rotated keys and index keys of every layer, and which slots hold what.

A token costs ``kv_lora_rank + qk_rope_head_dim + index_head_dim`` values a layer (704 for V3.2), not
per-head keys and values. Slots are filled in order, row by row, so the keys that a query may see are one
interval of slots: from the first token of its document to itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsa_jax.config import ModelConfig

Arrays = tuple[jax.Array, ...]  # latent, k_rope, index_k


@flax.struct.dataclass
class Cache:
    """latent [L B S C], k_rope [L B S R], index_k [L B S J]; segment_ids [B S], 0 = empty; length [B].

    ``length`` is the slot that a row's next token takes. Padding behind a call's last token (or a call of
    nothing else) does not advance it and is overwritten; padding before a token keeps its empty slots.
    """

    latent: Any  # not checked: a tree of shapes or of shardings has the same structure
    k_rope: Any
    index_k: Any
    segment_ids: Any
    length: Any

    @property
    def arrays(self) -> Arrays:
        return self.latent, self.k_rope, self.index_k

    @property
    def capacity(self) -> int:
        return self.segment_ids.shape[1]


@flax.struct.dataclass
class Placement:
    """Where T new tokens stand, each [B T] int32: their slots, the interval of keys that they may see, their
    positions inside the document; and which are no padding (valid, bool).
    """

    slots: Any
    key_start: Any
    key_stop: Any
    positions: Any
    valid: Any


def init_cache(config: ModelConfig, batch: int, capacity: int, n_layers: int | None = None) -> Cache:
    """An empty cache for ``capacity`` tokens a row (``n_layers=1`` for the MTP layer's own).

    Raises:
      ValueError: capacity is not within 1 .. config.max_seq_len.
    """
    if not 1 <= capacity <= config.max_seq_len:
        raise ValueError(
            f"cache capacity must be within 1 .. max_seq_len={config.max_seq_len}, got {capacity}"
        )
    shape, dtype = (n_layers or config.n_layers, batch, capacity), jnp.dtype(config.dtype)
    return Cache(
        latent=jnp.zeros((*shape, config.kv_lora_rank), dtype),
        k_rope=jnp.zeros((*shape, config.qk_rope_head_dim), dtype),
        index_k=jnp.zeros((*shape, config.index_head_dim), dtype),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def place(segment_ids: Int[Array, "B T"], cache: Cache | None) -> tuple[Placement, Cache | None]:
    """Takes slots for T new tokens (0 = padding) and says what each may see.

    Without a cache the slots are 0 .. T-1. A run of equal non-zero ids is one document; with a cache a run
    goes on across calls.
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


def store(
    arrays: Arrays, layer: Int[Array, ""], slots: Int[Array, "B T"], new: Arrays
) -> tuple[Arrays, Arrays]:
    """Writes the new tokens of one layer; (all layers, this layer's keys [B S ...]). Slots past the end are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    arrays = tuple(a.at[layer, rows, slots].set(x, mode="drop") for a, x in zip(arrays, new, strict=True))
    return arrays, tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in arrays)


def _run_starts(segment_ids: jax.Array) -> jax.Array:
    """For each slot, the first slot of its run of equal ids."""
    index = jnp.arange(segment_ids.shape[1])
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
