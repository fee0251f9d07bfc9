"""The parameters that a run starts from: random or a checkpoint's, with adapters if the run trains those."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.transformer import Transformer
from train.config import Run
from train.lora import with_adapters
from train.placement import RunSharding


def initial_params(run: Run, load: bool = True, sharding: RunSharding | None = None) -> Any:
    """{"params": tree} of ``run.init_from``, or random; with adapters also {"lora": tree}.

    load: False gives random parameters in any case, which is enough for shapes. sharding: where to create or read
    them, each device its own part; None: on one device.
    """
    sharding = sharding or RunSharding(dataclasses.replace(run, mesh=None))
    key, tokens = jax.random.key(run.seed), jnp.zeros((1, 2), jnp.int32)
    init = Transformer(run.model).init
    shardings = sharding.shardings(jax.eval_shape(init, key, tokens))
    if run.init_from and load:
        params = load_params(run.init_from, run.model, shardings=shardings)
    else:
        params = jax.jit(init, out_shardings=shardings)(key, tokens)
    lora = run.lora
    if lora is None:
        return params
    key = jax.random.fold_in(key, 1)
    if sharding.mesh is None:
        return with_adapters(params, lora, key)

    def adapters(params, key):
        return {"lora": with_adapters(params, lora, key)["lora"]}

    shardings = sharding.shardings(jax.eval_shape(adapters, params, key))
    return params | jax.jit(adapters, out_shardings=shardings)(params, key)


def from_checkpoint(run: Run, ignore: tuple[str, ...] = ()) -> Run:
    """The run with the sizes of the model in ``run.init_from``; how to compute stays as the run says.

    ignore: unknown keys of its config.json to accept.
    """
    if run.init_from is None:
        return run
    switches = (
        "attention_form", "index_fp8", "kv_fp8", "implementation", "dtype", "param_dtype", "query_block", "remat",
    )  # fmt: skip
    changes = {name: getattr(run.model, name) for name in switches}
    return dataclasses.replace(run, model=load_config(run.init_from, ignore=ignore, **changes))


def lora_scale(run: Run) -> float:
    """alpha / rank, by which the adapters' product is added; 0 without adapters."""
    return run.lora.alpha / run.lora.rank if run.lora else 0.0
