"""Every array has a sharding, and `shard_map` runs on its parts; test_meshes.py compares results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.config import deepseek_v32, glm5
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.sharding import (
    PartialSum,
    batch_sharding,
    cache_shardings,
    check_mesh,
    make_mesh,
    param_shardings,
    shard_map,
)
from dsa_jax.transformer import Transformer
from tests.train.small import CONFIG as SMALL
from train.config import Lora, dense, sparse
from train.lora import with_adapters
from train.optimizer import group_of, split
from train.step import begin_stage

pytestmark = pytest.mark.devices(8)

CONFIG = dataclasses.replace(SMALL, n_heads=4)


# -- every array has a sharding


def shapes_of(config):
    return jax.eval_shape(
        Transformer(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )


def elements(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def elements_per_device(shapes, shardings):
    parts = jax.tree.map(lambda leaf, where: np.prod(where.shard_shape(leaf.shape)), shapes, shardings)
    return sum(jax.tree.leaves(parts))


@pytest.mark.parametrize("mesh", [{"expert": 2, "tensor": 2}, {"context": 8}, {"expert": 8}, {"tensor": 4}])
@pytest.mark.parametrize("model", [deepseek_v32, glm5])
def test_every_parameter_of_the_released_models_is_sharded_over_all_devices(model, mesh):
    config, mesh = model(), make_mesh(**mesh)
    shapes = shapes_of(config)
    assert elements(shapes) == config.param_count()
    share = elements_per_device(shapes, param_shardings(shapes, config, mesh)) * 8 / elements(shapes)
    # Norms are replicated, and parameters without heads and experts are not sharded over the tensor axis.
    assert share < 1.03


@pytest.mark.parametrize(
    "stage", [dense(1, lr=1.0), sparse(1, lr=1.0, index_lr=1.0)], ids=["dense", "sparse"]
)
def test_optimizer_states_and_adapters_are_sharded_as_their_parameters(stage):
    mesh = make_mesh(expert=2, tensor=2)

    def state():
        params = Transformer(deepseek_v32()).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        if stage.name == "sparse":
            params = with_adapters(params, Lora(rank=16), jax.random.key(1))
        return begin_stage(jnp.int32(0), params, stage)

    shapes = jax.eval_shape(state)
    where = param_shardings(shapes, deepseek_v32(), mesh)
    model = where.opt_state.inner_states["model"].inner_state[1][0]
    parameters = traverse_util.flatten_dict(where.params, sep=".")
    moments = {path for path in model.mu if isinstance(model.mu[path], NamedSharding)}
    assert moments == {path for path in split(shapes.params, stage)[0] if group_of(path) == "model"}
    for path in moments:
        assert parameters[path] == model.mu[path] == model.nu[path], path
    assert model.count.spec == P()
    if stage.name == "sparse":
        adapter = where.params["lora"]["moe_layers"]["ffn"]["experts"]["w_down"]
        assert adapter["a"].spec == P(None, ("expert",), ("tensor",), None)
        assert adapter["b"].spec == P(None, ("expert",), None, ("data", "context"))


def test_an_fp8_weight_is_sharded_at_block_boundaries():
    mesh = make_mesh(tensor=2)
    shape = jax.ShapeDtypeStruct

    def place(n_columns):
        weight = Fp8Weight(
            values=shape((3, 1024, n_columns), jnp.float8_e4m3fn),
            scales=shape((3, 8, -(-n_columns // 128)), jnp.float32),
        )
        return param_shardings({"params": {"moe_layers": {"attn": {"wq_b": weight}}}}, CONFIG, mesh), weight

    for n_columns, per_device in ((512, 256), (384, 384), (320, 320)):
        tree, weight = place(n_columns)
        where = tree["params"]["moe_layers"]["attn"]["wq_b"]
        assert where.values.shard_shape(weight.values.shape) == (3, 256, per_device)
        assert where.scales.shard_shape(weight.scales.shape) == (3, 2, -(-per_device // 128))


def test_a_parameter_that_the_table_does_not_list_is_refused():
    tree = shapes_of(CONFIG)
    tree["params"]["moe_layers"]["attn"]["w_new"] = jax.ShapeDtypeStruct((1, 4, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"params.moe_layers.attn.w_new \(1, 4, 4\) has no row"):
        param_shardings(tree, CONFIG, make_mesh())


def test_a_parameter_of_another_rank_than_the_table_says_is_refused():
    tree = {"params": {"embed": jax.ShapeDtypeStruct((4, 4, 4), jnp.float32)}}
    with pytest.raises(ValueError, match=r"params.embed must have 2 axes, .*, got \(4, 4, 4\)"):
        param_shardings(tree, CONFIG, make_mesh())


@pytest.mark.parametrize(
    ("mesh", "arguments", "message"),
    [
        (
            {"tensor": 8},
            {},
            "n_heads must be a multiple of the mesh's tensor=8, got 4; .*tensor=4 would work",
        ),
        (
            {"expert": 8},
            {"batch": 4},
            "the batch must be a multiple of the mesh's data=1 x expert=8 = 8, got 4; "
            "data=1, expert=4, context=1, tensor=2 would work",
        ),
        (
            {"context": 8},
            {"seq_len": 36},
            "the sequence length .* context=8, got 36; .*context=4, .*would work",
        ),
        ({}, {"batch": 1, "seq_len": 1}, "got 1; .*tensor=4 on 4 of the devices would work"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_one_that_does(mesh, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(CONFIG, make_mesh(**mesh), **arguments)


def test_a_mesh_that_does_not_divide_the_experts_is_refused():
    config = dataclasses.replace(CONFIG, n_routed_experts=4, n_expert_groups=2)
    with pytest.raises(ValueError, match=r"n_routed_experts .* expert=8, got 4; data=2, expert=4"):
        param_shardings(shapes_of(config), config, make_mesh(expert=8))


@pytest.mark.parametrize("axes", [{"data": 3}, {"tensor": 16}, {"data": 0}])
def test_a_mesh_of_another_number_of_devices_is_refused(axes):
    with pytest.raises(ValueError, match=r"the mesh .* has \d+ devices, but there are 8; .* would work"):
        make_mesh(**axes)


def test_batches_and_caches_are_refused_too_when_the_mesh_does_not_divide_them():
    mesh = make_mesh(data=4, context=2)
    with pytest.raises(ValueError, match="the batch .* got 6"):
        cache_shardings(CONFIG, mesh, batch=6)
    with pytest.raises(ValueError, match="the sequence length .* got 31"):
        batch_sharding(CONFIG, mesh, batch=4, seq_len=31)


# -- shard_map


def test_shard_map_runs_on_parts_and_adds_up_partial_sums():
    mesh, x = make_mesh(data=2, tensor=4), jnp.arange(32.0).reshape(4, 8)
    assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    seen = []

    def rows_and_total(x):
        seen.append(x.shape)
        return x.sum(axis=1), x.sum()

    apply = shard_map(
        rows_and_total,
        (("batch", "heads"),),
        (PartialSum(("batch",), over=("heads",)), PartialSum((), over=("batch", "heads"))),
    )
    with jax.set_mesh(mesh):
        assert_equal(jax.jit(apply)(x), (x.sum(axis=1), x.sum()))
        gradient = jax.jit(jax.grad(lambda x: (apply(x)[0] ** 2).sum() + apply(x)[1]))(x)
        assert set(seen) == {(2, 2)}
        assert_equal(jax.jit(apply)(x[:3]), (x[:3].sum(axis=1), x[:3].sum()))  # 3 rows are not sharded
    assert seen[-1] == (3, 2)
    assert_equal(gradient, jnp.broadcast_to(2 * x.sum(axis=1, keepdims=True) + 1, x.shape))
