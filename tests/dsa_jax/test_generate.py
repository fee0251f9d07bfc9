"""Generation equals calling the model directly; sampling follows its settings."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.generate import Sampling, generate, stream, truncate
from dsa_jax.transformer import Transformer
from tests.dsa_jax.models import config_of, numbers, params_of, tokens_of

CONFIG, PARAMS = config_of("tiny_calm"), params_of("tiny_calm")
PROMPT = tokens_of("tiny_calm")[0].tolist()


def test_greedy_tokens_are_those_of_pytorch():
    expected = numbers("tiny_hf_float32")["generate.sequences"]
    prompts = expected[:, :64].tolist()
    new = generate(params_of("tiny"), config_of("tiny"), prompts, max_new_tokens=8, prefill_chunk=30)
    assert new == expected[:, 64:].tolist()


def test_greedy_generation_equals_full_forwards():
    apply = jax.jit(lambda params, tokens: Transformer(CONFIG).apply(params, tokens)[0])
    padded, length = np.zeros((1, 40), np.int32), 20
    padded[0, :length] = PROMPT[:length]
    for at in range(length, 26):
        padded[0, at] = np.argmax(np.asarray(apply(PARAMS, jnp.asarray(padded)))[0, at - 1])
    assert generate(PARAMS, CONFIG, [PROMPT[:length]], max_new_tokens=6) == [padded[0, length:26].tolist()]


def test_rows_of_a_batch_equal_the_rows_alone():
    prompts = [PROMPT[:3], PROMPT[:40], PROMPT[5:22]]
    together = generate(PARAMS, CONFIG, prompts, max_new_tokens=5, prefill_chunk=16)
    assert together == [generate(PARAMS, CONFIG, [p], max_new_tokens=5)[0] for p in prompts]


def test_stop_tokens_end_their_row_only():
    prompts = [PROMPT[:3], PROMPT[:40]]
    free = generate(PARAMS, CONFIG, prompts, max_new_tokens=6)
    stop = free[0][2]
    assert stop not in free[1] and stop not in free[0][:2], (
        "the stop token must occur only once in this example"
    )
    steps = list(stream(PARAMS, CONFIG, prompts, max_new_tokens=6, stop_tokens=[stop]))
    assert [step[0] for step in steps] == [*free[0][:3], None, None, None]
    assert [step[1] for step in steps] == free[1]
    both = generate(PARAMS, CONFIG, [prompts[0]], max_new_tokens=6, stop_tokens=[stop])
    assert both == [free[0][:3]]


def test_a_seed_repeats_and_another_seed_differs():
    def sample(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(PARAMS, CONFIG, [PROMPT[:8]], max_new_tokens=12, sampling=sampling)

    assert sample(1) == sample(1) != sample(2)


def kept(logits, **settings):
    out = truncate(jnp.asarray([logits], jnp.float32), Sampling(temperature=1.0, **settings))
    return np.flatnonzero(np.isfinite(np.asarray(out)[0])).tolist()


def test_truncation_keeps_the_smallest_sufficient_set():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_p=0.35) == [1]
    assert kept(logits, top_p=0.65) == [1, 3]
    assert kept(logits, top_p=0.75) == [1, 2, 3]
    assert kept(logits, top_k=3, top_p=0.5) == [1, 3]  # top_p applies to what top_k left
    assert kept(logits, top_p=1e-9) == [1]
    assert kept([0.0, 0.0, 0.0], top_k=2) == [0, 1]


def test_top_p_that_the_first_tokens_reach_exactly_keeps_no_further_one():
    """Four quarters have exact partial sums, so that `<=` in place of `<` would keep one token more."""
    assert kept([0.0] * 4, top_p=0.25) == [0]
    assert kept([0.0] * 4, top_p=0.5) == [0, 1]
    assert kept([0.0] * 4, top_p=0.75) == [0, 1, 2]


def test_temperature_applies_before_top_p():
    """p = [.5, .3, .2] at T = 0.5 is [.66, .24, .11]: the first token alone reaches 0.6."""
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    for temperature, expected in ((0.5, [0]), (1.0, [0, 1]), (4.0, [0, 1])):
        left = truncate(logits, Sampling(temperature=temperature, top_p=0.6))
        assert np.flatnonzero(np.isfinite(np.asarray(left)[0])).tolist() == expected


def test_each_row_of_a_batch_draws_with_a_key_of_its_own():
    sampling = Sampling(temperature=2.0, seed=3)
    rows = generate(PARAMS, CONFIG, [PROMPT[:8]] * 3, max_new_tokens=8, sampling=sampling)
    assert len({tuple(row) for row in rows}) == 3
    other_prompt = [PROMPT[:8], PROMPT[5:20], PROMPT[:8]]
    again = generate(PARAMS, CONFIG, other_prompt, max_new_tokens=8, sampling=sampling)
    assert (again[0], again[2]) == (rows[0], rows[2])


def test_sampling_frequencies_follow_the_temperature():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.25]))
    drawn = jax.random.categorical(
        jax.random.key(0), truncate(logits[None], Sampling(temperature=0.5))[0], shape=(4000,)
    )
    counts = collections.Counter(drawn.tolist())  # p ** 2, normalised: 4/6, 1/6, 1/6
    assert counts[0] / 4000 == pytest.approx(4 / 6, abs=0.03)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 1, "at least one prompt"),
        ([[]], 1, "prompt 0 must hold at least one token"),
        ([[1], [5, 512]], 1, r"prompt 1: token ids must be within 0 \.\. 511, got 512"),
        ([[1, -1]], 1, "got -1"),
        ([[1]], 0, "max_new_tokens and prefill_chunk must be at least 1"),
        ([[1] * 10], 163840, "10 tokens .* exceed max_seq_len=163840"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(PARAMS, CONFIG, prompts, max_new_tokens=new)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_sampling_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)
