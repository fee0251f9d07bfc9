"""Runs transformers' DeepseekV32ForCausalLM, the model to compare with. Needs torch and transformers."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dsa_jax.checkpoint.hf_reader import HfFolder


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
    Raises ImportError without torch or transformers, ValueError if the folder does not fill the model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"comparing with transformers needs PyTorch ({error.msg}): pip install 'dsa-jax[parity]'"
        ) from error

    folder = Path(model_dir)
    with quiet(transformers):
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            model = dequantised_model(folder)
        else:
            model = own_loader(folder)
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


def own_loader(folder: Path) -> Any:
    """The model as transformers reads it."""
    import torch
    import transformers

    model, info = transformers.DeepseekV32ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"transformers could not fill {sorted(info['missing_keys'])[:5]} and found other shapes for "
            f"{sorted(info['mismatched_keys'])[:5]} in {folder}: the folder is incomplete"
        )
    return model.eval()


def dequantised_model(folder: Path) -> Any:
    """The model, filled with weights that our own reader turned into float32."""
    import torch
    import transformers

    stored = HfFolder(folder)

    def weight(name: str) -> Any:
        if name not in stored.entries:
            raise ValueError(f"{folder} has no tensor '{name}', which transformers' model needs")
        return torch.from_numpy(np.array(stored.read_weight(name), np.float32))

    config = transformers.DeepseekV32Config.from_pretrained(folder)
    del config.quantization_config
    model = transformers.DeepseekV32ForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
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
                (layer.self_attn, _keep(arrays, f"layer{i}.attn", 0)),
                (layer.mlp, _keep(arrays, f"layer{i}.mlp")),
                (indexer, _keep(arrays, f"layer{i}.topk")),
            ]
            if selected is not None:
                hooks.append((indexer, _replace(selected[f"layer{i}.topk"])))
            if gate is not None:
                hooks += [
                    (gate, _keep(arrays, f"layer{i}.gate_{kind}", at)) for kind, at in (("w", 1), ("i", 2))
                ]
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            recorded = _record_scores(indexer.forward, arrays, f"layer{i}.index_scores")
            stack.enter_context(mock.patch.object(indexer, "forward", recorded))
        yield


Hook = Callable[[Any, Any, Any], Any]
"""PyTorch's forward hook: (module, inputs, output) -> None, or another output."""


def _keep(arrays: dict[str, np.ndarray], key: str, index: int | None = None) -> Hook:
    """A hook that copies the output, or one of the outputs, into arrays[key]."""

    def hook(module: Any, inputs: Any, output: Any) -> None:
        arrays[key] = _to_numpy(output if index is None else output[index])

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
