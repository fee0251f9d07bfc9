"""Text generation: chunked prefill, then one token per step, through the same model function."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.cache import Cache, init_cache
from dsa_jax.config import ModelConfig
from dsa_jax.transformer import Transformer

CAPACITY_STEP = (
    64  # capacities are multiples of this, so that prompts of similar lengths share one compilation
)

SMALLEST_TEMPERATURE = 1e-6  # far below, logits / temperature is infinite in float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    Raises ValueError on values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or finite and at least {SMALLEST_TEMPERATURE}, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be within (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be within 0 .. 2**31 - 1 (0 keeps every token), got {self.top_k}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be within 0 .. 2**32 - 1, got {self.seed}")


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 1024,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and including a stop token. Arguments and errors as for ``stream``."""
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        params,
        config,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
    ):
        for row, token in zip(new, tokens, strict=True):
            if token is not None:
                row.append(token)
    return new


def stream(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 1024,
) -> Iterator[list[int | None]]:
    """Yields the next token of each row per step; None for a row that has finished.

    Prompts may differ in length, and each row gives the tokens that it would give alone. Each row of the batch has
    its own random key, so its sample depends only on the seed and the row number.

    Args:
      params: ``{"params": ...}`` as ``load_params`` or ``Transformer.init`` return them.
      prompts: token ids, at least one per prompt.
      max_new_tokens: per row, at least 1.
      stop_tokens: a row that produces one of these has finished.
      prefill_chunk: prompt tokens per prefill call; bounds memory and changes no result.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, or prompt + max_new_tokens above max_seq_len.
      FloatingPointError: a logit is not finite; the message names the row and the token.
    """
    lengths = check_request(prompts, config, max_new_tokens, prefill_chunk)
    B, longest = len(prompts), max(lengths)
    chunk = min(prefill_chunk, -(-longest // CAPACITY_STEP) * CAPACITY_STEP)
    padded = -(-longest // chunk) * chunk
    tokens, segment_ids = np.zeros((B, padded), np.int32), np.zeros((B, padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segment_ids[row, : len(prompt)] = prompt, 1

    capacity = -(-(longest + max_new_tokens) // CAPACITY_STEP) * CAPACITY_STEP
    cache = init_cache(config, B, min(capacity, config.max_seq_len))
    logits = jnp.zeros((B, config.vocab_size), jnp.float32)
    prefill, decode = compiled_steps(config)
    for begin in range(0, padded, chunk):
        part = slice(begin, begin + chunk)
        logits, cache = prefill(params, tokens[:, part], segment_ids[:, part], cache, logits)

    keys = jax.random.split(jax.random.key(sampling.seed), B)
    unseeded = replace(sampling, seed=0)  # it is a static argument: a new seed must not compile again
    active = np.ones(B, bool)
    for step in range(max_new_tokens):
        chosen, keys, finite = _draw(logits, keys, unseeded)
        if (broken := active & ~np.asarray(finite)).any():
            raise FloatingPointError(
                f"row {broken.argmax()}, new token {step + 1}: the logits are not finite, so there is no next token; "
                "`dsa-jax verify` names weights that are NaN or infinite, and float32 overflows later than bfloat16"
            )
        drawn = np.asarray(chosen)
        yield [int(token) if live else None for token, live in zip(drawn, active, strict=True)]
        active &= ~np.isin(drawn, list(stop_tokens))
        if not active.any() or step == max_new_tokens - 1:
            return
        logits, cache = decode(params, chosen, active, cache)


def check_request(
    prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int, prefill_chunk: int = 1024
) -> list[int]:
    """The length of each prompt. Needs no parameters, so that a command can call it before it loads them.

    Raises:
      ValueError: as ``stream`` does.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise ValueError(
            f"max_new_tokens and prefill_chunk must be at least 1, got {max_new_tokens=} {prefill_chunk=}"
        )
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} must hold at least one token, got none")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < config.vocab_size)
            raise ValueError(
                f"prompt {row}: token ids must be within 0 .. {config.vocab_size - 1}, got {bad}"
            )
        if len(prompt) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"prompt {row}: {len(prompt)} tokens + max_new_tokens={max_new_tokens} exceed "
                f"max_seq_len={config.max_seq_len}; shorten the prompt or ask for fewer tokens"
            )
    return [len(prompt) for prompt in prompts]


@functools.lru_cache(maxsize=8)
def compiled_steps(config: ModelConfig) -> tuple[Any, Any]:
    """The jitted (prefill, decode) that ``stream`` calls. Both donate the cache, and update it in place."""
    model = Transformer(config)

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def prefill(
        params: Any, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cache: Cache, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Logits of each row's last token: from this chunk if it has tokens of the row, else ``last``."""
        real = segment_ids != 0
        at = jnp.maximum(real.sum(axis=1) - 1, 0)
        logits, new_cache, _ = model.apply(params, tokens, segment_ids=segment_ids, cache=cache, logits_at=at)
        return jnp.where(real.any(axis=1)[:, None], logits[:, 0], last), new_cache

    @functools.partial(jax.jit, donate_argnums=(3,))
    def decode(params: Any, chosen: jax.Array, active: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Finished rows get padding, which takes no slot."""
        segment_ids = active.astype(jnp.int32)[:, None]
        logits, new_cache, _ = model.apply(params, chosen[:, None], segment_ids=segment_ids, cache=cache)
        return logits[:, 0], new_cache

    return prefill, decode


@functools.partial(jax.jit, static_argnames="sampling")
def _draw(
    logits: Float[Array, "B V"], keys: jax.Array, sampling: Sampling
) -> tuple[Int[Array, " B"], jax.Array, Bool[Array, " B"]]:
    """(next token, keys of the step after, whether all logits of the row are finite)."""
    finite = jnp.isfinite(logits).all(axis=-1)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1), keys, finite
    now, later = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return jax.vmap(jax.random.categorical)(now, truncate(logits, sampling)), later, finite


def truncate(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """logits / temperature, with -inf for tokens dropped by top_k and then by top_p; the best token always stays."""
    logits = logits / sampling.temperature
    order = jnp.argsort(-logits, axis=-1)  # stable: of equal logits the lowest id first
    rank = jnp.argsort(order, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    first = jnp.arange(ranked.shape[-1]) == 0  # also where float32 rounds top_p to 0
    kept = (before < sampling.top_p) & (ranked > -jnp.inf) | first
    return jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)
