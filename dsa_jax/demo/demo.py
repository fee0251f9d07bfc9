"""`make demo`: the small trained model in dsa_jax/nano continues a Python file, without PyTorch or a download.

    python -m dsa_jax.demo [FILE] [--new-tokens N]

Shows that sparse attention equals dense attention where it must and how close it is elsewhere, that decoding from
the cache equals one pass without a cache, the speed of both attentions by length, and what the indexer selects
(two pictures in runs/demo).
"""

import argparse
import dataclasses
import re
import statistics
import sys
import time
import webbrowser
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.commands.cli import encode, read_tokenizer
from dsa_jax.config import ModelConfig
from dsa_jax.demo.pictures import draw_reading, draw_selection
from dsa_jax.generate import Sampling, generate
from dsa_jax.parity.compare import log_softmax, max_difference
from dsa_jax.transformer import Transformer

NANO = Path(str(resources.files("dsa_jax"))) / "nano"
RUN_DIR = Path("runs/demo")
DEFAULT_FILE = Path(webbrowser.__file__)  # of the standard library, but held out when the model was trained
ROW = 2048  # tokens of the file that are read
LENGTHS = (512, 1024, ROW, 4096)
EXACT = 5e-5  # float32 rounding, several layers deep
SAMPLING = Sampling(temperature=0.8, top_p=0.9, seed=1)

Attention = Literal["dense", "sparse"]
ATTENTIONS: tuple[Attention, ...] = ("dense", "sparse")


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights in float32 without the MTP layer, and programs for whole rows, compiled as they are needed."""

    params: Any
    config: ModelConfig
    tokenizer: Any
    programs: dict[tuple[Attention, int], Any] = dataclasses.field(default_factory=dict)

    def run(self, attention: Attention, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """[T] tokens -> logits [T V], and the selected keys [L T K] of sparse attention."""
        logits, chosen = self.program(attention, len(tokens))(self.params, tokens)
        return np.asarray(logits), None if chosen is None else np.asarray(chosen)

    def program(self, attention: Attention, length: int) -> Any:
        if (attention, length) not in self.programs:
            model = Transformer(dataclasses.replace(self.config, attention=attention))
            names = ("topk_indices",) if attention == "sparse" else ()

            def run(params, tokens):
                logits, _, aux = model.apply(params, tokens[None], capture=names)
                return logits[0], aux["topk_indices"][:, 0] if names else None

            with jax.default_matmul_precision("highest"):
                lowered = jax.jit(run).lower(self.params, jax.ShapeDtypeStruct((length,), jnp.int32))
                self.programs[attention, length] = lowered.compile()
        return self.programs[attention, length]


def load(folder: Path = NANO) -> Model:
    config = load_config(folder, n_mtp_layers=0, dtype="float32", param_dtype="float32")
    return Model(load_params(folder, config), config, read_tokenizer(folder))


def read_python(path: Path) -> str:
    """Raises ValueError, one sentence, when the file cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: byte {error.start} is not UTF-8 text") from error


def cut(text: str, tokenizer: Any, limit: int) -> str:
    """The beginning of the text, at most ``limit`` tokens, up to the end of a line `def ...:` if there is one.

    The line break stays out: the model's tokens join it to the spaces that follow.
    """
    offsets = tokenizer.encode(text).offsets
    if len(offsets) <= limit:
        return text.rstrip()
    end = offsets[limit][0]
    heads = [head.end() for head in re.finditer(r"^[ \t]*(?:async )?def .*:(?=\n)", text[:end], re.MULTILINE)]
    return text[: heads[-1]] if heads else text[:end].rstrip()


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean nats per target; logits [T V], targets [T]."""
    return float(-log_softmax(logits)[np.arange(len(targets)), targets].mean())


def agreement(model: Model, tokens: np.ndarray) -> tuple[Table, list[tuple[str, bool]], np.ndarray]:
    """Dense beside sparse attention on one file: a table, the checks (name, passed), the selected keys [L T K].

    tokens: [T], at most ROW. Behind them the row is filled up, which they do not see.
    """
    K, last = model.config.index_topk, len(tokens) - 1
    row = np.zeros(ROW, np.int32)
    row[: len(tokens)] = tokens
    dense, _ = model.run("dense", row)
    sparse, chosen = model.run("sparse", row)
    assert chosen is not None
    parts = {f"the first {K} tokens": slice(0, K), f"the {last - K:,} after them": slice(K, last)}
    difference = [max_difference(sparse[part], dense[part]) for part in parts.values()]
    lines = {
        "keys that a token reads": ["all it may see", f"{K} of up to {last:,}"],
        "largest difference of a logit": [f"{value:.1e}" for value in difference],
        "same most likely next token": [
            f"{(sparse[part].argmax(-1) == dense[part].argmax(-1)).mean():.1%}" for part in parts.values()
        ],
    }
    for name, logits in (("dense", dense), ("sparse", sparse)):
        lines[f"cross entropy, {name}, nats"] = [
            f"{cross_entropy(logits[part], tokens[1:][part]):.4f}" for part in parts.values()
        ]
    table = Table("float32", *parts, title="sparse against dense attention")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    checks = [
        (f"with at most {K} keys to see, sparse equals dense within {EXACT:.0e}", difference[0] <= EXACT),
        ("with more, keys are left out: sparse differs", difference[1] > 100 * EXACT),
    ]
    return table, checks, chosen[:, : len(tokens)]


def reading(model: Model, prompt: tuple[int, ...], new: list[int]) -> tuple[bool, np.ndarray]:
    """Whether one pass without a cache predicts ``new``, and in how many layers the prompt's last token reads each."""
    row = np.zeros(ROW, np.int32)
    row[: len(prompt) + len(new)] = [*prompt, *new]
    logits, chosen = model.run("sparse", row)
    assert chosen is not None
    predicted = logits[len(prompt) - 1 :][: len(new)].argmax(axis=-1)
    read = chosen[:, len(prompt) - 1]
    counts = np.bincount(read[read >= 0], minlength=len(prompt))
    return bool((predicted == new).all()), counts


def speed(model: Model, tokens: np.ndarray, lengths: tuple[int, ...] = LENGTHS) -> Table:
    """Tokens per second of one pass over a row, logits included: the median of up to five runs."""
    device = jax.devices()[0]
    where = "this CPU" if device.platform == "cpu" else device.device_kind
    table = Table(title=f"speed on {where}")
    for name in ("tokens", "dense, tokens/s", "sparse, tokens/s", "keys a token reads", "of"):
        table.add_column(name, justify="right")
    for length in lengths:
        row = np.resize(tokens, length).astype(np.int32)
        rates = []
        for attention in ATTENTIONS:
            program = model.program(attention, length)
            seconds: list[float] = []
            while len(seconds) < 5 and sum(seconds) < 2.0:
                before = time.perf_counter()
                jax.block_until_ready(program(model.params, row))
                seconds.append(time.perf_counter() - before)
            rates.append(f"{length / statistics.median(seconds):,.0f}")
        visible = np.arange(1, length + 1)
        read = np.minimum(visible, model.config.index_topk)
        table.add_row(f"{length:,}", *rates, f"{read.mean():,.0f}", f"{visible.mean():,.0f}")
    return table


def continue_file(
    model: Model, file: Path, text: str, new_tokens: int, console: Console
) -> tuple[str, tuple[int, ...], list[int]]:
    """Prints what the model writes behind the beginning of the text.

    Returns that beginning, its tokens, and the greedy continuation, which is less varied but can be checked.
    """
    config, tokenizer = model.config, model.tokenizer
    begin = cut(text, tokenizer, ROW - new_tokens - 1)
    prompt = encode(begin, tokenizer, config)
    continuations = []
    with console.status("continuing the file"):
        for sampling in (SAMPLING, Sampling()):
            continuations += generate(
                model.params, config, [prompt], max_new_tokens=new_tokens, sampling=sampling,
                stop_tokens=config.eos_token_ids,
            )  # fmt: skip
    sampled, greedy = continuations
    console.print(
        f"\n{file}, up to line {len(begin.splitlines())} ({len(prompt):,} tokens):\n", soft_wrap=True
    )
    last_lines = "\n".join(f"  | {line}" for line in begin.splitlines()[-12:])
    console.print(Text(last_lines, style="dim"), soft_wrap=True)
    console.print(f"\nthe model goes on (temperature {SAMPLING.temperature}, {len(sampled)} tokens):\n")
    lines = tokenizer.decode(sampled).removeprefix("\n").splitlines()
    console.print(Text("\n".join(f"  > {line}" for line in lines), style="bold green"), soft_wrap=True)
    return begin, prompt, greedy


def draw(
    model: Model, name: str, begin: str, chosen: np.ndarray, counts: np.ndarray, console: Console
) -> None:
    """The two pictures: ``chosen`` [L T K] of the file, and ``counts`` of its beginning as ``reading`` gives them."""
    K, n_layers = model.config.index_topk, model.config.n_layers
    every, one = RUN_DIR / "selection.png", RUN_DIR / "reading.png"
    draw_selection(chosen, every, f"{name}: the {K} tokens that each of its tokens reads, layer by layer")
    offsets = [(0, 0), *model.tokenizer.encode(begin).offsets]  # the begin-of-text token has no text
    title = (
        f"{name}: what one token reads before the model goes on, at most {K} of {len(counts):,} tokens in each of "
        f"{n_layers} layers;\n{(counts == 0).mean():.0%} of the tokens are read by none of them, "
        f"{(counts == n_layers).mean():.0%} by all"
    )
    draw_reading(begin, offsets, counts, one, title)
    console.print(
        f"\npictures: what every token reads  [bold]{every}[/]\n          what one token reads    [bold]{one}[/]"
    )


def demo(file: Path, new_tokens: int, console: Console) -> bool:
    """Runs the demonstration; whether all checks passed. ValueError: unusable file or number of tokens."""
    started = time.perf_counter()
    if not 1 <= new_tokens <= ROW // 4:
        raise ValueError(f"--new-tokens must be 1 to {ROW // 4}, got {new_tokens}")
    text = read_python(file)
    model = load()
    tokens = np.array(encode(text, model.tokenizer, model.config)[:ROW])
    K = model.config.index_topk
    if len(tokens) < 2 * K:
        raise ValueError(
            f"{file} holds {len(tokens)} tokens: choose a file of at least {2 * K}, so that sparse attention "
            f"(index_topk {K}) has something to leave out"
        )
    console.rule("a nano DeepSeek-V3.2 with sparse attention, in JAX")
    n_parameters = model.config.param_count()
    console.print(f"{n_parameters:,} parameters stored in FP8, trained on Python's standard library")
    begin, prompt, greedy = continue_file(model, file, text, new_tokens, console)

    with console.status("checking"):
        table, checks, chosen = agreement(model, tokens)
        same, counts = reading(model, prompt, greedy)
    checks.append((f"{len(greedy)} tokens decoded from the cache equal one pass without a cache", same))
    console.print()
    console.print(table)
    for name, passed in checks:
        console.print("[green]ok    [/]" if passed else "[bold red]FAILED[/]", name)

    with console.status("measuring the speed"):
        rates = speed(model, tokens)
    console.print()
    console.print(rates)
    if jax.default_backend() == "cpu":
        console.print(
            "On a CPU no kernel skips anything: choosing the keys costs more there than reading them all. "
            "What kernels make of it: docs/benchmarks.md.",
            soft_wrap=True,
        )
    draw(model, file.name, begin, chosen, counts, console)
    console.print(
        "\nwhat to try next\n"
        "  make demo FILE=your_file.py\n"
        "  .venv/bin/dsa-jax generate --model dsa_jax/nano --prompt 'def main(' --max-new-tokens 64 --temperature 0.8\n"
        "  .venv/bin/dsa-jax compare --help       our numbers beside PyTorch's, layer by layer\n"
        "  dsa_jax/nano/README.md                 how the model was trained, and what it cannot do",
        soft_wrap=True,
    )
    console.print(f"done in {time.perf_counter() - started:.0f} s")
    return all(passed for _, passed in checks)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m dsa_jax.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE, help="Python file to continue")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N")
    options = parser.parse_args(arguments)
    try:
        return 0 if demo(options.file, options.new_tokens, Console(highlight=False)) else 1
    except ValueError as error:
        print(f"dsa_jax.demo.demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
