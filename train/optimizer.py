"""Which parameters a stage trains, and the update: AdamW, one group and one clip for model and indexers each."""

from typing import Any, Literal

import optax
from flax import traverse_util

from train.config import Stage

Group = Literal["model", "indexer", "router_bias"]
Flat = dict[str, Any]  # {"params.moe_layers.attn.wq_a": leaf}


def group_of(path: str) -> Group:
    """The group of the parameter at ``path``; the router's bias moves by a rule of its own."""
    if ".indexer." in path:
        return "indexer"
    return "router_bias" if path.endswith(".gate_bias") else "model"


def split(params: Any, stage: Stage) -> tuple[Flat, Flat]:
    """(what the stage trains, everything else), both flat: {path: leaf}.

    A tree with adapters (train.lora) trains those instead of the matrices; its indexers stay trainable whole.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    adapted = "lora" in params

    def is_trained(path: str) -> bool:
        group = group_of(path)
        if group == "model" and adapted and not path.startswith("lora."):
            return False
        return group in (("model", "indexer") if stage.trains == "both" else (stage.trains,))

    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    return trained, {path: leaf for path, leaf in flat.items() if path not in trained}


def join(*parts: Flat) -> Any:
    """The tree that ``split`` took apart."""
    return traverse_util.unflatten_dict({k: v for part in parts for k, v in part.items()}, sep=".")


def schedule(peak: float, stage: Stage) -> optax.Schedule:
    """Linear rise over lr_warmup steps, then constant or a cosine to ``lr_end`` of the peak."""
    if stage.lr_end is None:
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(stage.steps - stage.lr_warmup, 1), stage.lr_end)
    if not stage.lr_warmup:
        return after
    rise = optax.linear_schedule(peak / stage.lr_warmup, peak, max(stage.lr_warmup - 1, 1))
    return optax.join_schedules([rise, after], [stage.lr_warmup])


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW with DeepSeek-V3's betas (0.9, 0.95); norms and biases do not decay. Works on the flat dict of ``split``.

    The two groups never meet: a clip over both would let L_I change the model's step, which belongs to the
    language modelling loss alone (DeepSeek-V3.2-Exp report, section 2.1).
    """

    def decays(flat: Flat) -> dict[str, bool]:
        names = {path: path.rsplit(".", 1)[-1] for path in flat}
        return {
            path: not any(word in name for word in ("norm", "bias", "scale")) for path, name in names.items()
        }

    def group(peak: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(stage.clip),
            optax.adamw(
                schedule(peak, stage), b1=0.9, b2=0.95, eps=1e-8, weight_decay=stage.weight_decay, mask=decays
            ),
        )

    return optax.multi_transform(
        {"model": group(stage.lr), "indexer": group(stage.index_lr)},
        lambda flat: {path: group_of(path) for path in flat},
    )
