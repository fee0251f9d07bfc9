"""Memory of the index loss: all forms compute the same function, and blocks keep memory from growing with T x T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.bench.index_kl_memory import FORMS, main, shapes, temporary_bytes, written_out
from pallas_kernels.cases import Case

pytestmark = pytest.mark.nightly


def case(T, S=None, **sizes):
    return Case(operation="index_kl", name="small", T=T, S=S or T, dtype="float32", **sizes)


SMALL = dict(I=4, J=8, K=8, N=4, C=16, R=4, P=8)


def test_the_written_out_formula_is_the_dense_loss():
    rng = np.random.default_rng(0)
    arrays = {
        name: jnp.asarray(rng.standard_normal(of.shape), of.dtype)
        for name, of in shapes(case(12, **SMALL)).items()
        if of.dtype == jnp.float32
    }
    arrays |= {
        "key_start": jnp.zeros((1, 12), jnp.int32),
        "key_stop": jnp.arange(1, 13, dtype=jnp.int32)[None],
    }
    logits = jnp.einsum("BTNP,BSNP->BTNS", arrays["q_nope"], arrays["k_nope"])
    logits = 0.3 * (logits + jnp.einsum("BTNR,BSR->BTNS", arrays["q_rope"], arrays["k_rope"]))
    seen = jnp.tril(jnp.ones((12, 12), bool))[None, :, None]
    arrays["lse"] = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)
    arguments = [arrays[name] for name in ("q", "k", "weights", *FORMS["dense"][1])]
    for ours, expected in zip(
        written_out(*arguments, scale=0.3), pk.index_kl_dense(*arguments, scale=0.3), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_only_the_written_out_formula_grows_with_pairs():
    need = functools.cache(lambda form, T, S: temporary_bytes(form, case(T, S)))
    assert need("written out", 4096, 4096) > 3.9 * need("written out", 2048, 2048)
    # A tenth of what the attention logits alone would take, and no more than twice as much for twice the keys.
    assert need("dense", 4096, 4096) < 0.1 * 4 * 128 * 4096**2 * 2
    assert need("dense", 4096, 4096) < 2.1 * need("dense", 2048, 2048)
    assert need("selected", 512, 4096) < 2.1 * need("selected", 512, 2048)


def test_the_command_prints_a_table(capsys):
    main(["64", "128", "--dtype", "float32"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| T | written out | dense | selected |" and len(rows) == 4
