"""How the layers are stacked: equal layers share one array per parameter, and one scan runs them.

A layer with an indexer and the layers after it that reuse its selection form a group. Consecutive equal groups are one
scan, whose step runs a whole group: the selection never leaves a step. In a model without shared layers every group is
one layer, so there is a scan of dense layers and one of MoE layers.
"""

import functools
import itertools
from dataclasses import dataclass

from dsa_jax.config import ModelConfig


@dataclass(frozen=True)
class Stack:
    """Equal layers whose parameters are stacked under ``name``, first axis in the order of ``layers``."""

    name: str
    layers: range
    is_moe: bool
    has_indexer: bool


@functools.lru_cache(maxsize=8)
def scans(config: ModelConfig) -> tuple[tuple[Stack, ...], ...]:
    """The scans in order; step i runs layer ``layers[i]`` of each of its stacks, in order.

    Only the first stack of a scan has indexers. A stack of all dense layers is called "dense_layers", one of all MoE
    layers "moe_layers"; where there are several, the number of its first layer follows: "moe_layers_6".
    """
    full = set(config.full_layers)
    kinds = [(layer >= config.n_dense_layers, layer in full) for layer in range(config.n_layers)]
    starts = [*config.full_layers, config.n_layers]
    groups = [tuple(kinds[start:stop]) for start, stop in itertools.pairwise(starts)]

    runs, first = [], 0  # (numbers of the layers, (is_moe, has_indexer)) of each stack, scan by scan
    for group, equal in itertools.groupby(groups):
        stop = first + len(group) * len(list(equal))
        runs.append([(range(first + i, stop, len(group)), kind) for i, kind in enumerate(group)])
        first = stop

    n_stacks = {moe: sum(kind[0] == moe for run in runs for _, kind in run) for moe in (False, True)}

    def name(layers: range, is_moe: bool) -> str:
        kind = "moe_layers" if is_moe else "dense_layers"
        return kind if n_stacks[is_moe] == 1 else f"{kind}_{layers.start}"

    return tuple(tuple(Stack(name(layers, kind[0]), layers, *kind) for layers, kind in run) for run in runs)


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """The stacks of all scans, in order."""
    return tuple(itertools.chain.from_iterable(scans(config)))
