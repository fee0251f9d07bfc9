"""Every key of config.json with every wrong value: read as a config of finite numbers, or refused in a sentence."""

import dataclasses
import math
from typing import Any

import pytest

from dsa_jax.checkpoint import from_hf, to_hf
from dsa_jax.checkpoint.hf_config import _FIXED, _FLOAT_KEYS, _INT_KEYS, _READ
from dsa_jax.config import ModelConfig, tiny

BASE = to_hf(tiny())
ROPE = {**BASE["rope_scaling"], "rope_theta": 10000.0, "attention_factor": 1.0, "truncate": True}
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, -0.0, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**400, -(10**400), "", "x", [],
    {}, [None], [[]], [1], ["x"], {"a": 1},
]  # fmt: skip
KEYS = sorted(_READ | set(_INT_KEYS) | set(_FLOAT_KEYS) | set(_FIXED))
INNER = [
    *((outer, key) for outer in ("rope_scaling", "rope_parameters") for key in (*ROPE, "rope_type")),
    *(("quantization_config", key) for key in (*BASE["quantization_config"], "dequantize", "expert_dtype")),
]


def read_or_refused(values: dict[str, Any]) -> None:
    try:
        config = from_hf(values)
    except (ValueError, NotImplementedError) as error:
        assert len(str(error)) < 1500 and "\n" not in str(error)
        return
    for owner in (config, config.yarn or ()):
        fields = dataclasses.fields(owner) if owner else ()
        numbers = [value for field in fields if isinstance(value := getattr(owner, field.name), int | float)]
        assert all(math.isfinite(number) for number in numbers)
    assert isinstance(config, ModelConfig)


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_value_is_read_or_refused(key) -> None:
    for value in ODD:
        read_or_refused(BASE | {key: value})


@pytest.mark.parametrize(("outer", "key"), INNER)
def test_a_wrong_value_inside_an_object_is_read_or_refused(outer, key) -> None:
    values = {k: v for k, v in BASE.items() if not (outer == "rope_parameters" and k == "rope_scaling")}
    inner = BASE["quantization_config"] if outer == "quantization_config" else ROPE
    for value in ODD:
        read_or_refused(values | {outer: inner | {key: value}})


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "vocab_size"]
)
@pytest.mark.parametrize("value", [2**31, 10**400])
def test_a_size_that_no_model_has_is_named_before_it_uses_up_the_memory(key, value) -> None:
    with pytest.raises(ValueError, match=rf"config.json: {key} must be at most \d+, got"):
        from_hf(BASE | {key: value})
