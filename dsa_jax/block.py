"""One transformer layer: attention and feed-forward on the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsa_jax.cache import Arrays, Placement, store
from dsa_jax.config import ModelConfig
from dsa_jax.index_loss import index_loss
from dsa_jax.mla import Mla, attend, compress
from dsa_jax.moe import Ffn, Moe, moe, swiglu
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation
from dsa_jax.sharding import gathered, shard_map

CAPTURABLE = ("index_scores", "topk_indices", "index_kl", "attn", "ffn", "out", "experts", "expert_weights")


class Block(nn.Module):
    """x += attn(norm(x)); x += ffn(norm(x)), with a MoE (``is_moe``) or a dense SwiGLU."""

    config: ModelConfig
    is_moe: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cached: Arrays | None,
        layer: jax.Array,
        rotation: Rotation,
        placement: Placement,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Arrays | None, dict[str, jax.Array]]:
        """x [B T D]; ``cached`` holds all layers' cache arrays, of which this layer uses index ``layer``.

        Returns x, the cache arrays with the new tokens, and expert_load, balance, index_loss and whatever
        ``capture`` names.
        """
        c = self.config
        attn_norm = self.param("attn_norm", nn.initializers.ones, (c.d_model,), jnp.float32)
        ffn_norm = self.param("ffn_norm", nn.initializers.ones, (c.d_model,), jnp.float32)
        attn = gathered("attn", Mla(c, name="attn")())

        with jax.named_scope("attention"):
            h = rms_norm(x, attn_norm, c.norm_eps)
            q_compressed, keys = compress(h, rotation, attn, c)
            if cached is not None:
                stacked, per_key = (None, "batch", None, None), ("batch", None, None)
                put = shard_map(
                    store, in_axes=(stacked, (), per_key[:2], per_key), out_axes=(stacked, per_key)
                )
                cached, keys = put(cached, layer, placement.slots, keys)
            wanted = capture
            if c.index_loss:
                wanted += ("lse", "topk_indices") if c.attention == "sparse" else ("lse",)
            attention, aux = attend(h, q_compressed, keys, rotation, placement, attn, c, wanted)
        if c.index_loss:
            with jax.named_scope("index_loss"):
                target = aux["lse"], aux.get("topk_indices")
                loss, kl = index_loss(h, q_compressed, keys, rotation, placement, attn, c, *target)
            aux = {name: value for name, value in (aux | {"index_kl": kl}).items() if name in capture}
            aux["index_loss"] = loss

        # The norm reads the float32 sum; only the residual that is carried on is rounded (inference/model.py).
        residual = x.astype(jnp.float32) + attention.astype(jnp.float32)
        h, x = rms_norm(residual, ffn_norm, c.norm_eps, x.dtype), residual.astype(x.dtype)
        with jax.named_scope("feed_forward"):
            if self.is_moe:
                y, routing = moe(h, placement.valid, gathered("ffn", Moe(c, name="ffn")()), c)
                aux |= {k: v for k, v in routing.items() if k in (*capture, "expert_load", "balance")}
            else:
                y = swiglu(h, gathered("ffn", Ffn(c, c.d_ff, name="ffn")()))
        x = x + y
        aux |= {k: v for k, v in {"attn": attention, "ffn": y, "out": x}.items() if k in capture}
        return x, cached, aux
