"""One transformer layer: attention and feed-forward on the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsa_jax.cache import Keys, LayerIndex, Placement, store
from dsa_jax.config import ModelConfig
from dsa_jax.index_loss import Target, index_loss
from dsa_jax.mla import PER_KEY, Mla, attend, compress, select_keys
from dsa_jax.moe import Ffn, Moe, moe, swiglu
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation
from dsa_jax.sharding import gathered, shard_map

CAPTURABLE = (
    "input", "index_scores", "topk_indices", "index_kl", "attn", "ffn", "out", "experts", "expert_weights",
)  # fmt: skip


class Block(nn.Module):
    """x += attn(norm(x)); x += ffn(norm(x)), where ffn is a MoE (``is_moe``) or a dense SwiGLU.

    A layer without an indexer reads the keys that an earlier layer selected.
    """

    config: ModelConfig
    is_moe: bool
    has_indexer: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cached: Keys | None,
        selected: jax.Array | None,
        layer: LayerIndex,
        rotation: Rotation,
        placement: Placement,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Keys | None, jax.Array | None, dict[str, jax.Array]]:
        """One layer on x [B T D].

        Args:
          cached: the cache's keys of all layers, or None; this layer reads and writes its own, those at ``layer``.
          selected: [B T K], the keys that the queries read in place of the layer's own selection; a layer without an
            indexer reads all visible keys if it is None.
          capture: names out of ``CAPTURABLE``.

        Returns:
          x [B T D]; ``cached`` with the keys of the new tokens; the keys that were read, or None for all visible ones;
          and aux: "expert_load" [E] and "balance" of a MoE, "index_loss" of a layer that selects, with
          ``config.index_loss``, and the captured arrays.
        """
        c = self.config
        attn_norm = self.param("attn_norm", nn.initializers.ones, (c.d_model,), jnp.float32)
        ffn_norm = self.param("ffn_norm", nn.initializers.ones, (c.d_model,), jnp.float32)
        attn = gathered("attn", Mla(c, self.has_indexer, name="attn")())
        selects = self.has_indexer and selected is None
        learns = c.index_loss and selects
        block_input = x

        with jax.named_scope("attention"):
            queries, keys = compress(rms_norm(x, attn_norm, c.norm_eps), rotation, placement, attn, c)
            if cached is not None:
                all_layers = (None, *PER_KEY)
                put = shard_map(
                    store, in_axes=(all_layers, (), PER_KEY[:2], PER_KEY), out_axes=(all_layers, PER_KEY)
                )
                cached, keys = put(cached, layer, placement.slots, keys)
            aux: dict[str, jax.Array] = {}
            if selects:
                wanted = (*capture, "topk_indices") if learns else capture
                selected, aux = select_keys(queries, keys, attn, c, wanted)
            attention, lse = attend(queries, keys, selected, attn, c, with_lse=learns)
        if learns:
            assert lse is not None  # with_lse
            with jax.named_scope("index_loss"):
                target = Target(lse, selected)
                loss, kl = index_loss(queries, keys, target, placement.valid, attn, c)
            aux = {name: value for name, value in (aux | {"index_kl": kl}).items() if name in capture}
            aux["index_loss"] = loss

        # As in inference/model.py: the norm reads the float32 sum, and only the residual stream is rounded.
        residual = x.astype(jnp.float32) + attention.astype(jnp.float32)
        h, x = rms_norm(residual, ffn_norm, c.norm_eps, x.dtype), residual.astype(x.dtype)
        with jax.named_scope("feed_forward"):
            if self.is_moe:
                y, routing = moe(h, placement.valid, gathered("ffn", Moe(c, name="ffn")()), c)
                aux |= {k: v for k, v in routing.items() if k in (*capture, "expert_load", "balance")}
            else:
                y = swiglu(h, gathered("ffn", Ffn(c, c.d_ff, name="ffn")()))
        x = x + y
        stream = {"input": block_input, "attn": attention, "ffn": y, "out": x}
        return x, cached, selected, aux | {name: array for name, array in stream.items() if name in capture}
