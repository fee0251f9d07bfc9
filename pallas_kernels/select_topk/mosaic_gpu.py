"""select_topk on Hopper: one pass over each row. ``mosaic_gpu_kernel`` says how."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import device
from pallas_kernels.select_topk.mosaic_gpu_kernel import ONE_ROW, TWO_ROWS, Inputs, Plan, build

MAX_K = 4096  # two teams of a block each hold k keys plus one chunk, with their indices, in shared memory


def select_topk(
    scores: Float[Array, "B T S"],
    k: int,
    key_start: Int[Array, "B T"] | None,
    key_stop: Int[Array, "B T"] | None,
) -> Int[Array, "B T K"]:
    """See ``pallas_kernels.select_topk``.

    Raises:
      NotImplementedError: no Hopper GPU; scores not float32; k > MAX_K; or 2**29 or more keys per row.
    """
    B, T, S = scores.shape
    if scores.dtype != jnp.float32:
        raise NotImplementedError(f"the kernel reads float32 scores, got {scores.dtype}")
    if k > MAX_K:
        raise NotImplementedError(f"the kernel keeps at most {MAX_K} keys per query, got {k=}")
    if S >= 2**29:
        raise NotImplementedError(f"the kernel addresses rows below 2**29 keys, got {S=}")
    device.require_hopper()
    if B * T * S == 0:
        return jnp.full((B, T, k), -1, jnp.int32)
    scores = lax.stop_gradient(scores)
    n_multiprocessors = device.n_multiprocessors()
    # One row per block has the lower latency, two rows the higher throughput.
    teams = ONE_ROW if B * T <= n_multiprocessors else TWO_ROWS
    bounds = (None, None)
    if key_start is not None and key_stop is not None:
        bounds = (key_start.reshape(-1), key_stop.reshape(-1))
    flat = jnp.pad(scores.reshape(-1), (0, -scores.size % 4))  # the kernel reads vectors of four
    return build(Plan(B * T, S, k, teams, n_multiprocessors))(Inputs(flat, *bounds)).reshape(B, T, k)
