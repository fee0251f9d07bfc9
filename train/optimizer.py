"""Which parameters a stage trains, and their update: AdamW with a group and a clip each for model and indexers.

``decay_mask`` also serves a loop of your own: ``optax.adamw(..., mask=decay_mask)``; see ``train``'s docstring.
"""

import functools
from typing import Any, Literal

import jax
import optax
from flax import traverse_util

from train.config import Stage

Group = Literal["model", "indexer", "router_bias"]
Trains = Literal["model", "indexer", "both"]
Flat = dict[str, Any]  # {"params.moe_layers.attn.wq_a": leaf}


def group_of(path: str) -> Group:
    """The group of the parameter at ``path``. The router's bias is in none that an optimizer updates."""
    if ".indexer." in path:
        return "indexer"
    return "router_bias" if path.endswith(".gate_bias") else "model"


def trained_groups(trains: Trains) -> tuple[Group, ...]:
    """The groups that a loss of this kind reaches: the model by CE, the indexers by the index loss L_I."""
    return ("model", "indexer") if trains == "both" else (trains,)


def decay_mask(params: Any, trains: Trains = "both") -> Any:
    """True for each parameter that weight decay shrinks: the matrices of the groups that the loss reaches.

    Norms, biases and the router's bias never decay. A group without a gradient must not either, or decay alone would
    change it: give trains="model" for a loss without the index loss L_I, "indexer" for L_I alone.

    params: the tree of ``Transformer.init``, a part of it, or the flat dict of ``split``; arrays or shapes.
    """

    def decays(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_vector = any(word in name.rsplit(".", 1)[-1] for word in ("norm", "bias", "scale"))
        return not is_vector and group_of(f".{name}") in trained_groups(trains)

    return jax.tree_util.tree_map_with_path(decays, params)


def split(params: Any, stage: Stage) -> tuple[Flat, Flat]:
    """(what the stage trains, everything else), both flat: {path: leaf}.

    In a tree with adapters (train.lora) these train instead of the matrices; indexers still train whole.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    adapted = "lora" in params

    def is_trained(path: str) -> bool:
        group = group_of(path)
        if group == "model" and adapted and not path.startswith("lora."):
            return False
        return group in trained_groups(stage.trains)

    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    return trained, {path: leaf for path, leaf in flat.items() if path not in trained}


def join(*parts: Flat) -> Any:
    """The tree that ``split`` took apart."""
    return traverse_util.unflatten_dict({k: v for part in parts for k, v in part.items()}, sep=".")


def schedule(peak: float, stage: Stage) -> optax.Schedule:
    """Linear rise over lr_warmup steps, then constant, or a cosine down to ``lr_end`` times the peak."""
    if stage.lr_end is None:
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(stage.steps - stage.lr_warmup, 1), stage.lr_end)
    if not stage.lr_warmup:
        return after
    rise = optax.linear_schedule(peak / stage.lr_warmup, peak, max(stage.lr_warmup - 1, 1))
    return optax.join_schedules([rise, after], [stage.lr_warmup])


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW with DeepSeek-V3's betas (0.9, 0.95), weight decay by ``decay_mask``. Works on the flat dict of ``split``.

    Each group has its own clip by global norm. With one clip over both, L_I would change the model's step, which
    belongs to the language modelling loss alone (DeepSeek-V3.2-Exp report, section 2.1).
    """
    mask = functools.partial(decay_mask, trains=stage.trains)

    def group(peak: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(stage.clip),
            optax.adamw(
                schedule(peak, stage),
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                weight_decay=stage.weight_decay,
                mask=mask,
                mu_dtype=stage.first_moment,
            ),
        )

    return optax.multi_transform(
        {"model": group(stage.lr), "indexer": group(stage.index_lr)},
        lambda flat: {path: group_of(path) for path in flat},
    )
