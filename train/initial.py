"""The parameters that a run starts from: random or a checkpoint's, with adapters if the run trains those."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.transformer import Transformer
from train.config import Run
from train.data.provenance import check_tokenizers, with_data_recorded
from train.lora import with_adapters
from train.optimizer import group_of, trained_groups
from train.placement import RunSharding

# Of ModelConfig: how a model is computed. The other fields are sizes, which a checkpoint decides.
SWITCHES = (
    "attention_form", "index_fp8", "kv_fp8", "implementation", "dtype", "param_dtype", "query_block", "remat",
)  # fmt: skip


def initial_params(run: Run, load: bool = True, sharding: RunSharding | None = None) -> Any:
    """{"params": tree} of ``run.init_from``, or random; with adapters also {"lora": tree}.

    What a stage of the run trains is float32 whatever ``run.model.param_dtype`` says, which is the dtype of the rest:
    in bfloat16 a step of AdamW is less than half the last bit of most weights, and would be lost.

    load: False gives random parameters in any case, which is enough for shapes. sharding: where to create or read
    them, each device its own part; None: on one device.
    """
    sharding = sharding or RunSharding(dataclasses.replace(run, mesh=None))
    key, tokens = jax.random.key(run.seed), jnp.zeros((1, 2), jnp.int32)
    trained, lora = {group for stage in run.stages for group in trained_groups(stage.trains)}, run.lora
    whole = "model" in trained and lora is None
    model = dataclasses.replace(run.model, param_dtype="float32") if whole else run.model
    init = Transformer(model).init
    shardings = sharding.shardings(jax.eval_shape(init, key, tokens))
    if run.init_from and load:
        params = load_params(run.init_from, model, shardings=shardings)
    else:
        params = jax.jit(init, out_shardings=shardings)(key, tokens)
    if "indexer" in trained:
        params = jax.tree.map_with_path(_indexer_in_float32, params)
    if lora is None:
        return params
    key = jax.random.fold_in(key, 1)
    if sharding.mesh is None:
        return with_adapters(params, lora, key)

    def adapters(params, key):
        return {"lora": with_adapters(params, lora, key)["lora"]}

    shardings = sharding.shardings(jax.eval_shape(adapters, params, key))
    return params | jax.jit(adapters, out_shardings=shardings)(params, key)


def _indexer_in_float32(path: Any, leaf: jax.Array) -> jax.Array:
    group = group_of(jax.tree_util.keystr(path, simple=True, separator="."))
    return leaf.astype(jnp.float32) if group == "indexer" else leaf


def from_checkpoint(run: Run, ignore: tuple[str, ...] = ()) -> Run:
    """The run with the sizes of the model in ``run.init_from``; how to compute stays as the run says.

    ignore: unknown keys of its config.json to accept.
    """
    if run.init_from is None:
        return run
    changes = {name: getattr(run.model, name) for name in SWITCHES}
    return dataclasses.replace(run, model=load_config(run.init_from, ignore=ignore, **changes))


def checked(run: Run) -> Run:
    """The run as it starts: its final model takes its rows, and its data are recorded and have the model's tokens.

    Raises:
      ValueError: they do not; see ``Run.check_rows`` and ``train.data.provenance``.
    """
    run.check_rows()
    check_tokenizers(run)
    return with_data_recorded(run)


def lora_scale(run: Run) -> float:
    """alpha / rank, by which the adapters' product is added; 0 without adapters."""
    return run.lora.alpha / run.lora.rank if run.lora else 0.0
