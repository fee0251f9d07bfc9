"""One step: losses, gradients of what the stage trains, update, router bias."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.config import ModelConfig
from dsa_jax.layers import stacks
from dsa_jax.sharding import param_shardings
from train.config import Stage
from train.lora import adapted
from train.loss import Batch, Counts, Metrics, counts_of, loss_fn
from train.optimizer import Flat, group_of, join, make_optimizer, schedule, split


@flax.struct.dataclass
class TrainState:
    """step: steps done, over all stages. params: {"params": tree} and, with adapters, {"lora": tree}.

    opt_state belongs to one stage; the next stage begins with a new one.
    """

    step: Any
    params: Any
    opt_state: Any


def begin_stage(step: jax.Array, params: Any, stage: Stage) -> TrainState:
    """The first state of a stage: these parameters, and zero moments for those that it trains.

    Raises:
      ValueError: the stage would train a parameter of fewer than 32 bits.
    """
    trained, _ = split(params, stage)
    for path, leaf in trained.items():
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"stage {stage.name!r} trains {path}, which must be float32, got {leaf.dtype}: AdamW's steps are below "
                "half its last bit and would be lost. Load the parameters with param_dtype='float32'"
            )
    return TrainState(step=step, params=params, opt_state=make_optimizer(stage).init(trained))


def train_step(
    state: TrainState,
    batch: Batch,
    config: ModelConfig,
    stage: Stage,
    lora_scale: float = 0.0,
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """(next state, metrics). A step whose loss or gradient is not finite changes only the step count.

    accumulate: the batch is taken in so many equal parts, one after the other. Losses, gradients, metrics and the
    router's bias are those of the whole batch, up to rounding.

    Metrics: those of ``loss_fn``; "grad_norm" and "index_grad_norm" before clipping; "lr", "index_lr";
    "max_load_ratio" [MoE layers], the busiest expert's load over the mean load; and "finite".
    """
    trained, rest = split(state.params, stage)

    def loss_of(trained: Flat, batch: Batch, counts: Counts | None) -> tuple[jax.Array, Metrics]:
        return loss_fn(adapted(join(trained, rest), lora_scale), batch, config, stage, counts)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    (loss, metrics), gradients = _accumulated(gradient_of, trained, batch, accumulate)
    optimizer = make_optimizer(stage)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    new = optax.apply_updates(trained, updates)
    if stage.trains != "indexer":
        rest = move_router_bias(rest, metrics["expert_load"], stage.bias_step, config)

    norms = {
        name: optax.tree.norm({path: g for path, g in gradients.items() if group_of(path) == group})
        for name, group in (("grad_norm", "model"), ("index_grad_norm", "indexer"))
        if stage.trains in (group, "both")
    }
    finite = jnp.isfinite(loss) & jnp.isfinite(sum(norms.values(), jnp.float32(0.0)))
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    count = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")[0][1]
    load = metrics.pop("expert_load").astype(jnp.float32)
    metrics |= norms | {
        "max_load_ratio": load.max(-1) / jnp.maximum(load.mean(-1), 1e-9),
        "lr": schedule(stage.lr, stage)(count),
        "index_lr": schedule(stage.index_lr, stage)(count),
        "finite": finite,
    }
    new_state = TrainState(
        step=state.step + 1,
        params=keep(join(new, rest), state.params),
        opt_state=keep(opt_state, state.opt_state),
    )
    return new_state, metrics


def _accumulated(gradient_of: Callable[..., Any], trained: Flat, batch: Batch, parts: int) -> Any:
    """((loss, metrics), gradients) of the batch, in ``parts`` parts, with sums in float32.

    Part m holds every ``parts``-th row from m on: where rows are spread over devices, each has its share of every part.
    """
    if parts == 1:
        return gradient_of(trained, batch, None)
    counts = counts_of(batch)
    split_rows = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        found = gradient_of(trained, part, counts)
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, found), None

    shapes = jax.eval_shape(gradient_of, trained, jax.tree.map(lambda x: x[0], split_rows), counts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
    sums, _ = jax.lax.scan(add, zeros, split_rows)
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), sums, shapes)


def move_router_bias(flat: Flat, load: jax.Array, bias_step: float, config: ModelConfig) -> Flat:
    """Adds ``bias_step`` to the bias of an expert below the batch's mean load, and subtracts it above.

    load: [MoE layers, E], the MTP layer's last. Source: DeepSeek-V3 report, section 2.1.2.
    """
    load = load.astype(jnp.float32)
    direction = jnp.sign(load.mean(-1, keepdims=True) - load)
    rows = {s.name: np.array(s.layers) - config.n_dense_layers for s in stacks(config) if s.is_moe}
    moved = dict(flat)
    for path, bias in flat.items():
        if group_of(path) == "router_bias":
            stack = path.split(".")[1]  # "params.moe_layers.ffn.gate_bias"
            moved[path] = bias + bias_step * direction[-1 if stack == "mtp" else rows[stack]]
    return moved


@functools.cache
def compiled_step(
    config: ModelConfig, stage: Stage, lora_scale: float, mesh: Mesh | None = None, accumulate: int = 1
) -> jax.stages.Wrapped:
    """``train_step`` of this stage, (state, batch) -> (state, metrics), jitted once for all runs.

    The state is donated. On a mesh the new state has the shardings of the old one, and metrics are replicated.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new_state, metrics = train_step(state, batch, config, stage, lora_scale, accumulate)
        if mesh is None:
            return new_state, metrics
        shardings = param_shardings(state, config, mesh), NamedSharding(mesh, P())
        return jax.lax.with_sharding_constraint((new_state, metrics), shardings)

    return jax.jit(step, donate_argnums=0)
