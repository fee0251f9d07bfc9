"""Shardings of the arrays that a program is given: parameters, batches and caches."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.cache import Cache
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.sharding.mesh import check_mesh
from dsa_jax.sharding.rules import ShardingRules, axes_of_parameter, divisible_sizes, dotted, rules_in_use


def param_shardings(tree: Any, config: ModelConfig, mesh: Mesh, *, rules: ShardingRules | None = None) -> Any:
    """A NamedSharding for every leaf of ``tree``: arrays or shapes, e.g. ``jax.eval_shape(model.init, key, tokens)``.

    The tree may hold parameters and adapters ({"params": ..., "lora": ...}), weights kept in FP8, and whatever has
    the path of a parameter in its own: optimizer states. Scalars are replicated. rules: None for those in use.

    Raises:
      ValueError: a parameter is not in the table, or the mesh has other axes or does not divide the model
        (``check_mesh``).
    """
    rules = rules or rules_in_use()
    check_mesh(config, mesh, rules=rules)

    def sharding(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Fp8Weight) and leaf.ndim == 0:
            return NamedSharding(mesh, P())
        axes = axes_of_parameter(dotted(path), tuple(leaf.shape))
        where = NamedSharding(mesh, rules.spec(axes, divisible_sizes(leaf), mesh))
        return jax.tree.map(lambda _: where, leaf)

    return jax.tree.map_with_path(sharding, tree, is_leaf=lambda x: isinstance(x, Fp8Weight))


def batch_sharding(
    config: ModelConfig, mesh: Mesh, batch: int, seq_len: int, *, rules: ShardingRules | None = None
) -> NamedSharding:
    """For tokens, targets and segment_ids [B T]. rules: None for those in use.

    Raises:
      ValueError: the mesh has other axes, or does not divide the batch or the sequence.
    """
    rules = rules or rules_in_use()
    check_mesh(config, mesh, batch=batch, seq_len=seq_len, rules=rules)
    return NamedSharding(mesh, P(rules.batch or None, rules.sequence or None))


def cache_shardings(
    config: ModelConfig, mesh: Mesh, batch: int, *, rules: ShardingRules | None = None
) -> Cache:
    """For the cache of ``batch`` rows: sharded over rows only, since every query may read any key of its row.

    rules: None for those in use.

    Raises:
      ValueError: the mesh has other axes, or does not divide the batch.
    """
    rules = rules or rules_in_use()
    check_mesh(config, mesh, batch=batch, rules=rules)
    rows = rules.batch or None
    per_layer, per_row = NamedSharding(mesh, P(None, rows)), NamedSharding(mesh, P(rows))
    return Cache(latent=per_layer, k_rope=per_layer, index_k=per_layer, segment_ids=per_row, length=per_row)
