"""Runs transformers' own model, the one to compare with. Needs torch and transformers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dsa_jax.checkpoint.files import read_json_object
from dsa_jax.checkpoint.hf_reader import HfFolder

CLASSES = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}
"""model_type of config.json -> how the names of transformers' classes for it begin. GLM's indexer rotates its keys in
another way, so that the class of the other type runs without a complaint and gives other logits."""


def transformers_reference(
    model_dir: str | Path, tokens: np.ndarray, selected: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Runs a checkpoint folder in PyTorch, in float32 on CPU, with eager attention.

    model_dir: folder with config.json and safetensors files. A folder with a `quantization_config` is
    dequantised by our own reader first. transformers takes the block size from the ratio of the two shapes, so
    it cannot read weights whose rows are no multiple of 128. Every released DeepSeek-V3 checkpoint has them
    (`kv_a_proj_with_mqa`, 576 rows, 5 rows of scales). transformers itself reads every other folder.
    tokens: [B T] ids. Returns the arrays listed in `dsa_jax.parity.compare`.
    selected: another run's arrays. Each layer then attends to that run's "layer{i}.topk" instead of its own
    selection, which is returned all the same.
    Raises ImportError without torch or transformers, FileNotFoundError for a folder without config.json, ValueError for
    a model_type that has no class here and for a folder that does not fill the model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"comparing with transformers needs PyTorch ({error.msg}): pip install 'dsa-jax[parity]'"
        ) from error

    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, and transformers reads Hugging Face folders only: convert it with "
            f"`dsa-jax convert {folder} OUT --format hf` and compare OUT"
        )
    values = read_json_object(folder / "config.json")
    with quiet(transformers):
        config = class_of(values, "Config").from_pretrained(folder)
        model_class = class_of(values, "ForCausalLM")
        if values.get("quantization_config"):
            model = dequantised_model(folder, config, model_class)
        else:
            model = own_loader(folder, config, model_class)
    arrays: dict[str, np.ndarray] = {"input_ids": np.asarray(tokens, np.int64)}
    with capture(model, arrays, selected), torch.no_grad():
        output = model(torch.from_numpy(arrays["input_ids"]), use_cache=False)
    arrays["logits"] = output.logits.float().numpy()
    return arrays


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and advice on standard error: the MTP layer, say, is unknown to transformers."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def class_of(values: Mapping[str, Any], kind: str) -> Any:
    """transformers' class for these values of config.json; kind: "Config" or "ForCausalLM".

    Raises ValueError for a model_type that has none here or in the installed transformers.
    """
    import transformers

    model_type = values.get("model_type")
    if model_type not in CLASSES:
        raise ValueError(
            f"config.json: model_type must be {' or '.join(CLASSES)} to compare with transformers, got {model_type!r}"
        )
    name = CLASSES[model_type] + kind
    if not hasattr(transformers, name):
        raise ValueError(
            f"transformers {transformers.__version__} has no {name} for model_type {model_type}: install a newer one"
        )
    return getattr(transformers, name)


def own_loader(folder: Path, config: Any, model_class: Any) -> Any:
    """The model as transformers reads it."""
    import torch

    model, info = model_class.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"transformers could not fill {sorted(info['missing_keys'])[:5]} and found other shapes for "
            f"{sorted(info['mismatched_keys'])[:5]} in {folder}: the folder is incomplete"
        )
    return model.eval()


def dequantised_model(folder: Path, config: Any, model_class: Any) -> Any:
    """The model, filled with weights that our own reader turned into float32."""
    import torch

    stored = HfFolder(folder)

    def weight(name: str) -> Any:
        if name not in stored.entries:
            raise ValueError(f"{folder} has no tensor '{name}', which transformers' model needs")
        return torch.from_numpy(np.array(stored.read_weight(name), np.float32))

    del config.quantization_config
    model = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            prefix, _, kind = name.rpartition(".")
            if not prefix.endswith(".experts"):
                tensor.copy_(weight(name))
                continue
            # In memory transformers stacks the experts, and puts each gate on top of its up projection.
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
            for expert in range(len(tensor)):
                names = [f"{prefix}.{expert}.{part}.weight" for part in parts]
                tensor[expert].copy_(torch.cat([weight(name) for name in names]))
    return model.eval()


@contextlib.contextmanager
def capture(
    model: Any, arrays: dict[str, np.ndarray], selected: Mapping[str, np.ndarray] | None = None
) -> Iterator[None]:
    """While open, a forward pass of `model` leaves its inner numbers in `arrays`, and attends to `selected`."""
    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(model.model.layers):
            indexer, gate = layer.self_attn.indexer, getattr(layer.mlp, "gate", None)
            hooks = [
                (layer, _keep(arrays, f"layer{i}.out")),
                (layer.self_attn, _keep(arrays, f"layer{i}.attn")),
                (layer.mlp, _keep(arrays, f"layer{i}.mlp")),
            ]
            if indexer is not None:  # a layer without one attends to the keys of the layer before it
                hooks.append((indexer, _keep(arrays, f"layer{i}.topk")))
                recorded = _record_scores(indexer.forward, arrays, f"layer{i}.index_scores")
                stack.enter_context(mock.patch.object(indexer, "forward", recorded))
            if selected is not None and indexer is not None:
                hooks.append((indexer, _replace(selected[f"layer{i}.topk"])))
            if gate is not None:
                hooks += [
                    (gate, _keep(arrays, f"layer{i}.gate_{kind}", at)) for kind, at in (("w", 1), ("i", 2))
                ]
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
        yield


Hook = Callable[[Any, Any, Any], Any]
"""PyTorch's forward hook: (module, inputs, output) -> None, or another output."""


def _keep(arrays: dict[str, np.ndarray], key: str, index: int = 0) -> Hook:
    """A hook that copies the output, or the one of several at this index, into arrays[key]."""

    def hook(module: Any, inputs: Any, output: Any) -> None:
        arrays[key] = _to_numpy(output[index] if isinstance(output, tuple) else output)

    return hook


def _replace(topk: np.ndarray) -> Hook:
    """A hook that returns these indices instead of the module's own."""
    import torch

    # -1 becomes an index that is already in the row: a set does not count it twice.
    indices = torch.from_numpy(np.where(topk < 0, topk.max(-1, keepdims=True), topk))
    return lambda module, inputs, output: indices.to(output.dtype)


def _record_scores(forward: Any, arrays: dict[str, np.ndarray], key: str) -> Any:
    """The indexer returns only indices; its scores are the one tensor on which it calls topk.

    PyTorch does not specify which of several equal scores it takes, and relu makes many of them exactly 0. Here the
    lowest position comes first, as everywhere in this package.
    """
    import torch

    def recorded_topk(scores: Any, k: int, dim: int = -1) -> Any:
        arrays[key] = _to_numpy(scores)
        values, order = torch.sort(scores, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), order.narrow(dim, 0, k)))

    def recorded_forward(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.Tensor, "topk", recorded_topk):
            return forward(*args, **kwargs)

    return recorded_forward


def _to_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()
