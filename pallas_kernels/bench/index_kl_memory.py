"""`python -m pallas_kernels.bench.index_kl_memory [LENGTH ...]`: memory of the index loss at V3.2's sizes.

One layer, one row of T tokens. Compiles loss and gradient for the default device and reads XLA's plan of temporary
buffers. Nothing runs, so lengths that would not fit are answered too. The columns:

    written out   the formula that ``index_kl_dense`` is equivalent to, on all pairs and heads at once
    dense         ``index_kl_dense``
    selected      ``index_kl_selected`` for 512 queries, as many as ``dsa_jax.index_loss`` passes at once

A CPU multiplies bfloat16 through float32 copies of whole operands, which a GPU does not need; ``--dtype float32``
shows the plan without them.
"""

import argparse
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

import pallas_kernels as pk
from pallas_kernels.arithmetic import einsum
from pallas_kernels.cases import Case
from pallas_kernels.keys import visible

LENGTHS = tuple(1024 * 2**i for i in range(2, 8))
SELECTED_BLOCK = 512  # query_block of dsa_jax.config


def shapes(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arguments of ``index_kl_dense`` and ``index_kl_selected``, by name."""
    B, T, S, N, dtype = case.B, case.T, case.S, case.N, jnp.dtype(case.dtype)
    of = jax.ShapeDtypeStruct
    return {
        "q": of((B, T, case.I, case.J), dtype),
        "k": of((B, S, case.J), dtype),
        "weights": of((B, T, case.I), jnp.float32),
        "q_nope": of((B, T, N, case.P), dtype),
        "q_rope": of((B, T, N, case.R), dtype),
        "k_nope": of((B, S, N, case.P), dtype),
        "k_rope": of((B, S, case.R), dtype),
        "lse": of((B, T, N), jnp.float32),
        "key_start": of((B, T), jnp.int32),
        "key_stop": of((B, T), jnp.int32),
        "token_weights": of((B, T), jnp.float32),
        "q_latent": of((B, T, N, case.C), dtype),
        "latent": of((B, S, case.C), dtype),
        "topk_indices": of((B, T, case.K), jnp.int32),
    }


def written_out(
    q, k, weights, q_nope, q_rope, k_nope, k_rope, lse, key_start, key_stop, token_weights, *, scale
):
    """The formula of ``index_kl_dense``, all pairs at once."""
    seen = visible(key_start, key_stop, k.shape[1])
    logits = einsum("BTNP,BSNP->BTNS", q_nope, k_nope) + einsum("BTNR,BSR->BTNS", q_rope, k_rope)
    a = jnp.where(seen[:, :, None], jnp.exp(logits * scale - lse[..., None]), 0.0).sum(axis=2)
    p = a / a.sum(axis=-1, keepdims=True)
    dots = jax.nn.relu(einsum("BTIJ,BSJ->BTIS", q, k))
    scores = jnp.where(seen, (dots * weights[..., None]).sum(axis=2), -1e30)
    kl = (xlogy(p, p) - p * jax.nn.log_softmax(scores)).sum(axis=-1)
    return (token_weights * kl).sum(), kl


FORMS: dict[str, tuple[Callable[..., tuple[jax.Array, jax.Array]], tuple[str, ...]]] = {
    "written out": (
        written_out,
        ("q_nope", "q_rope", "k_nope", "k_rope", "lse", "key_start", "key_stop", "token_weights"),
    ),
    "dense": (
        pk.index_kl_dense,
        ("q_nope", "q_rope", "k_nope", "k_rope", "lse", "key_start", "key_stop", "token_weights"),
    ),
    "selected": (
        pk.index_kl_selected,
        ("q_latent", "q_rope", "latent", "k_rope", "lse", "topk_indices", "token_weights"),
    ),
}
"""Name -> (function, names of its arguments after q, k and weights)."""


def temporary_bytes(form: str, case: Case) -> int:
    """Bytes that loss and gradient of one layer need besides arguments and results, on the default device."""
    function, names = FORMS[form]
    scale = (case.P + case.R) ** -0.5

    def loss(*arrays):
        return functools.partial(function, scale=scale)(*arrays)[0]

    of = shapes(case)
    arguments = [of[name] for name in ("q", "k", "weights", *names)]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench.index_kl_memory", description=__doc__
    )
    parser.add_argument(
        "lengths", nargs="*", type=int, default=LENGTHS, metavar="LENGTH", help="tokens per row"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    print(
        f"temporary memory in GiB, {options.dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n"
    )
    print(f"| T | {' | '.join(FORMS)} |\n|---|{'---|' * len(FORMS)}")
    for length in options.lengths:
        cells = []
        for form in FORMS:
            T = min(SELECTED_BLOCK, length) if form == "selected" else length
            case = Case(operation="index_kl", name=form, T=T, S=length, dtype=options.dtype)
            cells.append(f"{temporary_bytes(form, case) / 2**30:,.2f}")
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
