"""Hugging Face config.json <-> ModelConfig, for model_type deepseek_v32 and glm_moe_dsa.

Every key is read, checked against what this model can do, or named in an error; none is silently dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsa_jax.checkpoint.hf_config_values import (
    read_indexer_types,
    read_integer,
    read_number,
    read_object,
    read_quantization,
    read_rope,
    read_rope_theta,
    write_quantization,
    write_rope_scaling,
)
from dsa_jax.config import ModelConfig

# HF key -> our field, for values taken as they are.
_INT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "d_expert",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "n_activated_experts",
    "n_group": "n_expert_groups",
    "topk_group": "n_limited_groups",
    "max_position_embeddings": "max_seq_len",
}
_FLOAT_KEYS = {
    "routed_scaling_factor": "route_scale",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
_OPTIONAL = {"initializer_range": 0.02, "num_nextn_predict_layers": 0, "norm_topk_prob": True}
_EXPERT_ALIASES = ("num_experts", "num_local_experts")

# Keys of which only this value is supported; absent means the same.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "partial_rotary_factor": 1.0,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# Nor does the release write these.
_NOT_WRITTEN = (
    "rope_interleave",
    "moe_router_dtype",
    "partial_rotary_factor",
)
# Names of one layer type: transformers 5.18 and newer, and 5.12 to 5.17.
_LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")
_LISTS: dict[str, tuple[type, ...]] = {
    "layer_types": (list,), "mlp_layer_types": (list,), "indexer_types": (list,), "index_topk_pattern": (list, str),
}  # fmt: skip
_IGNORE_KEY = "dsa_jax_ignore"
_HARMLESS = frozenset(
    "_name_or_path architectures auto_map aux_loss_alpha chunk_size_feed_forward dtype ep_size id2label "
    "is_encoder_decoder label2id output_attentions output_hidden_states output_router_logits pretraining_tp "
    "problem_type return_dict router_aux_loss_coef seq_aux torch_dtype transformers_version use_cache".split()
)
_READ = frozenset(
    "model_type bos_token_id eos_token_id pad_token_id head_dim index_share_for_mtp_iteration "
    "index_skip_topk_offset index_topk_freq index_topk_pattern indexer_rope_interleave indexer_types "
    "dsa_jax_ignore layer_types mlp_layer_types norm_topk_prob num_experts num_key_value_heads num_local_experts "
    "num_nextn_predict_layers qk_head_dim quantization_config rope_parameters rope_scaling rope_theta".split()
)
_INDEXER_INTERLEAVED = {"deepseek_v32": False, "glm_moe_dsa": True}


def from_hf(values: Mapping[str, Any], *, ignore: Iterable[str] = (), **switches: Any) -> ModelConfig:
    """The ModelConfig of a parsed config.json; `switches` are ModelConfig fields that replace what it says.

    Both RoPE spellings are read (rope_theta + rope_scaling, and rope_parameters). ignore: unknown keys to
    accept; those that an earlier conversion accepted are listed under "dsa_jax_ignore" and accepted too. Raises
    ValueError for missing, unknown or contradictory keys and for values that this
    model does not support.
    """
    values = dict(values)
    ignore = tuple(ignore)
    remembered = _remembered(values)
    if (model_type := values.get("model_type")) not in list(_INDEXER_INTERLEAVED):
        options = " or ".join(_INDEXER_INTERLEAVED)
        raise ValueError(f"config.json: model_type must be {options}, got {model_type!r}")
    _refuse_unknown(values, ignore, remembered, switches)
    _refuse_other_types(values)
    _fill_aliases(values)
    _refuse_missing(values)
    fields: dict[str, Any] = {field: read_integer(key, values[key]) for key, field in _INT_KEYS.items()}
    fields |= {
        field: read_number(key, values.get(key, _OPTIONAL.get(key))) for key, field in _FLOAT_KEYS.items()
    }
    _refuse_unsupported(values)
    n_mtp_layers = read_integer("num_nextn_predict_layers", values.get("num_nextn_predict_layers") or 0)
    theta, yarn = read_rope(values)
    eos = values.get("eos_token_id")
    fields |= dict(
        norm_topk_prob=values.get("norm_topk_prob", _OPTIONAL["norm_topk_prob"]),
        rope_theta=theta,
        yarn=yarn,
        index_rope_interleaved=values.get(
            "indexer_rope_interleave", _INDEXER_INTERLEAVED[values["model_type"]]
        ),
        n_mtp_layers=n_mtp_layers,
        mtp_reuses_selection=values.get("index_share_for_mtp_iteration") or False,
        indexer_types=read_indexer_types(values, fields["n_layers"], n_mtp_layers),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=values.get("pad_token_id"),
        fp8=read_quantization(read_object(values, "quantization_config")),
    )
    return ModelConfig(**(fields | switches))


@contextmanager
def file_named(path: Path) -> Iterator[None]:
    """Puts the file in front of what `from_hf` and ModelConfig say of its content."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
        raise kind(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a config, in the released spelling; from_hf reads it back to the same architecture.

    model_type follows the indexer's RoPE: transformers' glm_moe_dsa is the class that interleaves it.
    Raises ValueError for an eps that config.json has no key for, and for layers that share an indexer in a model that
    is not glm_moe_dsa: no other class of transformers knows them.
    """
    for name in ("latent_norm_eps", "index_norm_eps"):
        if (eps := getattr(config, name)) != 1e-6:
            raise ValueError(f"{name} must be 1e-6, which every reader of config.json assumes, got {eps}")
    eos: tuple[int, ...] | list[int] | int | None = list(config.eos_token_ids)
    if len(config.eos_token_ids) < 2:
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
    interleaved = config.index_rope_interleaved
    values: dict[str, Any] = {
        "architectures": ["GlmMoeDsaForCausalLM" if interleaved else "DeepseekV32ForCausalLM"],
        "model_type": "glm_moe_dsa" if interleaved else "deepseek_v32",
        **{key: getattr(config, field) for key, field in (_INT_KEYS | _FLOAT_KEYS).items()},
        **{key: value for key, value in _FIXED.items() if key not in _NOT_WRITTEN},
        "num_key_value_heads": config.n_heads,
        "num_nextn_predict_layers": config.n_mtp_layers,
        "norm_topk_prob": config.norm_topk_prob,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
        "rope_theta": config.rope_theta,
        "rope_scaling": write_rope_scaling(config.yarn),
        "torch_dtype": "bfloat16" if config.fp8 else config.param_dtype,
        "use_cache": True,
    }
    if interleaved:
        values["indexer_rope_interleave"] = True
    if config.mtp_reuses_selection:
        values["index_share_for_mtp_iteration"] = True
    if len(config.full_layers) < config.n_layers:
        values |= _write_indexer_types(config)
    if config.fp8:
        values["quantization_config"] = write_quantization(config.fp8)
    return values


def _write_indexer_types(config: ModelConfig) -> dict[str, Any]:
    """Which layers share an indexer: transformers reads the list, vLLM the pattern, and SGLang either."""
    types = config.indexer_types or ()
    if not config.index_rope_interleaved:
        raise ValueError(
            "indexer_types with shared layers needs index_rope_interleaved=True, which is written as model_type "
            "glm_moe_dsa: transformers' deepseek_v32 has an indexer in every layer"
        )
    return {
        "indexer_types": list(types),
        "index_topk_pattern": "".join("F" if kind == "full" else "S" for kind in types),
    }


def with_ignored(values: Mapping[str, Any], ignore: Iterable[str]) -> dict[str, Any]:
    """The config.json values, with a note of the unknown keys accepted, so that every later reader accepts them."""
    accepted = sorted(set(values) & set(ignore) | set(_remembered(values)))
    return {**values, **({_IGNORE_KEY: accepted} if accepted else {})}


def _remembered(values: Mapping[str, Any]) -> tuple[str, ...]:
    keys = values.get(_IGNORE_KEY, [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"config.json: {_IGNORE_KEY} must be a list of keys, got {keys!r}")
    return tuple(keys)


def _refuse_unknown(
    values: dict[str, Any], ignore: tuple[str, ...], remembered: tuple[str, ...], switches: dict[str, Any]
) -> None:
    known = _HARMLESS | _READ | set(_INT_KEYS) | set(_FLOAT_KEYS) | set(_FIXED)
    if read := sorted(set(ignore) & known):
        raise ValueError(
            f"--ignore (ignore= in Python) is for keys this loader does not know, but it reads {', '.join(read)}"
        )
    if unknown := sorted(set(values) - known - set(ignore) - set(remembered)):
        accept = ", ".join(f'"{key}"' for key in unknown)
        raise ValueError(
            f"config.json has keys this loader does not know: {', '.join(unknown)}; if they do not change "
            f'the model, pass --ignore {" ".join(unknown)}, in Python ignore=({accept},), or add "{_IGNORE_KEY}": '
            f"[{accept}] to config.json"
        )
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    if wrong := sorted(set(switches) - fields):
        raise ValueError(f"switches must be ModelConfig fields, got {', '.join(wrong)}")


def _refuse_other_types(values: dict[str, Any]) -> None:
    """Refuses a value where a list is expected, and token ids that are no integers; None means an absent key."""
    for key, types in _LISTS.items():
        if not isinstance(values.get(key), (type(None), *types)):
            raise ValueError(f"config.json: {key} must be a list, got {values[key]!r}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values.get(key)
        for token in ids if key == "eos_token_id" and isinstance(ids, list) else (ids,):
            if token is not None or isinstance(ids, list):
                read_integer(key, token)


def _fill_aliases(values: dict[str, Any]) -> None:
    for alias in _EXPERT_ALIASES:
        if alias in values and values.setdefault("n_routed_experts", values[alias]) != values[alias]:
            raise ValueError(
                f"config.json: {alias} must equal n_routed_experts, got {values[alias]} and "
                f"{values['n_routed_experts']}"
            )
    if values.get("mlp_layer_types") is not None:
        values.setdefault("first_k_dense_replace", values["mlp_layer_types"].count("dense"))


def _refuse_missing(values: dict[str, Any]) -> None:
    required = [key for key in (*_INT_KEYS, *_FLOAT_KEYS) if key not in _OPTIONAL]
    missing = [key for key in required if values.get(key) is None]
    if read_rope_theta(values) is None:
        missing.append("rope_theta")
    if missing:
        raise ValueError(f"config.json lacks the keys {', '.join(missing)}; add them")


def _refuse_unsupported(values: dict[str, Any]) -> None:
    """Refuses values other than the only supported one, and those that contradict other keys."""
    layers, n_dense = values["num_hidden_layers"], values["first_k_dense_replace"]
    derived = {
        "num_key_value_heads": values["num_attention_heads"],
        "qk_head_dim": values["qk_nope_head_dim"] + values["qk_rope_head_dim"],
        "mlp_layer_types": ["dense"] * n_dense + ["sparse"] * (layers - n_dense),
    }
    for key, supported in (_FIXED | derived).items():
        if values.get(key) is not None and values[key] != supported:
            raise ValueError(f"config.json: {key} must be {supported!r} for this model, got {values[key]!r}")
    if (kinds := values.get("layer_types")) is not None and kinds not in [[k] * layers for k in _LAYER_TYPES]:
        raise ValueError(
            f"config.json: layer_types must be {layers} times {' or '.join(_LAYER_TYPES)}, got {kinds!r}"
        )
    # transformers overwrites head_dim by the width that it rotates; GLM-5.2 writes the width that it does not.
    widths = [values["qk_rope_head_dim"], values["qk_nope_head_dim"]]
    if (width := values.get("head_dim")) is not None and width not in widths:
        raise ValueError(
            f"config.json: head_dim must be {widths[0]} or {widths[1]}, as qk_rope_head_dim and qk_nope_head_dim, "
            f"got {width!r}"
        )
    if values.get("index_share_for_mtp_iteration", False) is None:
        del values["index_share_for_mtp_iteration"]
    for key in ("indexer_rope_interleave", "norm_topk_prob", "index_share_for_mtp_iteration"):
        if key in values and not isinstance(values[key], bool):
            raise ValueError(f"config.json: {key} must be true or false, got {values[key]!r}")
