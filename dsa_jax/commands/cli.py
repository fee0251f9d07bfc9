"""The `dsa-jax` command: `generate` continues a prompt, `compare` holds our model against PyTorch, `convert`
and `verify` (dsa_jax.commands.checkpoint) turn checkpoints from one layout into another and check them, `aot`
(train.aot, found by its entry point) says ahead of time whether a run fits.

Exit codes: 0 done; 1 `compare` found a difference beyond the tolerance; 2 bad input, said in one line on
standard error (`--traceback` or DSA_JAX_TRACEBACK=1 shows where it arose).
"""

import dataclasses
import json
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Commands of packages that build on this one: entry points of the group "dsa_jax.commands" in pyproject.toml.
PLUGINS = {"aot": "does a run fit, and where does its time go? Asked ahead of time, without the machine"}

# JAX and the model are imported by the commands themselves, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np

    from dsa_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a checkpoint in the Hugging Face layout.

    For example, greedily and then sampled, with the numbers in a file:
      dsa-jax generate --model DIR --prompt "The capital of France is" --max-new-tokens 32
      dsa-jax generate --model DIR --token-ids 0,17,4 --temperature 0.7 --top-p 0.9 --seed 1 --json out.json
    """

    model: Path
    """Folder with config.json, *.safetensors and, for text, tokenizer.json; or what `convert` made of it."""
    prompt: str | None = None
    """Text to continue. The begin-of-text token of config.json is put in front if it is not there."""
    token_ids: str | None = None
    """Instead of --prompt: token ids, separated by commas. Taken as they are."""
    max_new_tokens: int
    """Stop after this many new tokens."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 samples."""
    top_p: float = 1.0
    """Sample among the most likely tokens whose probabilities sum to this."""
    top_k: int = 0
    """Sample among this many of the most likely tokens; 0 for all."""
    seed: int = 0
    """Seed of the sampling."""
    stop: str | None = None
    """Token ids that end the text, separated by commas, or "none". Default: those of config.json."""
    dtype: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    """Type of the weights and of the computation; fp8 keeps FP8 weights as stored and computes in bfloat16."""
    attention: Literal["sparse", "dense"] = "sparse"
    """dense: attend to every earlier token and leave the indexer's choice aside."""
    index_fp8: bool = False
    """Quantise the indexer's queries and keys to FP8, as deployed."""
    kv_fp8: bool = False
    """Quantise the cached latent to FP8, as deployed."""
    json: Path | None = None
    """Write token ids, text, timings and the configuration to this file."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        from dsa_jax.checkpoint import load_config, load_params
        from dsa_jax.generate import Sampling, stream

        if (self.prompt is None) == (self.token_ids is None):
            raise ValueError("give either --prompt TEXT or --token-ids 1,2,3, and not both")
        config = load_config(
            checked_folder(self.model),
            n_mtp_layers=0,
            dtype="bfloat16" if self.dtype == "fp8" else self.dtype,
            param_dtype="bfloat16" if self.dtype == "fp8" else self.dtype,
            attention=self.attention,
            index_fp8=self.index_fp8,
            kv_fp8=self.kv_fp8,
        )
        tokenizer = read_tokenizer(self.model)
        if self.token_ids is not None:
            prompt = parse_ids(self.token_ids, config)
        else:
            prompt = encode(self.prompt or "", tokenizer, config)
        stop = config.eos_token_ids if self.stop is None else parse_ids(self.stop.replace("none", ""), config)
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)

        started = time.perf_counter()
        params = load_params(self.model, config, keep_fp8=self.dtype == "fp8")
        loaded = time.perf_counter()
        steps = stream(
            params, config, [prompt], max_new_tokens=self.max_new_tokens, sampling=sampling, stop_tokens=stop
        )
        new_ids: list[int] = []
        times: list[float] = []
        printed = ""
        for (token,) in steps:
            if token is None:
                break
            times.append(time.perf_counter())
            new_ids.append(token)
            text = decode(new_ids, tokenizer)
            # A token may end inside a character: its last bytes are shown once the character is whole.
            if not text.endswith("\ufffd"):
                print(text[len(printed) :], end="", flush=True)
                printed = text
        text = decode(new_ids, tokenizer)
        print(text[len(printed) :], flush=True)

        if self.json is not None:
            rest = times[-1] - times[0] if times else 0.0
            content = {
                "model": str(self.model),
                "prompt": self.prompt,
                "prompt_ids": list(prompt),
                "new_ids": new_ids,
                "text": None if tokenizer is None else text,
                "seconds": {  # compilation included: it falls in the first two tokens
                    "load": loaded - started,
                    "first_token": times[0] - loaded if times else None,
                    "other_tokens": rest,
                },
                "other_tokens_per_second": (len(times) - 1) / rest if rest > 0 else None,
                "sampling": dataclasses.asdict(sampling),
                "stop": list(stop),
                "config": dataclasses.asdict(config),
            }
            write_json(self.json, json.dumps(content, indent=2))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare our model with PyTorch on the same tokens, in float32, layer by layer.

    For example, with transformers (pip install 'dsa-jax[parity]') and with a file of numbers:
      dsa-jax compare --model DIR --reference transformers --seq-len 256 --batch 2
      dsa-jax compare --model DIR --vectors FILE.npz --index-fp8 --kv-fp8 --topk-equal 0.99
    And the weights alone, bit by bit, with a converted checkpoint:
      dsa-jax compare --model DIR --checkpoint ORBAX_DIR --layers 0-3 --markdown report.md

    Exits with 1 if a number is beyond its tolerance. The keys of a file of numbers: `pydoc dsa_jax.parity.compare`.
    """

    model: Path
    """Folder with config.json and *.safetensors."""
    vectors: Path | None = None
    """File of numbers, .npz, to compare with. It also holds the tokens."""
    reference: Literal["transformers"] | None = None
    """Run this reference now, on random tokens. The default without --vectors."""
    seq_len: int = 128
    """Tokens per sequence. Choose far more than index_topk: below it nothing is sparse."""
    batch: int = 1
    """Sequences."""
    seed: int = 0
    """Seed of the random tokens."""
    text: Path | None = None
    """Instead of random tokens: the beginning of this file, one sequence, through the model's tokenizer.json."""
    same_keys: bool = False
    """The reference attends to the keys that we selected. Over thousands of tokens rounding alone swaps a few keys
    whose scores are equal to the last digits; the rest of the comparison is then about something else. The sets
    themselves are compared as always: say how many may differ with --topk-equal."""
    index_fp8: bool = False
    """Quantise our indexer's queries and keys to FP8, as deployed."""
    kv_fp8: bool = False
    """Quantise our cached latent to FP8, as deployed."""
    logits: float = 5e-5
    """Tolerance: largest absolute difference of a logit."""
    index_scores: float = 5e-5
    """Tolerance: largest absolute difference of an index score."""
    topk_equal: float = 1.0
    """Tolerance: smallest fraction of queries whose set of selected keys is the same."""
    experts_equal: float = 1.0
    """Tolerance: smallest fraction of tokens whose set of experts is the same."""
    json: Path | None = None
    """Write all numbers, the verdict and the configuration to this file."""
    checkpoint: Path | None = None
    """Compare the weights instead, tensor by tensor, with those of this checkpoint (of any kind)."""
    layers: str | None = None
    """With --checkpoint: only these layers, as in 0-2,61; a large model is compared part by part."""
    markdown: Path | None = None
    """With --checkpoint: write a table per layer, and what differs, to this file."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        if self.checkpoint is not None:
            from dsa_jax.commands.checkpoint import compare_weights

            return compare_weights(self.model, self.checkpoint, self.layers, self.markdown, self.json)
        import numpy as np
        from rich.console import Console

        from dsa_jax.checkpoint import load_config, load_params
        from dsa_jax.parity.compare import Tolerance, compare, run_ours
        from dsa_jax.parity.reference import transformers_reference

        if self.vectors is not None and (self.same_keys or self.text is not None):
            raise ValueError(
                "--same-keys and --text go with --reference transformers, --vectors has its own numbers"
            )
        if self.vectors is not None and self.reference is not None:
            raise ValueError("give either --vectors FILE.npz or --reference transformers, and not both")
        config = load_config(
            checked_folder(self.model),
            n_mtp_layers=0,
            dtype="float32",
            param_dtype="float32",
            index_fp8=self.index_fp8,
            kv_fp8=self.kv_fp8,
        )
        if self.vectors is not None:
            reference = read_vectors(self.vectors)
            tokens = reference["input_ids"]
        else:
            if self.seq_len < 1 or self.batch < 1:
                raise ValueError(
                    f"--seq-len and --batch must be positive, got {self.seq_len} and {self.batch}"
                )
            shape = (self.batch, self.seq_len)
            tokens = np.random.default_rng(self.seed).integers(0, config.vocab_size, shape)
            if self.text is not None:
                tokens = self._tokens_of_text()
        check_tokens(tokens, config)
        ours = run_ours(load_params(self.model, config), config, tokens)
        if self.vectors is None:
            reference = transformers_reference(self.model, tokens, ours if self.same_keys else None)
        tolerance = Tolerance(
            logits=self.logits,
            index_scores=self.index_scores,
            topk_equal=self.topk_equal,
            experts_equal=self.experts_equal,
        )
        report = compare(ours, reference, tolerance)

        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(report.table())
        for failure in report.failures:
            console.print(failure, highlight=False)
        if tokens.shape[1] <= config.index_topk:
            console.print(
                f"note: {tokens.shape[1]} tokens are at most index_topk={config.index_topk}: every key is "
                "selected and the sparse path is not tested",
                highlight=False,
            )
        console.print("[bold red]beyond tolerance" if report.failures else "[bold green]within tolerance")
        if self.json is not None:
            run = {
                "model": str(self.model),
                "reference": str(self.vectors or "transformers"),
                "tokens": list(tokens.shape),
                "config": dataclasses.asdict(config),
            }
            write_json(self.json, json.dumps(run | json.loads(report.to_json()), indent=2))
        return 1 if report.failures else 0

    def _tokens_of_text(self) -> "np.ndarray":
        """[1 seq_len]."""
        import numpy as np

        assert self.text is not None
        tokenizer = read_tokenizer(self.model)
        if tokenizer is None:
            raise ValueError(f"--text needs tokenizer.json in {self.model}, which has none")
        ids = tokenizer.encode(self.text.read_text(encoding="utf-8")).ids
        if self.batch != 1 or len(ids) < self.seq_len:
            raise ValueError(
                f"--text gives one sequence of {len(ids)} tokens, got --batch {self.batch} --seq-len {self.seq_len}"
            )
        return np.asarray([ids[: self.seq_len]])


def checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: --model takes the folder of a checkpoint")
    return folder


def parse_ids(text: str, config: "ModelConfig") -> tuple[int, ...]:
    """ "1,2,3" -> (1, 2, 3), each an id of the vocabulary."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"token ids are whole numbers separated by commas, as in 1,2,3; got {text!r}")
    outside = [part for part in parts if int(part) >= config.vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]} is not below vocab_size={config.vocab_size}")
    return tuple(int(part) for part in parts)


def check_tokens(tokens: "np.ndarray", config: "ModelConfig") -> None:
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"tokens must be [batch, length] with at least one token, got shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"token ids must lie in [0, vocab_size={config.vocab_size}), got {tokens.min()} .. "
            f"{tokens.max()}: is this file of numbers from the same model?"
        )
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(f"{tokens.shape[1]} tokens are more than max_seq_len={config.max_seq_len}")


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.json, or None."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if (folder / "dsa_jax.json").is_file():  # `convert` carries it along
        path = folder / "hf" / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def encode(text: str, tokenizer: Any, config: "ModelConfig") -> tuple[int, ...]:
    if tokenizer is None:
        raise ValueError(
            "the model's folder has no tokenizer.json, which --prompt needs: use --token-ids 1,2,3"
        )
    ids = tuple(tokenizer.encode(text).ids)
    if config.bos_token_id is not None and ids[:1] != (config.bos_token_id,):
        ids = (config.bos_token_id, *ids)
    return ids


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """Text of the new tokens; without a tokenizer, the ids themselves."""
    if tokenizer is None:
        return " ".join(str(token) for token in ids)
    return tokenizer.decode(list(ids))


def read_vectors(path: Path) -> "dict[str, np.ndarray]":
    """The arrays of a file of numbers, those of `dsa_jax.parity.compare` and any others."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --vectors takes a .npz file")
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    for name in ("input_ids", "logits"):
        if name not in arrays:
            raise ValueError(f"{path} holds no '{name}', it holds {sorted(arrays)[:8]}")
    return arrays


def write_json(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line `args` (default: the process's) and returns the exit code."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in PLUGINS:
        found = [point for point in entry_points(group="dsa_jax.commands") if point.name == args[0]]
        if found:
            return found[0].load()(args[1:])
        print(
            f"dsa-jax: `{args[0]}` is not registered; install the package again: pip install -e .",
            file=sys.stderr,
        )
        return 2
    try:
        import tyro

        from dsa_jax.commands.checkpoint import Convert, Verify
    except ImportError as error:
        print(f"dsa-jax: the command line needs tyro ({error.msg}): pip install tyro", file=sys.stderr)
        return 2
    command = tyro.cli(
        Generate | Compare | Convert | Verify,
        prog="dsa-jax",
        description="DeepSeek-V3.2 with sparse attention, in JAX. Also: "
        + "; ".join(f"`dsa-jax {name} --help`: {what}" for name, what in PLUGINS.items()),
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return command.run()
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        if command.traceback or os.environ.get("DSA_JAX_TRACEBACK"):
            raise
        print(f"dsa-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
