"""Deterministic weights of the small models whose outputs lie beside this file, and their released layout.

Independent of dsa_jax on purpose: names, shapes and FP8 blocks are written out again, so that a mistake in
the package's own table cannot cancel out.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

N_SHARDS = 3
_TINY: dict[str, Any] = dict(
    architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", vocab_size=512, hidden_size=256,
    intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4, first_k_dense_replace=1,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8,
    num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=32,
    index_n_heads=32, index_head_dim=128, index_topk=16, rms_norm_eps=1e-6, max_position_embeddings=163840,
    scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, num_nextn_predict_layers=1, ep_size=1,
    torch_dtype="bfloat16", attention_bias=False, attention_dropout=0.0, hidden_act="silu", bos_token_id=0,
    eos_token_id=1, initializer_range=0.02, tie_word_embeddings=False, use_cache=True,
    transformers_version="4.44.2", rope_theta=10000,
    rope_scaling=dict(
        type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
        mscale=1.0, mscale_all_dim=1.0,
    ),
    quantization_config=dict(
        activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", scale_fmt="ue8m0",
        weight_block_size=[128, 128],
    ),
)  # fmt: skip
_V32: dict[str, Any] = _TINY | dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128, num_key_value_heads=128,
    n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, index_n_heads=64, index_topk=2048,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny_calm": _TINY,
    # Every size that DeepSeek's converter splits over two ranks is an even number of blocks.
    "tiny_two_ranks": _TINY
    | dict(num_attention_heads=8, num_key_value_heads=8, v_head_dim=64, moe_intermediate_size=256),
    "v32": _V32,  # the released model: for its names and shapes, its weights would be 1.3 TB
    "v32_one_layer": _V32
    | dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=2048),
}
"""Preset -> config.json in the released spelling."""

_FP8 = (
    "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight",
    "indexer.wq_b.weight", "indexer.wk.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight",
)  # fmt: skip
_FLOAT32 = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")


def released_shapes(preset: str, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Released tensor name -> shape; with mtp, also the MTP layer as layer 4."""
    c = CONFIGS[preset]
    width, vocab, n_layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(n_layers):
        shapes |= _layer(c, i, dense=i < c["first_k_dense_replace"])
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    if mtp:
        prefix = f"model.layers.{n_layers}."
        shapes |= _layer(c, n_layers, dense=False)
        shapes |= {
            prefix + "embed_tokens.weight": (vocab, width),
            prefix + "enorm.weight": (width,),
            prefix + "hnorm.weight": (width,),
            prefix + "eh_proj.weight": (width, 2 * width),
            prefix + "shared_head.norm.weight": (width,),
            prefix + "shared_head.head.weight": (vocab, width),
        }
    return shapes


def make_weights(preset: str, seed: int = 0, *, mtp: bool = False) -> dict[str, np.ndarray]:
    """Released tensor name -> float32 array that bfloat16 holds exactly; MTP has copies of embed and head."""
    shapes = released_shapes(preset, mtp=mtp)
    weights = {
        name: _draw(seed, name, shape, calm=preset == "tiny_calm")
        .astype(ml_dtypes.bfloat16)
        .astype(np.float32)
        for name, shape in shapes.items()
    }
    if mtp:
        prefix = f"model.layers.{CONFIGS[preset]['num_hidden_layers']}."
        weights[prefix + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
        weights[prefix + "shared_head.head.weight"] = weights["lm_head.weight"].copy()
    return weights


def make_tokens(preset: str, seed: int = 0, *, batch: int = 2, length: int = 64) -> np.ndarray:
    """[batch, length] int64 token ids, never bos (0) or eos (1)."""
    draws = _generator(seed, "tokens").integers(2, CONFIGS[preset]["vocab_size"], size=(batch, length))
    return draws.astype(np.int64)


def write_release_checkpoint(path: Path, preset: str = "tiny", seed: int = 0) -> dict[str, np.ndarray]:
    """Writes the folder as released; returns the float32 value of every stored weight, FP8 dequantised."""
    path.mkdir(parents=True, exist_ok=True)
    stored: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for name, weight in make_weights(preset, seed, mtp=True).items():
        if name.endswith(_FP8):
            stored[name], stored[name + "_scale_inv"], values[name] = _to_fp8(weight)
        else:
            stored[name] = weight if name.endswith(_FLOAT32) else weight.astype(ml_dtypes.bfloat16)
            values[name] = weight
    weight_map = {}
    for shard in range(N_SHARDS):
        # Every third tensor: a weight and its scales, which follow it, never share a shard.
        names = list(stored)[shard::N_SHARDS]
        file_name = f"model-{shard + 1:05d}-of-{N_SHARDS:05d}.safetensors"
        save_file({name: stored[name] for name in names}, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(array.nbytes for array in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(CONFIGS[preset], indent=2, sort_keys=True))
    return values


def write_sparse_release(path: Path, preset: str, *, mtp: bool, shard_bytes: int = 4_300_000_000) -> int:
    """The released layout with true headers over files of holes: all zeros, no disk used. Returns the bytes."""
    path.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    used = 0
    for name, shape in released_shapes(preset, mtp=mtp).items():
        size = math.prod(shape)
        if name.endswith(_FP8):
            scales = tuple(-(-n // 128) for n in shape)
            parts = {
                name: ("F8_E4M3", shape, size),
                name + "_scale_inv": ("F32", scales, 4 * math.prod(scales)),
            }
        elif name.endswith(_FLOAT32):
            parts = {name: ("F32", shape, 4 * size)}
        else:
            parts = {name: ("BF16", shape, 2 * size)}
        if used > shard_bytes:
            shards.append({})
            used = 0
        shards[-1] |= parts
        used += sum(part[2] for part in parts.values())
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        header, offset = {}, 0
        for name, (dtype, shape, size) in tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        raw = json.dumps(header).encode()
        with (path / file_name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + offset)
        weight_map |= dict.fromkeys(tensors, file_name)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(CONFIGS[preset]))
    return total


def _layer(c: dict[str, Any], i: int, *, dense: bool) -> dict[str, tuple[int, ...]]:
    width, heads, q_rank, latent = (
        c[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = (c[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_a_proj.weight": (q_rank, width),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, width),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
        "self_attn.o_proj.weight": (width, heads * value),
        "self_attn.indexer.wq_b.weight": (index_heads * index_dim, q_rank),
        "self_attn.indexer.wk.weight": (index_dim, width),
        "self_attn.indexer.k_norm.weight": (index_dim,),
        "self_attn.indexer.k_norm.bias": (index_dim,),
        "self_attn.indexer.weights_proj.weight": (index_heads, width),
    }
    expert, n_experts = c["moe_intermediate_size"], c["n_routed_experts"]
    if dense:
        shapes |= _mlp("mlp.", width, c["intermediate_size"])
    else:
        shapes |= {"mlp.gate.weight": (n_experts, width), "mlp.gate.e_score_correction_bias": (n_experts,)}
        for e in range(n_experts):
            shapes |= _mlp(f"mlp.experts.{e}.", width, expert)
        shapes |= _mlp("mlp.shared_experts.", width, expert * c["n_shared_experts"])
    return {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}


def _mlp(prefix: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (inner, width),
        prefix + "up_proj.weight": (inner, width),
        prefix + "down_proj.weight": (width, inner),
    }


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def _draw(seed: int, name: str, shape: tuple[int, ...], *, calm: bool) -> np.ndarray:
    normal = _generator(seed, name).standard_normal(shape)
    if name.endswith(("e_score_correction_bias", "k_norm.bias")):
        return (0.2 * normal).astype(np.float32)
    if name.endswith(("norm.weight", "layernorm.weight")):
        return (1.0 + 0.2 * normal).astype(np.float32)
    if name.endswith("embed_tokens.weight"):
        return normal.astype(np.float32)
    weight = (_gain(name, calm=calm) * normal / np.sqrt(shape[-1])).astype(np.float32)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        weight[128:] *= 3.0  # the ragged FP8 row block gets a scale unlike its neighbour's
    return weight


def _gain(name: str, *, calm: bool) -> float:
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.15 if calm else 0.7
    if name.endswith(".q_b_proj.weight"):
        return 0.4 if calm else 1.5
    if name.endswith("indexer.wq_b.weight"):
        return 1.5
    if name.endswith("mlp.gate.weight") and calm:
        return 4.0
    return 1.0


def _to_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(e4m3 values, power-of-two scale per 128 x 128 block, their float32 product), block by block."""
    n, k = weight.shape
    values = np.zeros((n, k), ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-n // 128), -(-k // 128)), np.float32)
    product = np.zeros((n, k), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            amax = max(float(np.abs(weight[block]).max()), 1e-4)
            scales[i, j] = 2.0 ** np.ceil(np.log2(amax / 448.0))
            values[block] = np.clip(weight[block] / scales[i, j], -448, 448).astype(ml_dtypes.float8_e4m3fn)
            product[block] = values[block].astype(np.float32) * scales[i, j]
    return values, scales, product
