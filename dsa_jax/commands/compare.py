"""`dsa-jax compare`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsa_jax.checkpoint.files import refuse_lfs_pointer
from dsa_jax.commands.inputs import check_tokens, checked_folder, read_tokenizer, read_vectors
from dsa_jax.commands.outputs import outputs_locked, progress_bar, write_json, write_text

if TYPE_CHECKING:
    import numpy as np

    from dsa_jax.config import ModelConfig
    from dsa_jax.parity.report import Report, Tolerance


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
    """Tokens per sequence. Choose far more than index_topk: shorter sequences never exercise the sparse path."""
    batch: int = 1
    """Sequences."""
    seed: int = 0
    """Seed of the random tokens."""
    text: Path | None = None
    """Instead of random tokens: the beginning of this file, one sequence, through the model's tokenizer.json."""
    same_keys: bool = False
    """The reference attends to the keys that we selected. Over thousands of tokens, rounding swaps a few keys whose
    scores are equal to the last digits, and everything after them differs. The selected sets are compared as always:
    set the fraction that must be equal with --topk-equal."""
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
    """With --checkpoint: only these layers, as in 0-2,61, to compare a large model part by part."""
    markdown: Path | None = None
    """With --checkpoint: write a table of the layers, and of the tensors that differ, to this file."""
    ignore: tuple[str, ...] = ()
    """Keys of config.json that are unknown here and do not change the model."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        with outputs_locked(self.json, self.markdown):
            return self._run()

    def _run(self) -> int:
        tolerance = self._tolerance()
        self._refuse_contradictions()
        if self.checkpoint is not None:
            return self._compare_weights(self.checkpoint)
        from dsa_jax.checkpoint import load_params
        from dsa_jax.parity.compare import compare, run_ours
        from dsa_jax.parity.reference import transformers_reference

        config = self._config()
        vectors = None if self.vectors is None else read_vectors(self.vectors)
        tokens = self._tokens(config) if vectors is None else vectors["input_ids"]
        check_tokens(tokens, config)
        ours = run_ours(load_params(self.model, config), config, tokens)
        if vectors is None:
            reference = transformers_reference(self.model, tokens, ours if self.same_keys else None)
        else:
            reference = vectors
        report = compare(ours, reference, tolerance)
        _print(report, tokens.shape[1], config.index_topk)
        if self.json is not None:
            run = {
                "model": str(self.model),
                "reference": str(self.vectors or "transformers"),
                "tokens": list(tokens.shape),
                "config": dataclasses.asdict(config),
            }
            write_json(self.json, run | json.loads(report.to_json()), indent=2)
        return 1 if report.failures else 0

    def _tolerance(self) -> "Tolerance":
        from dsa_jax.parity.report import Tolerance

        return Tolerance(
            logits=self.logits,
            index_scores=self.index_scores,
            topk_equal=self.topk_equal,
            experts_equal=self.experts_equal,
        )

    def _refuse_contradictions(self) -> None:
        if self.seq_len < 1 or self.batch < 1:
            raise ValueError(f"--seq-len and --batch must be positive, got {self.seq_len} and {self.batch}")
        if self.seq_len * self.batch >= 2**31:
            raise ValueError(
                f"--seq-len times --batch must be below 2**31 tokens, got {self.seq_len} x {self.batch}"
            )
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")
        if self.vectors is not None and (self.same_keys or self.text is not None):
            raise ValueError("--same-keys and --text go with --reference transformers, not with --vectors")
        if self.vectors is not None and self.reference is not None:
            raise ValueError("give either --vectors FILE.npz or --reference transformers, and not both")

    def _config(self) -> "ModelConfig":
        from dsa_jax.checkpoint import load_config

        return load_config(
            checked_folder(self.model),
            ignore=self.ignore,
            n_mtp_layers=0,
            dtype="float32",
            param_dtype="float32",
            index_fp8=self.index_fp8,
            kv_fp8=self.kv_fp8,
        )

    def _tokens(self, config: "ModelConfig") -> "np.ndarray":
        """[batch seq_len], random or from --text."""
        import numpy as np

        if self.seq_len > config.max_seq_len:
            raise ValueError(
                f"--seq-len must be at most the model's max_seq_len={config.max_seq_len}, got {self.seq_len}"
            )
        if self.text is None:
            return np.random.default_rng(self.seed).integers(0, config.vocab_size, (self.batch, self.seq_len))
        tokenizer = read_tokenizer(self.model)
        if tokenizer is None:
            raise ValueError(f"--text needs tokenizer.json in {self.model}, which has none")
        refuse_lfs_pointer(self.text)
        try:
            text = self.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.text} is not UTF-8 text ({error}); --text takes a text file") from error
        ids = tokenizer.encode(text).ids
        if self.batch != 1 or len(ids) < self.seq_len:
            raise ValueError(
                f"--text {self.text} gives one sequence of {len(ids)} tokens, got --batch {self.batch} "
                f"--seq-len {self.seq_len}"
            )
        return np.asarray([ids[: self.seq_len]])

    def _compare_weights(self, checkpoint: Path) -> int:
        """Prints the report and writes it where asked; 1 when a value differs."""
        from dsa_jax.checkpoint.compare_tensors import compare_tensors, parse_layers

        layers = parse_layers(self.layers) if self.layers else None
        with progress_bar("comparing tensors") as on_progress:
            report = compare_tensors(
                self.model, checkpoint, layers=layers, ignore=self.ignore, on_progress=on_progress
            )
        print(report.to_markdown(), end="")
        for path, text in ((self.markdown, report.to_markdown()), (self.json, report.to_json() + "\n")):
            if path is not None:
                write_text(path, text)
        return 0 if report.passed else 1


def _print(report: "Report", n_tokens: int, index_topk: int) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report.table())
    for failure in report.failures:
        console.print(failure, highlight=False)
    if n_tokens <= index_topk:
        console.print(
            f"note: {n_tokens} tokens are at most index_topk={index_topk}: every key is selected and the sparse "
            "path is not tested",
            highlight=False,
        )
    console.print("[bold red]beyond tolerance" if report.failures else "[bold green]within tolerance")
