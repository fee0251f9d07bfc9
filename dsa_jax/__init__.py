"""DeepSeek-V3.2 with DeepSeek Sparse Attention, in JAX and Flax."""

from dsa_jax.attention_form import for_training
from dsa_jax.cache import Cache, init_cache
from dsa_jax.checkpoint import load_config, load_params, write_hf
from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig, deepseek_v32, glm5, tiny
from dsa_jax.generate import Sampling, generate, stream
from dsa_jax.transformer import Transformer

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "Cache",
    "Fp8Config",
    "ModelConfig",
    "Sampling",
    "Transformer",
    "YarnConfig",
    "__version__",
    "deepseek_v32",
    "for_training",
    "generate",
    "glm5",
    "init_cache",
    "load_config",
    "load_params",
    "stream",
    "tiny",
    "write_hf",
]
