"""GLM-5.2's IndexShare against transformers' own class, on random models: logits, layers, and the tensors on disk."""

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsa_jax.checkpoint import convert, load_config, load_params, verify, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.checkpoint.names import tensor_table
from dsa_jax.parity.compare import run_ours

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
        reason="needs torch and transformers",
    ),
    pytest.mark.parity,
]

TOP_K, LENGTH = 8, 40
# With 16 index heads relu leaves no key a score of exactly 0, and so no ties, which PyTorch breaks as it likes.
SIZES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=64, moe_intermediate_size=24, num_attention_heads=2,
    num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    index_n_heads=16, index_head_dim=16, index_topk=TOP_K, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.5, max_position_embeddings=128,
    rope_parameters=dict(rope_type="default", rope_theta=8e6),
)  # fmt: skip
F, S = "full", "shared"
PATTERNS: dict[str, tuple[int, int, dict[str, Any], list[str]]] = {
    # layers, dense layers, keys, and which layers that makes full
    "freq 2": (5, 1, dict(index_topk_freq=2), [F, F, S, F, S]),
    "freq 4, offset 3": (8, 3, dict(index_topk_freq=4, index_skip_topk_offset=3), [F, F, F, S, S, S, F, S]),
    "types, a shared dense layer": (5, 2, dict(indexer_types=[F, S, S, F, S]), [F, S, S, F, S]),
    "pattern, only MoE layers": (4, 0, dict(index_topk_pattern="FSSS"), [F, S, S, S]),
    "only dense layers": (4, 4, dict(indexer_types=[F, S, F, S]), [F, S, F, S]),
}


def random_model(pattern: str, folder: Path) -> Any:
    """A model that transformers wrote to the folder, with weights that make every part of it matter."""
    import torch
    import transformers

    layers, dense, keys, _ = PATTERNS[pattern]
    sizes = SIZES | dict(num_hidden_layers=layers, first_k_dense_replace=dense) | keys
    config = transformers.GlmMoeDsaConfig(**sizes)
    config._attn_implementation = "eager"
    model = transformers.GlmMoeDsaForCausalLM(config).float().eval()
    rng = np.random.default_rng(len(pattern))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = rng.standard_normal(tuple(tensor.shape))
            if "norm" in name:
                noise = (name.endswith("weight")) + 0.2 * noise
            elif not name.endswith(("embed_tokens.weight", "correction_bias")):
                noise = noise / math.sqrt(tensor.shape[-1])
            tensor.copy_(torch.from_numpy(noise))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return model


@contextlib.contextmanager
def recorded(model: Any, selected: dict[int, np.ndarray]):
    """While open, a forward pass leaves the keys that each full layer selects in ``selected``."""

    def hook(layer: int) -> Any:
        return lambda module, inputs, output: selected.__setitem__(layer, output.numpy())

    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(model.model.layers):
            if layer.self_attn.indexer is not None:
                stack.callback(layer.self_attn.indexer.register_forward_hook(hook(i)).remove)
        yield


def sets(topk: np.ndarray) -> list[set[int]]:
    """The visible keys of each query."""
    rows = topk.reshape(-1, LENGTH, topk.shape[-1])
    return [{s for s in row if 0 <= s <= t} for batch in rows for t, row in enumerate(batch.tolist())]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_glm_with_shared_layers_matches_transformers(tmp_path, pattern):
    import torch

    model, (layers, _, _, types) = random_model(pattern, tmp_path), PATTERNS[pattern]
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, LENGTH))
    selected: dict[int, np.ndarray] = {}
    with torch.no_grad(), recorded(model, selected):
        output = model(torch.from_numpy(tokens), use_cache=False, output_hidden_states=True)

    config = load_config(tmp_path, dtype="float32", param_dtype="float32")
    full = tuple(i for i, kind in enumerate(types) if kind == F)
    assert config.full_layers == full and tuple(selected) == full
    ours = run_ours(load_params(tmp_path, config), config, tokens)
    assert {name for name in ours if name.endswith("topk")} == {f"layer{i}.topk" for i in full}
    for i in full:
        assert sets(ours[f"layer{i}.topk"]) == sets(selected[i])
    for i in range(layers - 1):  # the last hidden state of transformers is normalised
        np.testing.assert_allclose(
            ours[f"layer{i}.out"], output.hidden_states[i + 1].numpy(), rtol=0, atol=5e-5
        )
    np.testing.assert_allclose(ours["logits"], output.logits.numpy(), rtol=0, atol=5e-5)


def test_a_model_that_selects_in_every_layer_is_another(tmp_path):
    """The comparison can fail: with the same weights, a layer that selects for itself gives other logits."""
    import torch

    model = random_model("freq 2", tmp_path)
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (1, LENGTH))
    with torch.no_grad():
        before = model(torch.from_numpy(tokens), use_cache=False).logits
        model.model.layers[2].self_attn.indexer = model.model.layers[1].self_attn.indexer
        after = model(torch.from_numpy(tokens), use_cache=False).logits
    assert float((after - before).abs().max()) > 0.01


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    stored = HfFolder(folder)
    return {name: (e.dtype, e.shape, stored.read(name).tobytes()) for name, e in stored.entries.items()}


def test_a_round_trip_keeps_exactly_the_tensors_that_transformers_wrote(tmp_path):
    released, orbax, back, written = (tmp_path / name for name in ("hf", "orbax", "back", "written"))
    random_model("freq 4, offset 3", released)
    config = load_config(released, dtype="float32", param_dtype="float32")
    convert(released, orbax)
    convert(orbax, back)
    assert verify(orbax).faults == ()
    write_hf(written, load_params(orbax, config), config)

    tensors = tensors_of(released)
    assert {name.split(".")[2] for name in tensors if ".indexer." in name} == {"0", "1", "2", "6"}
    assert tensors_of(back) == tensors_of(written) == tensors
    assert load_config(orbax, dtype="float32", param_dtype="float32") == config
    for folder in (back, written):
        assert load_config(folder, dtype="float32", param_dtype="float32") == config
        types = json.loads((folder / "config.json").read_text())["indexer_types"]
        assert types == PATTERNS["freq 4, offset 3"][3]


def test_the_table_of_names_has_the_tensors_of_transformers(tmp_path):
    random_model("types, a shared dense layer", tmp_path)
    assert set(tensor_table(load_config(tmp_path))) == set(HfFolder(tmp_path).entries)
