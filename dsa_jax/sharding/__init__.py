"""How the model is sharded over devices, on one page.

Nothing here is needed on one device. ``with jax.set_mesh(make_mesh(...))`` around the jitted calls turns it on. (The
deprecated ``with mesh:`` does not: JAX does not show it to the code inside.) Results match one device up to summation
order. The four axes of the mesh, outermost first:

    data      rows of the batch; every parameter is sharded over it too and gathered for use (FSDP)
    expert    routed experts; outside of them, more rows of the batch
    context   queries of one row; keys are exchanged as latents (C + R + J values per token), never expanded
    tensor    heads, hidden width of the feed-forward layers, vocabulary; for the indexer, more queries

Arrays have logical axes ("batch", "heads", ...), and ``ShardingRules`` maps those to mesh axes:

    rules.py        the rules as a value, RULES by default, use_rules for others; logical axes of every parameter
    mesh.py         make_mesh, check_mesh; which mesh is in use, and what is refused: a mesh with other axes, for one
    placement.py    shardings of what a program is given: parameters, batches, caches
    constraints.py  layouts inside the model: activations, parameters while a layer uses them
    per_device.py   functions that run on each device's part: shard_map, embedding lookup
    zigzag.py       load-balanced context parallelism
"""

from dsa_jax.sharding.constraints import as_stored, constrain, gathered, gathered_matrix
from dsa_jax.sharding.mesh import check_mesh, make_mesh, mesh_text, meshes_of
from dsa_jax.sharding.per_device import PartialSum, expert_devices, lookup, query_axes, shard_map
from dsa_jax.sharding.placement import batch_sharding, cache_shardings, param_shardings
from dsa_jax.sharding.rules import AXES, EXPERT_AXIS, RULES, ShardingRules, rules_in_use, use_rules

__all__ = [
    "AXES", "EXPERT_AXIS", "RULES", "PartialSum", "ShardingRules", "as_stored", "batch_sharding", "cache_shardings",
    "check_mesh", "constrain", "expert_devices", "gathered", "gathered_matrix", "lookup", "make_mesh", "mesh_text",
    "meshes_of", "param_shardings", "query_axes", "rules_in_use", "shard_map", "use_rules",
]  # fmt: skip
