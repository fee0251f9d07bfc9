"""The trained model in dsa_jax/nano against transformers: parity above index_topk, on trained weights and text."""

from pathlib import Path

import numpy as np
import pytest

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.commands.inputs import encode, read_tokenizer
from dsa_jax.demo import command
from dsa_jax.demo.model import NANO
from dsa_jax.parity.compare import compare, run_ours
from dsa_jax.parity.reference import transformers_reference
from dsa_jax.parity.report import Tolerance

LENGTH = 1024
"""Four times index_topk; `dsa-jax compare` does 4096 in a minute, tests compile without optimising."""


@pytest.mark.parity
def test_transformers_computes_the_same_from_the_trained_weights():
    """Each side selects its own keys; PyTorch then attends to ours, so that a tie does not end the comparison.

    A score is exactly 0 where no head's product is positive, and PyTorch may select any of several equal scores.
    """
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'dsa-jax[parity]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install 'dsa-jax[parity]'")
    config = load_config(NANO, n_mtp_layers=0, dtype="float32", param_dtype="float32")
    text = Path(command.__file__).read_text()
    tokens = np.array([encode(text, read_tokenizer(NANO), config)[:LENGTH]])
    assert tokens.shape == (1, LENGTH) and LENGTH > config.index_topk

    ours = run_ours(load_params(NANO, config), config, tokens)
    report = compare(ours, transformers_reference(NANO, tokens, ours), Tolerance(topk_equal=0.9))
    assert report.failures == ()  # logits and index scores within 5e-5, the same experts
    gaps = [layer.topk_gap for layer in report.layers if layer.topk_gap is not None]
    assert max(gaps, default=0.0) <= 2 * Tolerance().index_scores, (
        "a set differs by more than ties and rounding"
    )
