"""`make demo`: the whole model on a small checkpoint, without PyTorch and without a download.

Writes a checkpoint in the released FP8 layout, reads it back, checks that sparse attention equals dense
attention where it must, generates through the sparse path, and draws what the indexer selected. With random
weights the text and the picture mean nothing; the checks do.
"""

import dataclasses
import shutil
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from dsa_jax.checkpoint import load_config, load_params, write_hf
from dsa_jax.compare import max_difference, run_ours
from dsa_jax.config import ModelConfig, tiny
from dsa_jax.generate import generate
from dsa_jax.transformer import Transformer

RUN_DIR = Path("runs/demo")
EXACT = 5e-5  # float32 rounding, several layers deep
NEW_TOKENS = 24


def find_checkpoint(run_dir: Path) -> tuple[Path, bool]:
    """(folder, whether it is trained): dsa_jax/nano if it is there, else a new one of random weights."""
    trained = Path(str(resources.files("dsa_jax"))) / "nano"
    if (trained / "config.json").is_file():
        return trained, True
    folder = run_dir / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    config = tiny()
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    write_hf(folder, params, config, quantize="fp8", max_shard_bytes=4_000_000)
    return folder, False


def logits_of(params: Any, config: ModelConfig, tokens: np.ndarray, **switches: Any) -> np.ndarray:
    """[B T V] logits of one forward pass with these switches."""
    model = Transformer(dataclasses.replace(config, **switches))
    with jax.default_matmul_precision("highest"):
        logits, _, _ = jax.jit(model.apply)(params, jnp.asarray(tokens, jnp.int32))
    return np.asarray(logits)


def draw_selection(arrays: dict[str, np.ndarray], config: ModelConfig, path: Path, title: str) -> None:
    """Draws, for the first sequence, which keys every query selected: one panel per layer, as a PNG."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = {"selected, so read": "#1f4e9c", "earlier, not read": "#dbe3ee", "in the future": "#ffffff"}
    selected, visible, future = range(3)
    columns = min(config.n_layers, 4)
    rows = -(-config.n_layers // columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * rows + 1.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for layer, panel in enumerate(panels):
        if layer >= config.n_layers:
            panel.set_visible(False)
            continue
        indices = arrays[f"layer{layer}.topk"][0]
        n_tokens = len(indices)
        image = np.where(np.tril(np.ones((n_tokens, n_tokens), bool)), visible, future)
        for query, keys in enumerate(indices):
            image[query, keys[keys >= 0]] = selected
        panel.imshow(image, cmap=ListedColormap(list(colors.values())), vmin=0, vmax=2)
        panel.set_title(f"layer {layer}")
        panel.set_xlabel("key position (the token that is read)")
    for panel in panels[::columns]:
        panel.set_ylabel("query position (the token that reads)")
    patches = [Patch(facecolor=color, edgecolor="#888888", label=label) for label, color in colors.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Runs the demonstration; returns 1 if one of its checks fails."""
    console = Console(highlight=False)
    started = time.perf_counter()
    console.rule("DeepSeek-V3.2 in JAX: a small model through sparse attention")
    folder, trained = find_checkpoint(RUN_DIR)
    config = load_config(folder, n_mtp_layers=0, dtype="float32", param_dtype="float32")
    params = load_params(folder, config)
    shards = sorted(folder.glob("*.safetensors"))
    stored = sum(path.stat().st_size for path in shards)
    console.print(
        f"read {config.param_count():,} parameters from {len(shards)} safetensors files in {folder} "
        f"({stored / 1e6:.1f} MB{', FP8 blocks of 128 x 128' if config.fp8 else ''})"
    )
    if not trained:
        console.print("the weights are random: the numbers below are real, the text is not")

    top_k = config.index_topk
    length = min(10 * top_k, config.max_seq_len - NEW_TOKENS)
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (1, length))
    short = tokens[:, :top_k]
    checks: list[tuple[str, str, bool]] = []

    # Gathered keys against masked heads. The run is captured because a model that is not asked for its
    # selection skips it when it covers all keys.
    gathered = run_ours(params, dataclasses.replace(config, attention_form="mqa"), short)["logits"]
    dense = logits_of(params, config, short, attention="dense", attention_form="mha")
    short_difference = max_difference(gathered, dense)
    checks.append(
        (
            f"{top_k} tokens, index_topk {top_k}: every key is selected, sparse equals dense",
            f"logits differ by {short_difference:.1e}",
            short_difference <= EXACT,
        )
    )
    arrays = run_ours(params, config, tokens)
    long_difference = max_difference(arrays["logits"], logits_of(params, config, tokens, attention="dense"))
    checks.append(
        (
            f"{length} tokens: keys are left out, sparse differs from dense",
            f"logits differ by {long_difference:.1e}",
            long_difference > 100 * EXACT,
        )
    )

    before = time.perf_counter()
    (new_tokens,) = generate(params, config, [tokens[0].tolist()], max_new_tokens=NEW_TOKENS)
    seconds = time.perf_counter() - before
    continued = np.concatenate([tokens[0], new_tokens])[None]
    expected = logits_of(params, config, continued)[0, length - 1 : -1].argmax(-1)
    checks.append(
        (
            f"{len(new_tokens)} tokens generated one by one from the cache equal one pass without a cache",
            f"{(expected == new_tokens).mean():.0%} of the tokens agree",
            bool((expected == new_tokens).all()),
        )
    )

    table = Table("check", "measured", "", title="in float32")
    for name, measured, passed in checks:
        table.add_row(name, measured, "[green]ok" if passed else "[bold red]FAILED")
    console.print(table)
    console.print(f"generated in {seconds:.1f} s, compilation included: {new_tokens}")

    picture = RUN_DIR / "selection.png"
    draw_selection(
        arrays,
        config,
        picture,
        f"Sparse attention: each token reads at most {top_k} of the up to {length} tokens it may see\n"
        f"({'trained' if trained else 'random'} weights)",
    )
    console.print(f"picture of what the indexer selected: [bold]{picture}")
    console.print(
        "\nwhat to try next\n"
        f"  .venv/bin/dsa-jax generate --model {folder} --token-ids 5,6,7 --max-new-tokens 16\n"
        "  .venv/bin/dsa-jax generate --help      the same for a model of your own\n"
        "  .venv/bin/dsa-jax compare --help       our numbers beside PyTorch's, layer by layer\n"
        "  make test",
        soft_wrap=True,
    )
    console.print(f"done in {time.perf_counter() - started:.0f} s")
    return 0 if all(passed for _, _, passed in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
