"""The sharding rules are a value: other rules give other shardings and the same numbers, in jitted functions too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsa_jax.sharding import (
    RULES,
    ShardingRules,
    batch_sharding,
    cache_shardings,
    check_mesh,
    constrain,
    expert_devices,
    make_mesh,
    param_shardings,
    query_axes,
    rules_in_use,
    use_rules,
)
from dsa_jax.transformer import Transformer
from tests.train.small import CONFIG as SMALL
from tests.train.small import T, batch_of

CONFIG = dataclasses.replace(SMALL, n_heads=4, query_block=4, index_topk=8)
OTHER_RULES = {
    "parameters replicated": dataclasses.replace(RULES, fsdp=(), fsdp_of_experts=()),
    "experts not sharded, tensor axis for rows": ShardingRules(
        batch=("data", "tensor"), rows=("data", "tensor"), queries=("context",), heads=(), ff=(), vocab=(), experts=(),
        fsdp=("data", "expert", "context", "tensor"), fsdp_of_experts=("data", "tensor"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ("model",)}, r"heads must be different mesh axes of data, expert, context, tensor, got"),
        ({"heads": ("tensor", "tensor")}, r"heads must be different mesh axes"),
        ({"experts": ("expert", "data")}, r"experts must be \(\) or \('expert',\), got"),
        ({"sequence": ("data",)}, r"batch and sequence are sharded at the same time, .* both have data"),
        ({"fsdp": ("data", "tensor")}, r"fsdp.* must not share a mesh axis; both have tensor"),
        ({"rows": ("data", "expert")}, r"rows and experts .* both have expert"),
    ],
)
def test_rules_that_contradict_themselves_or_the_mesh_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RULES, **changes)


def test_the_default_rules_are_in_use_until_others_are():
    other = dataclasses.replace(RULES, fsdp=())
    assert rules_in_use() == RULES == ShardingRules()
    with use_rules(other):
        assert rules_in_use() == other
        with use_rules(RULES):
            assert rules_in_use() == RULES
        assert rules_in_use() == other
    assert rules_in_use() == RULES


@pytest.mark.devices(8)
def test_rules_are_an_argument_or_those_in_use():
    mesh = make_mesh(expert=2, tensor=2)
    shapes = {"params": {"embed": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    other = dataclasses.replace(RULES, batch=("expert",), fsdp=("context", "data"))

    def placed(**rules):
        return (
            param_shardings(shapes, CONFIG, mesh, **rules)["params"]["embed"].spec,
            batch_sharding(CONFIG, mesh, 4, T, **rules).spec,
            cache_shardings(CONFIG, mesh, 4, **rules).latent.spec,
        )

    expected = (
        P(None, ("context", "data")), P(("expert",), ("context",)), P(None, ("expert",)),
    )  # fmt: skip
    default = placed()
    assert placed(rules=other) == expected != default
    with use_rules(other):
        assert placed() == expected
        assert placed(rules=RULES) == default


@pytest.mark.devices(8)
def test_a_mesh_is_checked_against_the_rules():
    config, mesh = dataclasses.replace(CONFIG, n_heads=2), make_mesh(tensor=4)
    with pytest.raises(ValueError, match="n_heads must be a multiple of the mesh's tensor=4, got 2"):
        check_mesh(config, mesh)
    check_mesh(config, mesh, rules=dataclasses.replace(RULES, heads=()))
    rows_over_tensor = ShardingRules(batch=("tensor",), queries=("context",), heads=(), ff=(), vocab=())
    with pytest.raises(ValueError, match="the batch must be a multiple of the mesh's tensor=4, got 6"):
        check_mesh(config, mesh, batch=6, rules=rows_over_tensor)


@pytest.mark.devices(8)
def test_a_jitted_function_is_traced_again_under_other_rules():
    traced = []

    @jax.jit
    def f(x):
        traced.append(rules_in_use())
        return constrain(x + 1, "batch", "heads")

    other = dataclasses.replace(RULES, heads=())
    with jax.set_mesh(make_mesh(expert=2, tensor=2)):
        shapes = []
        for rules in (RULES, other, RULES, other):
            with use_rules(rules):
                shapes.append(f(jnp.ones((8, 8))).sharding.shard_shape((8, 8)))
    assert shapes == [(2, 4), (2, 8)] * 2
    assert traced == [RULES, other]


@pytest.mark.devices(8)
def test_experts_are_dispatched_only_where_the_rules_shard_them():
    with jax.set_mesh(make_mesh(expert=4)):
        assert (expert_devices(8), query_axes(T)) == (4, ())
        for changes in ({"experts": ()}, {"batch": ("data",)}):
            with use_rules(dataclasses.replace(RULES, **changes)):
                assert expert_devices(8) == 1


def outputs(params, tokens):
    logits, _, aux = Transformer(CONFIG).apply(params, tokens, capture=("topk_indices",))
    return logits, aux["topk_indices"]


@pytest.mark.devices(8)
@pytest.mark.parametrize("rules", OTHER_RULES.values(), ids=OTHER_RULES.keys())
def test_other_rules_give_other_shardings_and_the_same_numbers(rules):
    tokens, mesh = batch_of([20, 9], [T], [5, 20], [31])["tokens"], make_mesh(expert=2, context=2, tensor=2)
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens[:1, :2])
    alone, chosen_alone = jax.jit(outputs)(params, tokens)
    where = param_shardings(params, CONFIG, mesh, rules=rules)
    assert where != param_shardings(params, CONFIG, mesh)
    with jax.set_mesh(mesh), use_rules(rules):
        logits, chosen = jax.jit(outputs, in_shardings=(where, batch_sharding(CONFIG, mesh, *tokens.shape)))(
            jax.device_put(params, where), tokens
        )
    np.testing.assert_array_equal(chosen, chosen_alone)
    np.testing.assert_allclose(logits, alone, atol=1e-5 * np.abs(alone).max())
