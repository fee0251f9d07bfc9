"""`make demo`: the small trained model in dsa_jax/nano continues a Python file, without PyTorch or a download.

    python -m dsa_jax.demo [FILE] [--new-tokens N]

It shows that sparse attention equals dense attention where it must, and how close the two are elsewhere; that decoding
from the cache equals one pass without a cache; the speed of both attentions by length; and what the indexer selects
(two pictures in runs/demo).
"""

import argparse
import re
import time
import webbrowser
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from dsa_jax.checkpoint.lock import lock_folder
from dsa_jax.commands.errors import run_command
from dsa_jax.commands.inputs import encode
from dsa_jax.demo.measurements import ROW, agreement, reading, speed
from dsa_jax.demo.model import Model, load
from dsa_jax.demo.pictures import draw_reading, draw_selection
from dsa_jax.generate import Sampling, generate

RUN_DIR = Path("runs/demo")
DEFAULT_FILE = Path(webbrowser.__file__)  # of the standard library, but held out when the model was trained
SAMPLING = Sampling(temperature=0.8, top_p=0.9, seed=1)
SPEED_ON_A_CPU = (
    "On a CPU no kernel skips anything: selecting the keys costs more there than reading them all. "
    "The speed of the kernels: docs/benchmarks.md."
)
NEXT = """
what to try next
  make demo FILE=your_file.py
  .venv/bin/dsa-jax generate --model dsa_jax/nano --prompt 'def main(' --max-new-tokens 64 --temperature 0.8
  .venv/bin/dsa-jax compare --help       our numbers beside PyTorch's, layer by layer
  dsa_jax/nano/README.md                 how the model was trained, and what it cannot do"""


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


def continue_file(
    model: Model, file: Path, text: str, new_tokens: int, console: Console
) -> tuple[str, tuple[int, ...], list[int]]:
    """Prints the beginning of the text and how the model continues it.

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
    console.print(f"\nthe model continues (temperature {SAMPLING.temperature}, {len(sampled)} tokens):\n")
    lines = tokenizer.decode(sampled).removeprefix("\n").splitlines()
    console.print(Text("\n".join(f"  > {line}" for line in lines), style="bold green"), soft_wrap=True)
    return begin, prompt, greedy


def draw(
    model: Model, name: str, begin: str, selected: np.ndarray, counts: np.ndarray, console: Console
) -> None:
    """Draws the two pictures: ``selected`` [L T K] of the file, and the ``counts`` of ``reading`` for its beginning."""
    K, n_layers = model.config.index_topk, model.config.n_layers
    every, one = RUN_DIR / "selection.png", RUN_DIR / "reading.png"
    draw_selection(selected, every, f"{name}: the {K} tokens that each of its tokens reads, layer by layer")
    offsets = [(0, 0), *model.tokenizer.encode(begin).offsets]  # the begin-of-text token has no text
    title = (
        f"{name}: what one token reads before the model continues, at most {K} of {len(counts):,} tokens in each of "
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
        table, checks, selected = agreement(model, tokens)
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
        console.print(SPEED_ON_A_CPU, soft_wrap=True)
    draw(model, file.name, begin, selected, counts, console)
    console.print(NEXT, soft_wrap=True)
    console.print(f"done in {time.perf_counter() - started:.0f} s")
    return all(passed for _, passed in checks)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m dsa_jax.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE, help="Python file to continue")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--traceback", action="store_true", help="on bad input, show where the error arose")
    options = parser.parse_args(arguments)

    def run() -> int:
        with lock_folder(RUN_DIR):
            return 0 if demo(options.file, options.new_tokens, Console(highlight=False)) else 1

    failures = (FloatingPointError,)
    return run_command("python -m dsa_jax.demo", run, traceback=options.traceback, failures=failures)
