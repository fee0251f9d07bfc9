"""Multi-token prediction (MTP): one more layer, which predicts the token after the next."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsa_jax.block import Block
from dsa_jax.cache import Keys, LayerIndex, Placement
from dsa_jax.config import ModelConfig
from dsa_jax.linear import linear
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation
from dsa_jax.sharding import gathered_matrix


class Mtp(nn.Module):
    """o_i = norm(Block(proj [embed_norm(Emb(t_{i+1})); hidden_norm(h_i)])): the embedding comes first.

    The block is a full MoE layer with its own MLA and indexer. Unless ``config.mtp_shared_embeddings``, the layer has
    its own embedding and head, as in the released checkpoint.

    Source: DeepSeek-V3 report, section 2.2.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        ones, normal = nn.initializers.ones, nn.initializers.normal(c.init_std)
        dtype = jnp.dtype(c.param_dtype)
        self.embed_norm = self.param("embed_norm", ones, (c.d_model,), jnp.float32)
        self.hidden_norm = self.param("hidden_norm", ones, (c.d_model,), jnp.float32)
        self.proj = self.param("proj", normal, (2 * c.d_model, c.d_model), dtype)
        self.norm = self.param("norm", ones, (c.d_model,), jnp.float32)
        self.layer = Block(c, is_moe=True)
        if not c.mtp_shared_embeddings:
            self.embed = self.param("embed", normal, (c.vocab_size, c.d_model), dtype)
            self.head = self.param("head", normal, (c.d_model, c.vocab_size), dtype)

    def __call__(
        self,
        hidden: jax.Array,
        embedded: jax.Array,
        cached: Keys | None,
        selected: jax.Array | None,
        rotation: Rotation,
        placement: Placement,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Keys | None, dict[str, jax.Array]]:
        """hidden, embedded [B T D] -> (normalised output [B T D], the cache's keys, aux of the block).

        selected: as for ``Block``.
        """
        eps = self.config.norm_eps
        pair = [rms_norm(embedded, self.embed_norm, eps), rms_norm(hidden, self.hidden_norm, eps)]
        x = linear(jnp.concatenate(pair, axis=-1), gathered_matrix("mtp.proj", self.proj))
        index = LayerIndex(layer=jnp.int32(0), full=jnp.int32(0))
        x, cached, _, aux = self.layer(x, cached, selected, index, rotation, placement, capture)
        return rms_norm(x, self.norm, eps), cached, aux
