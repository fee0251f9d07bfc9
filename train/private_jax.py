"""The private and experimental parts of JAX that ``train`` uses: each name, and why no public one will do.

Tried with jax 0.10.2, 0.11.2 and 0.12.0.1. When another release moves a name, this is the only file to change.
"""

from typing import Any, NamedTuple

from jax._src import distributed as _distributed

# Collectives over processes and agreement on SIGTERM: jax.distributed only connects processes.
from jax.experimental.multihost_utils import (
    process_allgather,
    reached_preemption_sync_point,
    sync_global_devices,
)

# The devices of a TPU topology that is not attached: no public module describes them.
from jax.experimental.topologies import get_topology_desc

__all__ = [
    "Connection",
    "connection",
    "get_topology_desc",
    "process_allgather",
    "reached_preemption_sync_point",
    "sync_global_devices",
]


class Connection(NamedTuple):
    """This process's connection to the coordinator. client: of the key-value store that process 0 serves."""

    client: Any
    address: str
    process_id: int
    num_processes: int


def connection() -> Connection:
    """What ``jax.distributed.initialize`` set up. JAX has no public way to the key-value store or the address."""
    state = _distributed.global_state
    return Connection(state.client, state.coordinator_address, state.process_id, state.num_processes)
