"""`dsa-jax generate`."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsa_jax.commands.inputs import (
    checked_folder,
    decode,
    encode,
    parse_ids,
    read_tokenizer,
    tokenizer_if_readable,
)
from dsa_jax.commands.outputs import outputs_locked, write_json

if TYPE_CHECKING:
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
    """Instead of --prompt: token ids, separated by commas. Taken as they are; tokenizer.json is needed only to print
    the new tokens as text."""
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
    """dense: attend to every earlier token, whatever the indexer selects."""
    index_fp8: bool = False
    """Quantise the indexer's queries and keys to FP8, as deployed."""
    kv_fp8: bool = False
    """Quantise the cached latent to FP8, as deployed."""
    json: Path | None = None
    """Write token ids, text, timings and the configuration to this file."""
    ignore: tuple[str, ...] = ()
    """Keys of config.json that are unknown here and do not change the model."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        with outputs_locked(self.json):
            return self._run()

    def _run(self) -> int:
        from dsa_jax.checkpoint import load_params
        from dsa_jax.generate import Sampling, check_request, stream

        if (self.prompt is None) == (self.token_ids is None):
            raise ValueError("give either --prompt TEXT or --token-ids 1,2,3, and not both")
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)
        config = self._config()
        if self.token_ids is not None:
            prompt = parse_ids(self.token_ids, config)
            tokenizer = tokenizer_if_readable(self.model)
        else:
            tokenizer = read_tokenizer(self.model)
            prompt = encode(self.prompt or "", tokenizer, config)
        stop = config.eos_token_ids if self.stop is None else parse_ids(self.stop.replace("none", ""), config)
        check_request([prompt], config, self.max_new_tokens)

        started = time.perf_counter()
        params = load_params(self.model, config, keep_fp8=self.dtype == "fp8")
        loaded = time.perf_counter()
        steps = stream(
            params, config, [prompt], max_new_tokens=self.max_new_tokens, sampling=sampling, stop_tokens=stop
        )
        output = _print_stream(steps, tokenizer)
        if self.json is not None:
            content = {
                "model": str(self.model),
                "prompt": self.prompt,
                "prompt_ids": list(prompt),
                "new_ids": output.ids,
                "text": None if tokenizer is None else output.text,
                **output.timings(started, loaded),
                "sampling": dataclasses.asdict(sampling),
                "stop": list(stop),
                "config": dataclasses.asdict(config),
            }
            write_json(self.json, content, indent=2)
        return 0

    def _config(self) -> "ModelConfig":
        from dsa_jax.checkpoint import load_config

        dtype = "bfloat16" if self.dtype == "fp8" else self.dtype
        return load_config(
            checked_folder(self.model),
            ignore=self.ignore,
            n_mtp_layers=0,
            dtype=dtype,
            param_dtype=dtype,
            attention=self.attention,
            index_fp8=self.index_fp8,
            kv_fp8=self.kv_fp8,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Output:
    """ids: the new tokens; times: when each was there (time.perf_counter); text: decoded."""

    ids: list[int]
    times: list[float]
    text: str

    def timings(self, started: float, loaded: float) -> dict[str, Any]:
        """For the file of numbers. Compilation is included: it falls on the first two tokens."""
        rest = self.times[-1] - self.times[0] if self.times else 0.0
        return {
            "seconds": {
                "load": loaded - started,
                "first_token": self.times[0] - loaded if self.times else None,
                "other_tokens": rest,
            },
            "other_tokens_per_second": (len(self.times) - 1) / rest if rest > 0 else None,
        }


def _print_stream(steps: Iterator[Sequence[int | None]], tokenizer: Any) -> _Output:
    """Prints the one sequence of `steps` as it is generated, up to its stop token."""
    ids: list[int] = []
    times: list[float] = []
    printed = ""
    for (token,) in steps:
        if token is None:
            break
        times.append(time.perf_counter())
        ids.append(token)
        text = decode(ids, tokenizer)
        # A token may end inside a character: its last bytes are shown once the character is whole.
        if not text.endswith("\ufffd"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    text = decode(ids, tokenizer)
    print(text[len(printed) :], flush=True)
    return _Output(ids=ids, times=times, text=text)
