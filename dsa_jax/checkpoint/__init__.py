"""Checkpoints in and out: Hugging Face folders, DeepSeek's converted files, Orbax."""

from dsa_jax.checkpoint.conversion import convert
from dsa_jax.checkpoint.hf_config import from_hf, to_hf
from dsa_jax.checkpoint.load import ReadCount, load_params
from dsa_jax.checkpoint.open_checkpoint import load_config
from dsa_jax.checkpoint.save import write_hf
from dsa_jax.checkpoint.verification import verify

__all__ = [
    "ReadCount", "convert", "from_hf", "load_config", "load_params", "to_hf", "verify", "write_hf",
]  # fmt: skip
