"""What compiles for which chip, and how much memory it needs. Nothing is run here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dsa_jax.cache import init_cache, place
from dsa_jax.config import deepseek_v32, tiny
from dsa_jax.mla import Mla, attend, compress, select_keys
from dsa_jax.rope import rotation
from dsa_jax.transformer import Transformer
from pallas_kernels import grouped_matmul

CHIPS = {"v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
ALL_CHIPS = CHIPS | {"v6e": "v6e:2x2"}
ALWAYS = {("tpu7x", "mqa")}  # the others take `make test-all`


@functools.cache
def one_chip(name):
    """A sharding onto one chip of a TPU topology, which need not be present."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'dsa-jax[tpu]'")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=ALL_CHIPS[name])
    mesh = jax.sharding.Mesh(topology.devices[:1], ("chip",))
    return NamedSharding(mesh, PartitionSpec())


def compiled_for(chip, function, *arguments):
    where = one_chip(chip)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)
    return jax.jit(function).trace(*abstract).lower(lowering_platforms=("tpu",)).compile()


def abstract_model(config, T):
    model, tokens = Transformer(config), jax.ShapeDtypeStruct((1, T), jnp.int32)
    return model, jax.eval_shape(model.init, jax.random.key(0), tokens), tokens


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("chip", "form"),
    [
        pytest.param(chip, form, marks=() if (chip, form) in ALWAYS else pytest.mark.slow)
        for chip in CHIPS
        for form in ("mha", "mqa")
    ],
)
def test_forward_decode_and_gradient_compile_for_tpu(chip, form):
    config = tiny(attention_form=form, index_fp8=True, kv_fp8=True)
    model, params, tokens = abstract_model(config, 128)
    compiled_for(chip, model.apply, params, tokens)

    cache = jax.eval_shape(lambda: init_cache(config, 1, 256))
    step = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled_for(chip, lambda p, t, c: model.apply(p, t, cache=c)[:2], params, step, cache)

    def loss(params, tokens):
        log_p = jax.nn.log_softmax(model.apply(params, tokens)[0][:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    compiled_for(chip, jax.grad(loss), params, tokens)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=() if chip == "v6e" else pytest.mark.slow) for chip in ALL_CHIPS]
)
def test_experts_compile_for_tpu_and_multiply_each_row_once(chip):
    """At V3.2's sizes, with gradients. `compare` sets the precision "highest", which bfloat16 products do not have."""
    (M, D, F), E = (4096, 7168, 2048), 8
    of = jax.ShapeDtypeStruct

    def loss(rows, weights, sizes):
        return (grouped_matmul(rows, weights, sizes).astype(jnp.float32) ** 2).sum()

    arguments = of((M, D), jnp.bfloat16), of((E, D, F), jnp.bfloat16), of((E,), jnp.int32)
    with jax.default_matmul_precision("highest"):
        compiled = compiled_for(chip, jax.grad(loss, argnums=(0, 1)), *arguments)
    assert compiled.cost_analysis()["flops"] == pytest.approx(6 * M * D * F, rel=0.01)


def attention_layer(config):
    """(function, abstract arguments) of one attention layer, from normalised input to wo."""

    def layer(parameters, x):
        placement, _ = place(jnp.ones(x.shape[:2], jnp.int32), None)
        rope = rotation(placement.positions, config)
        queries, keys = compress(x, rope, placement, parameters, config)
        selected, _ = select_keys(queries, keys, parameters, config)
        return attend(queries, keys, selected, parameters, config)[0]

    return layer, jax.eval_shape(Mla(config).init, jax.random.key(0))["params"]


def test_sparse_attention_of_32768_tokens_stays_below_4_gib():
    """One V3.2 layer: 128 heads, 64 index heads, top 2048. Scores of all heads alone would be 256 GiB."""
    config = deepseek_v32(attention_form="mqa", query_block=256, param_dtype="bfloat16")
    layer, parameters = attention_layer(config)
    x = jax.ShapeDtypeStruct((1, 32768, config.d_model), jnp.bfloat16)
    memory = jax.jit(layer).lower(parameters, x).compile().memory_analysis()
    print(f"temporaries: {memory.temp_size_in_bytes / 2**30:.2f} GiB")
    assert memory.temp_size_in_bytes < 4 * 2**30


@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_one_layer_of_the_released_model_compiles_for_tpu(chip):
    """A whole MoE layer at V3.2's sizes, 4096 tokens, so that the indexer selects 2048 of 4096 keys."""
    config = dataclasses.replace(
        deepseek_v32(attention_form="mqa", param_dtype="bfloat16", n_mtp_layers=0),
        n_layers=1,
        n_dense_layers=0,
        vocab_size=1024,
    )
    model, params, tokens = abstract_model(config, 4096)
    memory = compiled_for(chip, model.apply, params, tokens).memory_analysis()
    print(f"{chip}: temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB")
    assert memory.temp_size_in_bytes < 16 * 2**30
