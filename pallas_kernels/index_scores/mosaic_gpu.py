"""index_scores on Hopper: keys x query heads on the tensor cores, ReLU and weighted sum in registers.

mosaic_gpu_plan     sizes, division of work, shared memory
mosaic_gpu_kernel   the three warpgroups and their barriers
mosaic_gpu_steps    what they ask of the hardware, and its twin for the interpreter
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import device
from pallas_kernels.index_scores import xla
from pallas_kernels.index_scores.mosaic_gpu_kernel import build
from pallas_kernels.index_scores.mosaic_gpu_plan import BLOCK, WIDTH, Inputs, Plan


def index_scores(
    q: Float[Array, "B T I J"],
    k: Float[Array, "B S J"],
    weights: Float[Array, "B T I"],
    key_start: Int[Array, "B T"],
    key_stop: Int[Array, "B T"],
    k_scale: Float[Array, "B S"] | None,
) -> Float[Array, "B T S"]:
    """See ``pallas_kernels.index_scores``. Gradients are those of ``xla``.

    Raises:
      NotImplementedError: no Hopper GPU; a dtype other than bfloat16 and float8_e4m3fn; J != 128; or I > 64.
    """
    check(*q.shape[2:], q.dtype)
    return _scores(q, k, weights, key_start, key_stop, k_scale)


def check(I: int, J: int, dtype: jnp.dtype) -> None:
    """Raises NotImplementedError if no queries of these sizes and dtype can be served here."""
    if dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float8_e4m3fn, got {dtype}")
    if J != WIDTH or I > 64:
        raise NotImplementedError(
            f"the kernel needs index_head_dim {WIDTH} and at most 64 heads, got {J=}, {I=}"
        )
    device.require_hopper()


@jax.custom_vjp
def _scores(q, k, weights, key_start, key_stop, k_scale):
    return run(q, k, weights, key_start, key_stop, k_scale)


def _forward(*inputs):
    return _scores(*inputs), inputs


def _backward(inputs, cotangent):
    q, k, weights, key_start, key_stop, k_scale = inputs

    def reference(q, k, weights, k_scale):
        return xla.index_scores(q, k, weights, key_start, key_stop, k_scale)

    dq, dk, dweights, dk_scale = jax.vjp(reference, q, k, weights, k_scale)[1](cotangent)
    no_gradient = np.zeros(key_start.shape, jax.dtypes.float0)
    return dq, dk, dweights, no_gradient, no_gradient, dk_scale


_scores.defvjp(_forward, _backward)


def run(q, k, weights, key_start, key_stop, k_scale, **options: Any) -> jax.Array:
    """The kernel on padded inputs: heads to a divisor of COLUMNS, queries to groups, keys to one block.

    ``options`` are fields of Plan, for tests.
    """
    B, T, I, J = q.shape
    S = k.shape[1]
    if B * T * S == 0:
        return jnp.zeros((B, T, S), jnp.float32)
    n_heads = max(8, 1 << (I - 1).bit_length())
    options.setdefault("n_blocks", device.n_multiprocessors())
    plan = Plan(B, T, S, n_heads, q.dtype.itemsize, **options)
    rows = plan.groups * plan.queries
    q = _pad(q, (B, rows, n_heads, J)).reshape(B, rows * n_heads, J)
    weights = _pad(weights.astype(jnp.float32) * 0.5, (B, rows, n_heads)).reshape(B, rows * n_heads)
    k = _pad(k, (B, max(-(-S // 8) * 8, BLOCK), J))  # TMA needs whole groups of eight rows
    key_start, key_stop = jnp.clip(key_start, 0, S), jnp.clip(key_stop, 0, S)
    is_empty = key_start >= key_stop
    grouped = lambda x: _pad(x, (B, rows)).reshape(B * plan.groups, plan.queries)  # noqa: E731
    # The keys that some query of the group may see. Padding queries have [S, 0).
    first = S - grouped(S - jnp.where(is_empty, S, key_start)).max(axis=1)
    last = grouped(jnp.where(is_empty, 0, key_stop)).max(axis=1)
    k_scale = None if k_scale is None else k_scale.astype(jnp.float32)
    return build(plan)(Inputs(q, k, weights, key_start, key_stop, first, last, k_scale))


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])
