"""The model: embedding, dense layers, MoE layers, head. One function for training, prefill and decode."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dsa_jax.block import CAPTURABLE, Block
from dsa_jax.cache import Arrays, Cache, Placement, place
from dsa_jax.config import ModelConfig
from dsa_jax.mtp import Mtp
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation, rotation
from dsa_jax.sharding import constrain, gathered_matrix, lookup

Aux = dict[str, jax.Array]


class Transformer(nn.Module):
    """DeepSeek-V3.2. Pure: parameters, tokens and cache in; logits, cache and aux out.

    >>> model = Transformer(config)
    >>> params = model.init(jax.random.key(0), tokens)
    >>> logits, _, _ = model.apply(params, tokens)
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        normal, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        self.embed = self.param("embed", normal, (c.vocab_size, c.d_model), dtype)
        self.norm = self.param("norm", nn.initializers.ones, (c.d_model,), jnp.float32)
        self.head = self.param("head", normal, (c.d_model, c.vocab_size), dtype)
        if c.n_dense_layers:
            self.dense_layers = Block(c, is_moe=False)
        if c.n_moe_layers:
            self.moe_layers = Block(c, is_moe=True)
        if c.n_mtp_layers:
            self.mtp = Mtp(c)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        capture: tuple[str, ...] = (),
        logits_at: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Aux]:
        """Logits of the next token.

        Args:
          tokens: [B T] int32.
          positions: [B T] int32, for RoPE; default: the index inside the document.
          segment_ids: [B T] int32. 0 is padding; a run of equal non-zero ids is one document, which sees
            nothing of the others. Default: all one document.
          cache: what earlier calls returned (or ``init_cache``), or None. A row that outgrows its capacity
            gets NaN logits.
          capture: names out of ``block.CAPTURABLE`` to return in aux, stacked over the layers that have them.
          logits_at: [B] int32; only the logits of this query per row (a prefill needs no others).

        Returns:
          logits [B T V] float32 ([B 1 V] with logits_at), the new cache, and aux: "hidden" [B T D] (what the
          MTP layer reads), "expert_load" [n_moe_layers E], "balance" [n_moe_layers] (``moe.balance_loss``),
          with ``config.index_loss`` "index_loss" [L] (the indexers' KL summed over the valid tokens), and the
          captured arrays [L B T ...].

        Raises:
          ValueError: shapes contradict each other, or an unknown or unavailable name in ``capture``.
        """
        c = self.config
        _check_capture(capture, c)
        rope, placement, new_cache = self._place(tokens, positions, segment_ids, cache)
        x = lookup(self.embed, tokens, c.dtype)
        cached = None if cache is None else cache.arrays

        auxes: list[Aux] = []
        if c.n_dense_layers:
            x, cached, aux = self._layers(
                self.dense_layers, 0, c.n_dense_layers, x, cached, rope, placement, capture
            )
            auxes.append(aux)
        if c.n_moe_layers:
            x, cached, aux = self._layers(
                self.moe_layers, c.n_dense_layers, c.n_moe_layers, x, cached, rope, placement, capture
            )
            auxes.append(aux)

        normed = rms_norm(x, self.norm, c.norm_eps)
        aux = {
            name: jnp.concatenate([a[name] for a in auxes if name in a])
            for name in dict.fromkeys(name for a in auxes for name in a)
        }
        aux["hidden"] = normed if c.mtp_hidden == "post_norm" else x
        if c.n_mtp_layers and self.is_initializing():
            self.mtp_logits(aux["hidden"], tokens)
        read = normed if logits_at is None else jnp.take_along_axis(normed, logits_at[:, None, None], axis=1)
        logits, new_cache = _settle(_logits(read, self.head), new_cache, cached)
        return logits, new_cache, aux

    def mtp_logits(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Cache | None, Aux]:
        """Logits of the token after the next: ``model.apply(params, ..., method="mtp_logits")``.

        Args:
          hidden: [B T D], ``aux["hidden"]`` of the main model (or of this method, to draft further).
          next_tokens: [B T] int32, the token that follows each of them.
          positions, segment_ids, capture: as for the main model; position i is that of hidden i.
          cache: the layer's own, ``init_cache(config, B, capacity, n_layers=1)``.

        Returns:
          logits [B T V] float32, the cache, and aux with "hidden" [B T D].

        Raises:
          ValueError: the model has no MTP layer.
        """
        c = self.config
        if not c.n_mtp_layers:
            raise ValueError("mtp_logits needs a model with n_mtp_layers=1, got n_mtp_layers=0")
        _check_capture(capture, c)
        rope, placement, new_cache = self._place(next_tokens, positions, segment_ids, cache)
        owner = self if c.mtp_shared_embeddings else self.mtp
        cached = None if cache is None else cache.arrays
        embedded = lookup(owner.embed, next_tokens, c.dtype)
        out, cached, aux = self.mtp(hidden.astype(c.dtype), embedded, cached, rope, placement, capture)
        logits, new_cache = _settle(_logits(out, owner.head), new_cache, cached)
        return logits, new_cache, aux | {"hidden": out}

    def _place(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[Rotation, Placement, Cache | None]:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers of shape [B T], got {tokens.dtype} {tokens.shape}")
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            if array is not None and array.shape != tokens.shape:
                raise ValueError(f"{name} must have the shape of tokens {tokens.shape}, got {array.shape}")
        if cache is not None and cache.length.shape[0] != tokens.shape[0]:
            raise ValueError(f"the cache holds {cache.length.shape[0]} rows, tokens have {tokens.shape[0]}")
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        placement, cache = place(segment_ids, cache)
        if self.config.attention == "window":
            recent = jnp.maximum(placement.key_start, placement.key_stop - self.config.index_topk)
            placement = dataclasses.replace(placement, key_start=recent)
        return (
            rotation(placement.positions if positions is None else positions, self.config),
            placement,
            cache,
        )

    def _layers(
        self,
        block: Block,
        first: int,
        count: int,
        x: jax.Array,
        cached: Arrays | None,
        rope: Rotation,
        placement: Placement,
        capture: tuple[str, ...],
    ) -> tuple[jax.Array, Arrays | None, Aux]:
        """Scans one stack of equal layers; the cache travels in the carry, so that it is updated in place."""

        def one_layer(block, carry, layer):
            # Masks made of what all layers share would be hoisted out of the loop over layers, whole: T x S per head.
            shared = lax.optimization_barrier((rope, placement, lax.stop_gradient(carry[0])))[:2]
            x, cached, aux = block(*carry, layer, *shared, capture)
            return (constrain(x, "batch", "sequence", None), cached), aux

        if self.config.remat == "layer":
            policy = jax.checkpoint_policies.save_only_these_names("topk_indices", "index_gradients")
            one_layer = nn.remat(one_layer, prevent_cse=False, policy=policy)
        scan = nn.scan(one_layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=count)
        (x, cached), aux = scan(block, (x, cached), first + jnp.arange(count, dtype=jnp.int32))
        return x, cached, aux


def _check_capture(capture: tuple[str, ...], config: ModelConfig) -> None:
    if unknown := set(capture) - set(CAPTURABLE):
        raise ValueError(f"capture must name some of {CAPTURABLE}, got {sorted(unknown)}")
    if "index_kl" in capture and not config.index_loss:
        raise ValueError("capture of ['index_kl'] needs index_loss=True, got False")
    if config.attention != "sparse" and (unavailable := {"index_scores", "topk_indices"} & set(capture)):
        raise ValueError(
            f"capture of {sorted(unavailable)} needs attention='sparse', got {config.attention!r}"
        )


def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """float32: products of bf16 values are exact there, so this equals float(x) @ float(head)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    head = gathered_matrix("head", head)
    logits = jnp.matmul(x, head.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "sequence", "vocab")


def _settle(logits: jax.Array, cache: Cache | None, arrays: Arrays | None) -> tuple[jax.Array, Cache | None]:
    """Puts the layers' arrays into the placed cache, and NaN into the logits of rows that outgrew it."""
    if cache is None or arrays is None:
        return logits, cache
    latent, k_rope, index_k = arrays
    cache = dataclasses.replace(cache, latent=latent, k_rope=k_rope, index_k=index_k)
    return jnp.where((cache.length > cache.capacity)[:, None, None], jnp.nan, logits), cache
