"""The form in which attention runs: expanded heads (MHA) or absorbed heads (MQA). Both compute the same function.

MHA expands the latents to keys and values per head, and attends to all keys under a mask. MQA absorbs the expansion
into queries and outputs, and attends to the selected latents only. ``prefers_mha`` is the one place that chooses.
"""

import dataclasses

import jax.numpy as jnp

import pallas_kernels as kernels
from dsa_jax.config import ModelConfig


def prefers_mha(config: ModelConfig, T: int, S: int) -> bool:
    """Whether T queries over S keys run as MHA.

    ``config.attention_form`` decides, unless it is "auto". With "auto" MQA runs wherever ``sparse_mla`` has a kernel
    (Hopper GPUs). For one V3.2 layer, selection included, it was 2.1 times as fast at 2K tokens, 3.6 at 4K and 7.1
    at 8K (docs/benchmarks.md). Without a kernel XLA computes either form, and the one with fewer multiplications runs.
    For a pass with gradients, pass the config through ``for_training`` first.
    """
    if config.attention_form != "auto":
        return config.attention_form == "mha"
    widths = config.kv_lora_rank, config.qk_rope_head_dim, jnp.dtype(config.dtype)
    has_kernel = kernels.sparse_mla_has_kernel(*widths, config.implementation)
    return not has_kernel and _mha_multiplies_less(config, T, S)


def for_training(config: ModelConfig, T: int) -> ModelConfig:
    """The config to differentiate on rows of T tokens: ``attention_form`` is fixed to the form with less work.

    The gradient of the MQA form is XLA's, so its fast forward kernel must not decide the form. Call this in every
    training loop, your own included:

    >>> model = Transformer(for_training(config, tokens.shape[1]))

    A form other than "auto" is kept.
    """
    if config.attention_form != "auto":
        return config
    return dataclasses.replace(config, attention_form="mha" if _mha_multiplies_less(config, T, T) else "mqa")


def _mha_multiplies_less(config: ModelConfig, T: int, S: int) -> bool:
    """Whether MHA needs at most as many multiplications as MQA, counted per query and head.

    MHA multiplies P + R + H numbers for each of the S keys, and its share of the expansion of S latents is 1 / T.
    MQA multiplies 2 C + R numbers for each selected latent, and absorbs its query and its output.
    For V3.2 the two are equal near S = 7,000 in a prefill of the whole row; decoding is always MQA.
    """
    P, R, H, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    selected = min(config.index_topk, S) if config.attention == "sparse" else S
    mha = S * (P + R + H) + C * (P + H) * S / T
    mqa = selected * (2 * C + R) + C * (P + H)
    return mha <= mqa
