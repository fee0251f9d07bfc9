"""The table of names against DeepSeek's published totals and names written out independently."""

import math

import pytest

from dsa_jax.checkpoint.names import TensorRow, leaf_shapes, scale_shape, tensor_table
from dsa_jax.config import deepseek_v32, glm5, tiny
from tests.vectors.weights import released_shapes


@pytest.fixture(scope="module")
def v32() -> dict[str, TensorRow]:
    return tensor_table(deepseek_v32())


def test_v32_has_exactly_the_published_tensors_and_elements(v32) -> None:
    rows = v32.values()
    quantized = [row for row in rows if row.quantized]
    assert len(rows) + len(quantized) == 92_425
    assert sum(math.prod(row.shape) for row in rows) == 685_355_329_792
    assert sum(math.prod(scale_shape(row.shape)) for row in quantized) == 41_591_584


def test_v32_elements_by_stored_type_are_the_published_ones(v32) -> None:
    totals = {"BF16": 0, "FP8": 0, "F32": 41_591_584}
    for row in v32.values():
        totals[row.stored] += math.prod(row.shape)
    assert totals == {"BF16": 3_947_229_184, "FP8": 681_408_069_632, "F32": 41_622_560}


def test_v32_without_indexer_has_the_numbers_of_v3(v32) -> None:
    rows = [row for name, row in v32.items() if ".indexer." not in name]
    assert len(rows) + sum(row.quantized for row in rows) == 91_991
    assert sum(math.prod(row.shape) for row in rows if row.quantized) == 680_571_043_840


@pytest.mark.parametrize("mtp", [False, True])
def test_names_and_shapes_equal_an_independent_list(mtp) -> None:
    table = tensor_table(tiny(n_mtp_layers=int(mtp)))
    assert {name: row.shape for name, row in table.items()} == released_shapes("tiny", mtp=mtp)


@pytest.mark.parametrize(
    "config",
    [
        deepseek_v32(),
        glm5(),
        tiny(),
        tiny(n_mtp_layers=0),
        tiny(mtp_shared_embeddings=True),
        tiny(n_dense_layers=0),
        tiny(n_dense_layers=4),
        tiny(n_shared_experts=2),
    ],
)
def test_leaves_hold_as_many_elements_as_the_config_counts(config) -> None:
    assert sum(math.prod(shape) for shape in leaf_shapes(config).values()) == config.param_count()


@pytest.mark.parametrize("config", [tiny(), tiny(mtp_shared_embeddings=True), tiny(n_dense_layers=0)])
def test_every_place_of_every_leaf_is_filled_exactly_once(config) -> None:
    places = [(row.path, row.index) for row in tensor_table(config).values() if not row.duplicate]
    assert len(places) == len(set(places))
    for row in tensor_table(config).values():
        assert len(row.index) == len(row.stack)
        assert all(0 <= i < size for i, size in zip(row.index, row.stack, strict=True))
        assert sum(path == row.path for path, _ in places) == math.prod(row.stack)


def test_leaves_have_the_shapes_of_the_parameter_tree() -> None:
    shapes = leaf_shapes(tiny())
    for path, shape in {
        "embed": (512, 256),
        "norm": (256,),
        "head": (256, 512),
        "dense_layers/ffn/w_gate": (1, 256, 512),
        "dense_layers/ffn/w_down": (1, 512, 256),
        "moe_layers/attn_norm": (3, 256),
        "moe_layers/attn/wq_b": (3, 128, 4 * 96),
        "moe_layers/attn/wkv_a": (3, 256, 160),
        "moe_layers/attn/wkv_b": (3, 128, 4 * 96),
        "moe_layers/attn/wo": (3, 128, 256),
        "moe_layers/attn/indexer/wq_b": (3, 128, 32 * 128),
        "moe_layers/attn/indexer/k_norm/bias": (3, 128),
        "moe_layers/attn/indexer/weights_proj": (3, 256, 32),
        "moe_layers/ffn/gate": (3, 256, 8),
        "moe_layers/ffn/gate_bias": (3, 8),
        "moe_layers/ffn/experts/w_up": (3, 8, 256, 128),
        "moe_layers/ffn/experts/w_down": (3, 8, 128, 256),
        "moe_layers/ffn/shared_experts/w_gate": (3, 256, 128),
        "mtp/proj": (512, 256),
        "mtp/layer/attn/wq_a": (256, 128),
        "mtp/layer/ffn/experts/w_gate": (8, 256, 128),
        "mtp/embed": (512, 256),
        "mtp/head": (256, 512),
    }.items():
        assert shapes[tuple(path.split("/"))] == shape, path


def test_float32_leaves_are_norms_router_and_indexer_weights() -> None:
    float32 = {"/".join(row.path) for row in tensor_table(tiny()).values() if row.float32}
    layer = {"attn_norm", "ffn_norm", "attn/q_norm", "attn/kv_norm", "attn/indexer/k_norm/scale"}
    layer |= {"attn/indexer/k_norm/bias", "attn/indexer/weights_proj"}
    router = {"ffn/gate", "ffn/gate_bias"}
    expected = {f"dense_layers/{name}" for name in layer}
    expected |= {f"{stack}/{name}" for stack in ("moe_layers", "mtp/layer") for name in layer | router}
    assert float32 == expected | {"norm", "mtp/norm", "mtp/embed_norm", "mtp/hidden_norm"}


def test_a_ragged_edge_has_a_scale_of_its_own() -> None:
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((128, 1)) == (1, 1)
