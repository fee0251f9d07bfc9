"""The model: embedding, dense layers, MoE layers, head. One function serves training, prefill and decoding."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dsa_jax.block import CAPTURABLE, Block
from dsa_jax.cache import Cache, Keys, Placement, place
from dsa_jax.config import ModelConfig
from dsa_jax.mtp import Mtp
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation, rotation
from dsa_jax.sharding import constrain, gathered_matrix, lookup

Aux = dict[str, jax.Array]


class Positions(NamedTuple):
    """What all layers share: RoPE at the tokens' positions, and where the tokens are placed."""

    rotation: Rotation
    placement: Placement


class Transformer(nn.Module):
    """DeepSeek-V3.2 as a pure function: parameters, tokens and cache in; logits, cache and aux out.

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
        return_logits: bool = True,
    ) -> tuple[jax.Array | None, Cache | None, Aux]:
        """Logits of the next token.

        Args:
          tokens: [B T] int32.
          positions: [B T] int32, for RoPE. Default: the index inside the document.
          segment_ids: [B T] int32. 0 is padding; a run of equal non-zero ids is one document, and documents do not
            see each other. Default: one document per row.
          cache: from ``init_cache`` or an earlier call, or None. Rows that outgrow its capacity get NaN logits
            (and NaN in "final_hidden").
          capture: names out of ``block.CAPTURABLE``, returned in aux and stacked over the layers that have them.
          logits_at: [B] int32: return the logits of this query of each row only (all that a prefill needs).
          return_logits: False for None in place of the logits. Nothing of the head is computed then, and the loss
            can take "final_hidden" to logits block by block, as ``train.loss.cross_entropy`` does.

        Returns:
          logits [B T V] float32 ([B 1 V] with logits_at); the new cache; and aux:
            "final_hidden" [B T D]: the output of the final norm, which the head multiplies
            "hidden" [B T D]: what ``mtp_logits`` reads ("final_hidden", or its input: ``config.mtp_hidden``)
            "expert_load" [n_moe_layers E]: valid tokens per expert
            "balance" [n_moe_layers]: ``moe.balance_loss``
            "index_loss" [L], with ``config.index_loss``: the index loss L_I, summed over the valid tokens
            and the captured arrays, [L B T ...].

        Raises:
          ValueError: shapes contradict each other, ``capture`` names something unknown or not computed by this
            config, or logits_at comes with return_logits=False.
        """
        c = self.config
        _check_capture(capture, c)
        if logits_at is not None and not return_logits:
            raise ValueError("logits_at needs return_logits=True, got False")
        shared, new_cache = self._place(tokens, positions, segment_ids, cache)
        # Every product with a weight takes padding too, and its gradient: 0 adds nothing, whatever the token holds.
        valid = shared.placement.valid[..., None]
        x = jnp.where(valid, lookup(self.embed, tokens, c.dtype), 0)
        keys = None if cache is None else cache.keys

        auxes: list[Aux] = []
        for block, layers in self._stacks():
            x, keys, aux = self._scan(block, layers, (x, keys), shared, capture)
            auxes.append(aux)

        final = rms_norm(x, self.norm, c.norm_eps)
        aux = {
            name: jnp.concatenate([a[name] for a in auxes if name in a])
            for name in dict.fromkeys(name for a in auxes for name in a)
        }
        aux["hidden"] = final if c.mtp_hidden == "post_norm" else x
        if c.n_mtp_layers and self.is_initializing():
            self.mtp_logits(aux["hidden"], tokens)
        new_cache = _with_keys(new_cache, keys)
        aux["final_hidden"] = _nan_if_full(final, new_cache)
        if not return_logits:
            return None, new_cache, aux
        read = final if logits_at is None else jnp.take_along_axis(final, logits_at[:, None, None], axis=1)
        return _nan_if_full(_logits(read, self.head), new_cache), new_cache, aux

    def mtp_logits(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        capture: tuple[str, ...] = (),
        return_logits: bool = True,
    ) -> tuple[jax.Array | None, Cache | None, Aux]:
        """Logits of the token after the next: ``model.apply(params, ..., method="mtp_logits")``.

        Args:
          hidden: [B T D], ``aux["hidden"]`` of the main model, or of this method to draft further tokens.
          next_tokens: [B T] int32, the token that follows each position.
          positions, segment_ids, capture, return_logits: as for the main model; position i is that of hidden i.
          cache: the MTP layer's own, ``init_cache(config, B, capacity, n_layers=1)``.

        Returns:
          logits [B T V] float32 or None, the cache, and the layer's aux with "hidden" and "final_hidden" [B T D],
          here the same: the output of the layer's norm.

        Raises:
          ValueError: the model has no MTP layer, or as for the main model.
        """
        c = self.config
        if not c.n_mtp_layers:
            raise ValueError("mtp_logits needs a model with n_mtp_layers=1, got n_mtp_layers=0")
        _check_capture(capture, c)
        shared, new_cache = self._place(next_tokens, positions, segment_ids, cache)
        owner = self if c.mtp_shared_embeddings else self.mtp
        keys = None if cache is None else cache.keys
        valid = shared.placement.valid[..., None]
        hidden = jnp.where(valid, hidden.astype(c.dtype), 0)
        embedded = jnp.where(valid, lookup(owner.embed, next_tokens, c.dtype), 0)
        out, keys, aux = self.mtp(hidden, embedded, keys, *shared, capture)
        new_cache = _with_keys(new_cache, keys)
        aux |= {"hidden": out, "final_hidden": _nan_if_full(out, new_cache)}
        if not return_logits:
            return None, new_cache, aux
        return _nan_if_full(_logits(out, owner.head), new_cache), new_cache, aux

    def _place(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[Positions, Cache | None]:
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
        positions = placement.positions if positions is None else positions
        return Positions(rotation(positions, self.config), placement), cache

    def _stacks(self) -> list[tuple[Block, range]]:
        """The stacks of equal layers in order, each as one block and the numbers of its layers."""
        c, stacks = self.config, []
        if c.n_dense_layers:
            stacks.append((self.dense_layers, range(c.n_dense_layers)))
        if c.n_moe_layers:
            stacks.append((self.moe_layers, range(c.n_dense_layers, c.n_layers)))
        return stacks

    def _scan(
        self,
        block: Block,
        layers: range,
        carry: tuple[jax.Array, Keys | None],
        shared: Positions,
        capture: tuple[str, ...],
    ) -> tuple[jax.Array, Keys | None, Aux]:
        """Scans one stack of equal layers. The cache's keys are in the carry, so that they are updated in place."""

        def one_layer(
            block: Block, carry: tuple[jax.Array, Keys | None], layer: jax.Array
        ) -> tuple[tuple[jax.Array, Keys | None], Aux]:
            # Without the barrier, XLA would compute masks before the loop over layers, because all layers share
            # them: whole, T x S for each head.
            here = lax.optimization_barrier((shared, lax.stop_gradient(carry[0])))[0]
            x, keys, aux = block(*carry, layer, *here, capture)
            return (constrain(x, "batch", "sequence", None), keys), aux

        if self.config.remat == "layer":
            policy = jax.checkpoint_policies.save_only_these_names("topk_indices", "index_gradients")
            one_layer = nn.remat(one_layer, prevent_cse=False, policy=policy)
        n = len(layers)
        scan = nn.scan(one_layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=n)
        (x, keys), aux = scan(block, carry, layers.start + jnp.arange(n, dtype=jnp.int32))
        return x, keys, aux


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
    """float(x) @ float(head), in float32: products of bfloat16 values are exact there."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    head = gathered_matrix("head", head)
    logits = jnp.matmul(x, head.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "sequence", "vocab")


def _with_keys(cache: Cache | None, keys: Keys | None) -> Cache | None:
    """The cache with these keys of all layers."""
    return None if cache is None or keys is None else dataclasses.replace(cache, **keys._asdict())


def _nan_if_full(x: jax.Array, cache: Cache | None) -> jax.Array:
    """x [B T ...], with NaN in the rows that have outgrown the cache."""
    if cache is None:
        return x
    return jnp.where((cache.length > cache.capacity)[:, None, None], jnp.nan, x)
