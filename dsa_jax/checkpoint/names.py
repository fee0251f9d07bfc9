"""The one table of names: Hugging Face's released tensors <-> paths in our parameter tree.

A row of the tables below is a kind of tensor: its released name, its path, its shape as released ([out, in] for
matrices), and how the release stores it ("FP8" with block scales, "BF16" or "F32"). Our matrices are the transpose,
[in, out], except embeddings, which have one row per token. `tensor_table` expands the kinds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dsa_jax.config import ModelConfig
from dsa_jax.fp8.e4m3 import BLOCK
from dsa_jax.layers import stacks

SCALE_SUFFIX = "_scale_inv"
"""Appended to the name of an FP8 tensor: its block scales (float32, multiplied despite the name)."""

# Shapes: one word per axis, see `_sizes`. A trailing "T" in the storage column marks a transposed matrix.
_ATTENTION = (
    ("input_layernorm.weight", "attn_norm", "D", "BF16"),
    ("post_attention_layernorm.weight", "ffn_norm", "D", "BF16"),
    ("self_attn.q_a_proj.weight", "attn/wq_a", "Q D", "FP8 T"),
    ("self_attn.q_a_layernorm.weight", "attn/q_norm", "Q", "BF16"),
    ("self_attn.q_b_proj.weight", "attn/wq_b", "queries Q", "FP8 T"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn/wkv_a", "latent_and_rope D", "FP8 T"),
    ("self_attn.kv_a_layernorm.weight", "attn/kv_norm", "C", "BF16"),
    ("self_attn.kv_b_proj.weight", "attn/wkv_b", "keys_and_values C", "FP8 T"),
    ("self_attn.o_proj.weight", "attn/wo", "D values", "FP8 T"),
)
_INDEXER = (
    ("self_attn.indexer.wq_b.weight", "attn/indexer/wq_b", "index_queries Q", "FP8 T"),
    ("self_attn.indexer.wk.weight", "attn/indexer/wk", "J D", "FP8 T"),
    ("self_attn.indexer.k_norm.weight", "attn/indexer/k_norm/scale", "J", "F32"),
    ("self_attn.indexer.k_norm.bias", "attn/indexer/k_norm/bias", "J", "F32"),
    ("self_attn.indexer.weights_proj.weight", "attn/indexer/weights_proj", "I D", "BF16 T"),
)
_DENSE = (
    ("mlp.gate_proj.weight", "ffn/w_gate", "F_dense D", "FP8 T"),
    ("mlp.up_proj.weight", "ffn/w_up", "F_dense D", "FP8 T"),
    ("mlp.down_proj.weight", "ffn/w_down", "D F_dense", "FP8 T"),
)
_MOE = (
    ("mlp.gate.weight", "ffn/gate", "E D", "BF16 T"),
    ("mlp.gate.e_score_correction_bias", "ffn/gate_bias", "E", "F32"),
    ("mlp.experts.{e}.gate_proj.weight", "ffn/experts/w_gate", "F D", "FP8 T"),
    ("mlp.experts.{e}.up_proj.weight", "ffn/experts/w_up", "F D", "FP8 T"),
    ("mlp.experts.{e}.down_proj.weight", "ffn/experts/w_down", "D F", "FP8 T"),
    ("mlp.shared_experts.gate_proj.weight", "ffn/shared_experts/w_gate", "F_shared D", "FP8 T"),
    ("mlp.shared_experts.up_proj.weight", "ffn/shared_experts/w_up", "F_shared D", "FP8 T"),
    ("mlp.shared_experts.down_proj.weight", "ffn/shared_experts/w_down", "D F_shared", "FP8 T"),
)
_TOP = (
    ("model.embed_tokens.weight", "embed", "V D", "BF16"),
    ("model.norm.weight", "norm", "D", "BF16"),
    ("lm_head.weight", "head", "V D", "BF16 T"),
)
_MTP = (
    ("embed_tokens.weight", "mtp/embed", "V D", "BF16"),
    ("enorm.weight", "mtp/embed_norm", "D", "BF16"),
    ("hnorm.weight", "mtp/hidden_norm", "D", "BF16"),
    ("eh_proj.weight", "mtp/proj", "D D_twice", "BF16 T"),
    ("shared_head.norm.weight", "mtp/norm", "D", "BF16"),
    ("shared_head.head.weight", "mtp/head", "V D", "BF16 T"),
)
MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
"""Tensors of the MTP layer that a checkpoint may leave out, both or neither: the main model's are used."""
MTP_PROJECTION = "eh_proj.weight"
"""The tensor that every MTP layer has and no other layer."""
_SHARED_BY_MTP = {"mtp/embed": "embed", "mtp/head": "head"}

# Leaves that are float32 whatever config.param_dtype says: norms, router and indexer weights are small, and rounding
# them changes selections (DeepSeek's inference/model.py keeps the same ones in float32).
_FLOAT32 = (
    "norm", "attn_norm", "ffn_norm", "q_norm", "kv_norm", "embed_norm", "hidden_norm", "scale", "bias",
    "gate", "gate_bias", "weights_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRow:
    """One released tensor and its leaf in our tree.

    path: keys below "params"; index: position in the leaf's stacked leading axes, () when unstacked;
    stack: sizes of those axes ([layer] or [layer, expert]); shape: as released; transpose: our matrix is the
    released one transposed; stored: "FP8" | "BF16" | "F32" in the release; float32: always float32 here;
    duplicate: a second released copy of a leaf another row fills (an MTP layer that shares its embeddings).
    """

    path: tuple[str, ...]
    index: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    transpose: bool
    stored: str
    float32: bool
    duplicate: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the release stores it in FP8 blocks, with scales under the name + SCALE_SUFFIX."""
        return self.stored == "FP8"

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the whole leaf in our tree, stacked axes first."""
        return self.stack + (self.shape[::-1] if self.transpose else self.shape)


def tensor_table(config: ModelConfig) -> dict[str, TensorRow]:
    """Every weight of the released layout (scales are implied by `quantized`), in release order of layers.

    The MTP layer, when config has one, is layer index n_layers, as in the released checkpoint. The functions that
    read one checkpoint all ask for the table of one config, so it is expanded once (V3.2: 46,493 rows, 3 seconds).
    """
    return dict(_expanded(config))


@functools.lru_cache(maxsize=2)
def _expanded(config: ModelConfig) -> dict[str, TensorRow]:
    sizes = _sizes(config)
    table = _expand(_TOP, "", "", sizes)
    places = {layer: (stack, i) for stack in stacks(config) for i, layer in enumerate(stack.layers)}
    for layer, (stack, i) in sorted(places.items(), key=lambda place: place[0]):
        kinds = _ATTENTION + (_INDEXER if stack.has_indexer else ()) + (_MOE if stack.is_moe else _DENSE)
        table |= _expand(
            kinds, layer_prefix(layer), f"{stack.name}/", sizes, index=(i,), stack=(len(stack.layers),)
        )
    if config.n_mtp_layers:
        prefix = layer_prefix(config.n_layers)
        shared = _SHARED_BY_MTP if config.mtp_shared_embeddings else {}
        table |= _expand(_ATTENTION + _INDEXER + _MOE, prefix, "mtp/layer/", sizes)
        table |= _expand(_MTP, prefix, "", sizes, shared=shared)
    return table


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path below "params" -> shape, for every leaf of the parameter tree."""
    return {row.path: row.leaf_shape for row in tensor_table(config).values()}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an FP8 matrix, or of a stack: one per 128 x 128 block; a ragged edge counts as a block."""
    return *shape[:-2], *(-(-size // BLOCK) for size in shape[-2:])


def layer_prefix(layer: int) -> str:
    """The prefix of a layer's released names; layer n_layers is the MTP layer."""
    return f"model.layers.{layer}."


def _sizes(config: ModelConfig) -> dict[str, int]:
    heads = config.n_heads
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "D_twice": 2 * config.d_model,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "queries": heads * config.qk_head_dim,
        "latent_and_rope": config.kv_lora_rank + config.qk_rope_head_dim,
        "keys_and_values": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "values": heads * config.v_head_dim,
        "I": config.index_n_heads,
        "J": config.index_head_dim,
        "index_queries": config.index_n_heads * config.index_head_dim,
        "E": config.n_routed_experts,
        "F_dense": config.d_ff,
        "F": config.d_expert,
        "F_shared": config.d_expert * config.n_shared_experts,
    }


def _expand(
    kinds: tuple[tuple[str, str, str, str], ...],
    name_prefix: str,
    path_prefix: str,
    sizes: dict[str, int],
    *,
    index: tuple[int, ...] = (),
    stack: tuple[int, ...] = (),
    shared: dict[str, str] | None = None,
) -> dict[str, TensorRow]:
    table = {}
    for name, path, axes, storage in kinds:
        own = path_prefix + path
        target = (shared or {}).get(own, own)
        keys = tuple(target.split("/"))
        stored, *transposed = storage.split()
        shape = tuple(sizes[axis] for axis in axes.split())
        per_expert = "{e}" in name
        for expert in range(sizes["E"] if per_expert else 1):
            table[name_prefix + name.replace("{e}", str(expert))] = TensorRow(
                path=keys,
                index=index + ((expert,) if per_expert else ()),
                stack=stack + ((sizes["E"],) if per_expert else ()),
                shape=shape,
                transpose=bool(transposed),
                stored=stored,
                float32=keys[-1] in _FLOAT32,
                duplicate=target != own,
            )
    return table
