"""The small trained model in dsa_jax/nano, and its programs for whole rows of tokens."""

import dataclasses
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.commands.inputs import read_tokenizer
from dsa_jax.config import ModelConfig
from dsa_jax.transformer import Transformer

NANO = Path(str(resources.files("dsa_jax"))) / "nano"

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
        """[T] tokens -> logits [T V], and the selected keys [L T K] of sparse attention.

        Raises:
          FloatingPointError: a logit is not finite.
        """
        logits, selected = self.program(attention, len(tokens))(self.params, tokens)
        if not np.isfinite(logits).all():
            raise FloatingPointError(
                f"the logits of {attention} attention over {len(tokens)} tokens are not finite"
            )
        return np.asarray(logits), None if selected is None else np.asarray(selected)

    def program(self, attention: Attention, length: int) -> Any:
        """The compiled function (params, tokens [length]) -> (logits, selected keys or None)."""
        if (attention, length) not in self.programs:
            model = Transformer(dataclasses.replace(self.config, attention=attention))
            names = ("topk_indices",) if attention == "sparse" else ()

            def run(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                logits, _, aux = model.apply(params, tokens[None], capture=names)
                return logits[0], aux["topk_indices"][:, 0] if names else None

            with jax.default_matmul_precision("highest"):
                lowered = jax.jit(run).lower(self.params, jax.ShapeDtypeStruct((length,), jnp.int32))
                self.programs[attention, length] = lowered.compile()
        return self.programs[attention, length]


def load(folder: str | os.PathLike[str] = NANO) -> Model:
    """The model of a checkpoint folder, in float32."""
    config = load_config(folder, n_mtp_layers=0, dtype="float32", param_dtype="float32")
    return Model(load_params(folder, config), config, read_tokenizer(Path(folder)))
