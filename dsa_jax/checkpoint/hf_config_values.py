"""The parts of a Hugging Face config.json with a structure of their own: RoPE and quantisation, and typed values."""

from __future__ import annotations

from typing import Any

from dsa_jax.config import Fp8Config, YarnConfig

_YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
# What an absent key means; the absence of beta_fast and beta_slow is YarnConfig's default.
_YARN_ABSENT: dict[str, Any] = {"mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": None}

_MODULES = {"modules_to_not_convert", "modules_to_convert", "ignored_layers"}

# Names of tensors and lists of layers are made from these: a mistyped one must not use up the memory.
_LARGEST = {"num_hidden_layers": 9_999, "first_k_dense_replace": 9_999, "n_routed_experts": 99_999}


_PATTERN = {"F": "full", "S": "shared"}


def read_indexer_types(values: dict[str, Any], n_layers: int, n_mtp_layers: int) -> tuple[str, ...] | None:
    """Which layers have an indexer ("full") and which share the last one's selection; None when all have one.

    As in transformers, indexer_types decides, then index_topk_pattern, then index_topk_freq and
    index_skip_topk_offset. Entries for the MTP layers may follow; these have an indexer.
    Raises ValueError for a list of another length, other entries, and shared layers of another model than glm_moe_dsa.
    """
    types = _stated_types(values, n_layers)
    main, mtp = types[:n_layers], types[n_layers:]
    if len(main) < n_layers or len(mtp) > n_mtp_layers or "shared" in mtp:
        raise ValueError(
            f"config.json: indexer_types or index_topk_pattern must have an entry for each of {n_layers} layers, and "
            f'at most {n_mtp_layers} more, "full", for the MTP layer, got {len(types)} ending in {types[-1:]}'
        )
    if "shared" not in main:
        return None
    if values["model_type"] != "glm_moe_dsa":
        raise ValueError(
            "config.json: only layers of the model_type glm_moe_dsa share an indexer (indexer_types, "
            f"index_topk_pattern, index_topk_freq), got {values['model_type']!r}"
        )
    return tuple(main)


def _stated_types(values: dict[str, Any], n_layers: int) -> list[str]:
    for key in ("indexer_types", "index_topk_pattern"):
        types = values.get(key)
        if types is None:
            continue
        if key == "index_topk_pattern" and isinstance(types, str):
            types = [_PATTERN.get(kind, kind) for kind in types]
        if not isinstance(types, list) or any(kind not in _PATTERN.values() for kind in types):
            letters = "" if key == "indexer_types" else ", or a string of F and S"
            raise ValueError(
                f'config.json: {key} must be a list of "full" and "shared"{letters}, got {values[key]!r}'
            )
        return types
    numbers = {"index_topk_freq": 1, "index_skip_topk_offset": 2}
    for key in numbers:
        if values.get(key) is not None:
            numbers[key] = read_integer(key, values[key])
    every, offset = max(numbers["index_topk_freq"], 1), numbers["index_skip_topk_offset"]
    # Full up to layer offset - 1, then every layer whose distance to it is a multiple of the frequency.
    return ["shared" if max(i - (offset - 1), 0) % every else "full" for i in range(n_layers)]


def read_object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy of the object under the key, {} for null or none. Raises ValueError for anything else."""
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json: {key} must be an object or null, got {value!r}")
    return dict(value or {})


def read_rope_theta(values: dict[str, Any]) -> Any:
    """rope_theta in either spelling, None when it is missing."""
    return read_object(values, "rope_parameters").get("rope_theta", values.get("rope_theta"))


def read_rope(values: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """(theta, YaRN or None), from rope_theta + rope_scaling or from rope_parameters.

    Raises ValueError for spellings that contradict each other, and for a type other than default and yarn.
    """
    old, new = _rope(values, "rope_scaling"), _rope(values, "rope_parameters")
    if old and new and new != old:
        raise ValueError(
            f"config.json: rope_scaling and rope_parameters contradict each other: {old} and {new}"
        )
    theta, outer = read_number("rope_theta", read_rope_theta(values)), values.get("rope_theta")
    if outer is not None and outer != theta:
        raise ValueError(
            f"config.json: rope_theta must equal that of rope_parameters, got {outer} and {theta}"
        )
    rope = new or old
    kind = rope.pop("type", "default")
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json: the rope type must be default or yarn, got {kind!r}")
    for key, supported in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if rope.pop(key, supported) != supported:
            raise ValueError(f"config.json: {key} of the rope must be {supported} or absent")
    if kind == "default":
        if rope:
            raise ValueError(f"config.json: a rope of type default takes no {', '.join(sorted(rope))}")
        return theta, None
    return theta, _yarn(rope)


def _rope(values: dict[str, Any], key: str) -> dict[str, Any]:
    """One object in one spelling: the type under "type", no rope_theta, and no nulls, which mean an absent key."""
    rope = {name: value for name, value in read_object(values, key).items() if value is not None}
    rope.pop("rope_theta", None)
    kinds = {str(rope.pop(name)) for name in ("type", "rope_type") if name in rope}
    if len(kinds) > 1:
        raise ValueError(f"config.json: {key} must have one rope type, got {' and '.join(sorted(kinds))}")
    return rope | {"type": kinds.pop()} if kinds else rope


def _yarn(rope: dict[str, Any]) -> YarnConfig:
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in rope]
    if missing:
        raise ValueError(f"config.json: a rope of type yarn needs {', '.join(missing)}")
    original = read_integer("original_max_position_embeddings", rope.pop("original_max_position_embeddings"))
    if unknown := sorted(set(rope) - set(_YARN_NUMBERS)):
        raise ValueError(f"config.json: a rope of type yarn takes no {', '.join(unknown)}")
    numbers = _YARN_ABSENT | {key: read_number(key, value) for key, value in rope.items()}
    return YarnConfig(original_seq_len=original, **numbers)


def write_rope_scaling(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """The rope_scaling object, in the released spelling; a temperature of 0 is an absent key."""
    if yarn is None:
        return None
    numbers = {key: getattr(yarn, key) for key in _YARN_NUMBERS}
    present = {
        key: value for key, value in numbers.items() if key not in _YARN_ABSENT or value != _YARN_ABSENT[key]
    }
    return {"type": "yarn", "original_max_position_embeddings": yarn.original_seq_len, **present}


def read_quantization(values: dict[str, Any]) -> Fp8Config | None:
    """From the quantization_config object; None when it is empty. Raises ValueError for anything but 128 x 128 FP8."""
    if not values:
        return None
    supported: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3", None),
        "activation_scheme": ("dynamic", None),
        "weight_block_size": ([128, 128],),
        "scale_fmt": ("ue8m0", "float", None),  # "float" is transformers' name for null
        "expert_dtype": ("fp8", None),
        "dequantize": (True, False, None),  # whether to dequantise on loading: the reader's choice
    }
    for key, options in supported.items():
        if values.get(key) not in options:
            raise ValueError(
                f"config.json: {key} of quantization_config must be {options[0]}, got {values.get(key)}"
            )
    # The lists of tensors quantised or not are not needed: the reader looks at each tensor's dtype.
    if unknown := sorted(set(values) - set(supported) - _MODULES):
        raise ValueError(
            f"config.json: quantization_config has unknown keys {', '.join(unknown)}; remove them"
        )
    return Fp8Config(scale_fmt="ue8m0" if values.get("scale_fmt") == "ue8m0" else None)


def write_quantization(fp8: Fp8Config) -> dict[str, Any]:
    """The quantization_config object, in the released spelling."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(fp8.block),
        **({"scale_fmt": fp8.scale_fmt} if fp8.scale_fmt else {}),
    }


def read_integer(key: str, value: Any) -> int:
    """The value. Raises ValueError, with the key, when it is not an integer of a size that some model could have."""
    if type(value) is not int:
        raise ValueError(f"config.json: {key} must be an integer, got {value!r}")
    if abs(value) > (largest := _LARGEST.get(key, 2**31 - 1)):
        shown = str(value) if abs(value) < 10**20 else f"one of {value.bit_length()} bits"
        raise ValueError(f"config.json: {key} must be at most {largest}, got {shown}")
    return value


def read_number(key: str, value: Any) -> float:
    """The value as a float. Raises ValueError, with the key, when it is not a number, or too large for a float."""
    if type(value) not in (int, float):
        raise ValueError(f"config.json: {key} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(
            f"config.json: {key} must be a finite number, got an integer of {value.bit_length()} bits"
        ) from error
