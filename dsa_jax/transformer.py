"""The model: embedding, dense layers, MoE layers, head. One function serves training, prefill and decoding."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dsa_jax.block import CAPTURABLE, Block
from dsa_jax.cache import Cache, Keys, LayerIndex, Placement, place
from dsa_jax.config import ModelConfig
from dsa_jax.layers import Stack, scans, stacks
from dsa_jax.mtp import Mtp
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation, rotation
from dsa_jax.sharding import constrain, gathered_matrix, lookup

Aux = dict[str, jax.Array]
Carry = tuple[jax.Array, Keys | None]  # x [B T D], and the cache's keys of all layers


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
        for stack in stacks(c):
            setattr(self, stack.name, Block(c, stack.is_moe, stack.has_indexer))
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
            "index_loss" [full layers], with ``config.index_loss``: the index loss L_I, summed over the valid tokens
            and the captured arrays, [L B T ...]; those of the indexer [full layers B T ...].

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
        carry: Carry = (x, None if cache is None else cache.keys)

        auxes: list[Aux] = []
        n_full = 0
        for scan in scans(c):
            carry, aux = self._scan(scan, n_full, carry, shared, capture)
            auxes.append(aux)
            n_full += len(scan[0].layers)
        x, keys = carry

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
        selected: jax.Array | None = None,
        capture: tuple[str, ...] = (),
        return_logits: bool = True,
    ) -> tuple[jax.Array | None, Cache | None, Aux]:
        """Logits of the token after the next: ``model.apply(params, ..., method="mtp_logits")``.

        Args:
          hidden: [B T D], ``aux["hidden"]`` of the main model, or of this method to draft further tokens.
          next_tokens: [B T] int32, the token that follows each position.
          positions, segment_ids, capture, return_logits: as for the main model; position i is that of hidden i.
          cache: the MTP layer's own, ``init_cache(config, B, capacity, n_layers=1)``.
          selected: [B T K], slots of the cache (-1 = none) that the layer reads in place of its own selection; for a
            model with ``mtp_reuses_selection``, when it drafts a further token: the row of "topk_indices", captured
            with its first draft, from which that draft was made. Neither scores nor top-k are computed then.

        Returns:
          logits [B T V] float32 or None, the cache, and the layer's aux with "hidden" and "final_hidden" [B T D],
          here the same: the output of the layer's norm.

        Raises:
          ValueError: the model has no MTP layer; ``selected`` has another shape, or is given to a model without
            ``mtp_reuses_selection`` or for training; or as for the main model.
        """
        c = self.config
        if not c.n_mtp_layers:
            raise ValueError("mtp_logits needs a model with n_mtp_layers=1, got n_mtp_layers=0")
        _check_capture(capture, c)
        shared, new_cache = self._place(next_tokens, positions, segment_ids, cache)
        if selected is not None:
            _check_reused(selected, next_tokens, capture, c)
        owner = self if c.mtp_shared_embeddings else self.mtp
        keys = None if cache is None else cache.keys
        valid = shared.placement.valid[..., None]
        hidden = jnp.where(valid, hidden.astype(c.dtype), 0)
        embedded = jnp.where(valid, lookup(owner.embed, next_tokens, c.dtype), 0)
        out, keys, aux = self.mtp(hidden, embedded, keys, selected, *shared, capture)
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

    def _scan(
        self, scan: tuple[Stack, ...], n_full: int, carry: Carry, shared: Positions, capture: tuple[str, ...]
    ) -> tuple[Carry, Aux]:
        """Runs the layers of one scan. The cache's keys are in the carry, so that they are updated in place.

        n_full: the full layers before it.
        """

        def one_layer(
            block: Block, carry: Carry, selected: jax.Array | None, index: LayerIndex
        ) -> tuple[Carry, jax.Array | None, Aux]:
            # Without the barrier, XLA would compute masks before the loop over layers, because all layers share
            # them: whole, T x S for each head.
            here = lax.optimization_barrier((shared, lax.stop_gradient(carry[0])))[0]
            x, keys, selected, aux = block(*carry, selected, index, *here, capture)
            return (constrain(x, "batch", "sequence", None), keys), selected, aux

        if self.config.remat == "layer":
            policy = jax.checkpoint_policies.save_only_these_names("topk_indices", "index_gradients")
            one_layer = nn.remat(one_layer, prevent_cse=False, policy=policy)

        def one_step(
            first: Block, carry: Carry, step: LayerIndex, others: tuple[Block, ...]
        ) -> tuple[Carry, list[Aux]]:
            selected, auxes = None, []
            for i, block in enumerate((first, *others)):
                index = LayerIndex(layer=step.layer + i, full=step.full)
                carry, selected, aux = one_layer(block, carry, selected, index)
                auxes.append(aux)
            return carry, auxes

        first, *others = (getattr(self, stack.name) for stack in scan)
        layers = scan[0].layers
        n, numbers = len(layers), jnp.arange(len(layers), dtype=jnp.int32)
        steps = LayerIndex(layer=layers.start + layers.step * numbers, full=n_full + numbers)
        run = nn.scan(one_step, variable_axes={"params": 0}, split_rngs={"params": True}, length=n)
        carry, auxes = run(first, carry, steps, tuple(others))
        return carry, _in_order(auxes)


def _in_order(auxes: list[Aux]) -> Aux:
    """The aux of several stacks [steps ...], whose layers alternate, as one in the order of the layers."""

    def merged(arrays: list[jax.Array]) -> jax.Array:
        if len(arrays) == 1:
            return arrays[0]
        return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])

    names = dict.fromkeys(name for aux in auxes for name in aux)
    return {name: merged([aux[name] for aux in auxes if name in aux]) for name in names}


def _check_capture(capture: tuple[str, ...], config: ModelConfig) -> None:
    if unknown := set(capture) - set(CAPTURABLE):
        raise ValueError(f"capture must name some of {CAPTURABLE}, got {sorted(unknown)}")
    if "index_kl" in capture and not config.index_loss:
        raise ValueError("capture of ['index_kl'] needs index_loss=True, got False")
    if config.attention != "sparse" and (unavailable := {"index_scores", "topk_indices"} & set(capture)):
        raise ValueError(
            f"capture of {sorted(unavailable)} needs attention='sparse', got {config.attention!r}"
        )


def _check_reused(
    selected: jax.Array, tokens: jax.Array, capture: tuple[str, ...], config: ModelConfig
) -> None:
    if not config.mtp_reuses_selection or config.index_loss or config.attention != "sparse":
        raise ValueError(
            "selected needs a model with mtp_reuses_selection=True, index_loss=False and attention='sparse', got "
            f"{config.mtp_reuses_selection}, {config.index_loss} and {config.attention!r}"
        )
    if selected.ndim != 3 or selected.shape[:2] != tokens.shape:
        raise ValueError(
            f"selected must be [B T K] with [B T] of the tokens {tokens.shape}, got {selected.shape}"
        )
    if reused := {"index_scores", "topk_indices"} & set(capture):
        raise ValueError(f"with selected nothing is computed to capture {sorted(reused)} from")


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
