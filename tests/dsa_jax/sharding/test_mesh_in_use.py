"""Which mesh the model sees: none, ours, or one that it refuses with a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from dsa_jax.config import tiny
from dsa_jax.sharding import (
    AXES,
    PartialSum,
    batch_sharding,
    cache_shardings,
    check_mesh,
    constrain,
    expert_devices,
    gathered,
    gathered_matrix,
    lookup,
    make_mesh,
    param_shardings,
    query_axes,
    shard_map,
)
from dsa_jax.sharding.mesh import mesh_in_use
from dsa_jax.transformer import Transformer

pytestmark = pytest.mark.devices(8)

CONFIG = tiny(n_layers=1, n_dense_layers=1, n_mtp_layers=0, index_topk=4, dtype="float32")
OTHER_AXES = r"the mesh must have the axes data, expert, context, tensor, got .*make_mesh makes one"


def mesh_with(names, shape, types=AxisType.Auto) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), names, axis_types=(types,) * len(names))


@pytest.fixture(scope="module")
def forward():
    """(function of parameters and tokens, parameters, tokens)."""
    model, tokens = Transformer(CONFIG), jnp.arange(8 * 12).reshape(8, 12) % CONFIG.vocab_size
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :2])
    return lambda params, tokens: model.apply(params, tokens)[0], params, tokens


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 5))
    assert mesh_in_use() is None
    assert constrain(x, "batch", "heads") is x
    assert gathered_matrix("head", x) is x
    assert shard_map(lambda x: x, (("batch", "heads"),), ("batch", "heads"))(x) is x
    assert (expert_devices(8), query_axes(8)) == (1, ())


def test_every_use_of_a_mesh_with_other_axes_is_refused():
    x = jnp.ones((8, 8))
    uses = [
        lambda: constrain(x, "batch", None),
        lambda: gathered("attn", {"wo": x}),
        lambda: gathered_matrix("head", x),
        lambda: shard_map(lambda x: x, (("batch", None),), ("batch", None))(x),
        lambda: lookup(x, jnp.zeros((2, 2), jnp.int32), x.dtype),
        lambda: expert_devices(8),
        lambda: query_axes(8),
    ]
    with jax.set_mesh(mesh_with(("data", "model"), (2, 4))):
        for use in uses:
            with pytest.raises(ValueError, match=OTHER_AXES.replace("got .*", "got data, model; .*")):
                use()


def test_the_model_inside_a_mesh_with_other_axes_is_refused(forward):
    f, params, tokens = forward
    with jax.set_mesh(mesh_with(("dp",), (8,))), pytest.raises(ValueError, match=OTHER_AXES):
        jax.jit(f)(params, tokens)


def test_arrays_are_not_placed_on_a_mesh_with_other_axes(forward):
    mesh = mesh_with(("data", "model"), (2, 4))
    for place in (
        lambda: param_shardings(forward[1], CONFIG, mesh),
        lambda: batch_sharding(CONFIG, mesh, 8, 8),
        lambda: cache_shardings(CONFIG, mesh, 8),
        lambda: check_mesh(CONFIG, mesh),
    ):
        with pytest.raises(ValueError, match=OTHER_AXES):
            place()


def test_explicit_axes_are_refused():
    with (
        jax.set_mesh(mesh_with(AXES, (2, 2, 2, 1), AxisType.Explicit)),
        pytest.raises(ValueError, match="must be of the type Auto, got Explicit for data, expert"),
    ):
        constrain(jnp.ones(8), "batch")


def test_inside_a_shard_map_over_all_axes_each_device_computes_alone(forward):
    """Data parallelism of the user's own, with axes of the user's own."""
    f, params, tokens = forward
    for mesh in (mesh_with(("dp",), (8,)), make_mesh(expert=2, tensor=2)):
        rows = P(mesh.axis_names)
        per_device = jax.shard_map(f, mesh=mesh, in_specs=(P(), rows), out_specs=rows, check_vma=False)
        np.testing.assert_allclose(
            jax.jit(per_device)(params, tokens), jax.jit(f)(params, tokens), atol=1e-5, rtol=1e-5
        )


def test_inside_a_shard_map_over_some_of_our_axes_the_model_is_refused():
    def body(x):
        return constrain(x, "batch", None)

    mesh = make_mesh(tensor=2)
    partly = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    with pytest.raises(ValueError, match="inside shard_map over data the model cannot be sharded"):
        jax.jit(partly)(jnp.ones((8, 8)))


def test_an_axis_beside_ours_is_left_alone(forward):
    f, params, tokens = forward
    mesh = mesh_with(("stage", *AXES), (2, 2, 1, 1, 2))
    params_there = jax.device_put(params, param_shardings(params, CONFIG, mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(
            jax.jit(f)(params_there, tokens), jax.jit(f)(params, tokens), atol=1e-5, rtol=1e-5
        )


def test_inside_a_shard_map_over_an_axis_beside_ours_our_axes_are_in_use():
    """Pipeline stages, for one: each computes on its own rows, sharded over our axes."""
    seen, x = [], jnp.arange(64.0).reshape(8, 8)

    def row_sums(x):
        seen.append(x.shape)
        return x.sum(axis=1)

    def stage(x):
        sums = shard_map(row_sums, (("batch", "heads"),), PartialSum(("batch",), over=("heads",)))
        return constrain(sums(constrain(x, "batch", None)) ** 2, "batch")

    stages = jax.shard_map(
        stage, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}, check_vma=False
    )
    with jax.set_mesh(mesh_with(("stage", *AXES), (2, 2, 1, 1, 2))):
        np.testing.assert_array_equal(jax.jit(stages)(x), x.sum(axis=1) ** 2)
        gradient = jax.jit(jax.grad(lambda x: stages(x).sum()))(x)
    assert set(seen) == {(2, 4)}
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(2 * x.sum(axis=1, keepdims=True), x.shape))
