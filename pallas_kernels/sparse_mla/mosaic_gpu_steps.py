"""The steps of the sparse_mla kernel that Pallas cannot express, and their twins for the interpreter.

Pallas can neither gather rows with asynchronous copies, nor keep matrix products in flight during other work, nor
multiply half a block. ``Hardware`` writes these steps in MLIR and PTX through ``plgpu.inline_mgpu``, which the Mosaic
GPU interpreter does not run; ``Interpreted`` does the same in plain Pallas.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.mosaic import pl, plgpu
from pallas_kernels.sparse_mla.mosaic_gpu_plan import (
    HALF,
    KEYS,
    LATENT,
    N_GROUPS,
    NO_KEY,
    PAIR,
    SCALE_BLOCK,
    KeyArrays,
    Scratch,
)


@runtime_checkable
class Steps(Protocol):
    """What the kernel asks of the hardware. Types are Any: tracers, or registers that stand for arrays."""

    def start_matmul(self, acc: Any, a: Any, b: Any, half: int | None = None) -> Any:
        """Issues acc += a @ b^T or, over one half of the keys, acc += a @ b, and returns at once.

        The result may be read after ``finish_matmul``. ``a`` is in shared memory (then it has all keys) or in
        registers (then it has that half of them).
        """

    def finish_matmul(self, acc: Any) -> Any:
        """Waits for every product in flight."""

    def rescale(self, acc: Any, factor: Any) -> Any:
        """acc * factor[:, None]."""

    def store_half(self, p_ref: Any, p16: Any, half: int) -> None:
        """p_ref[:, 32 half : 32 half + 32] = p16, visible to matrix products after the next barrier."""

    def store_out(self, out_ref: Any, values: Any) -> None:
        """out_ref[...] = values, in device memory."""

    def init_barriers(self, scratch: Scratch) -> None:
        """Initialises ``scratch.rows_ready``."""

    def wait_rows(self, scratch: Scratch, slot: int, group: int, round_: Any) -> None:
        """Waits until a group of the slot's tiles has arrived for the round_-th time (from 0)."""

    def load_indices(self, indices: Any, start: Any) -> Any:
        """indices[start : start + PAIR] as ``gather`` takes them, -1 beyond the end."""

    def prefetch(self, found: Any, sources: KeyArrays) -> Any:
        """What ``gather`` needs to have read ahead of the pair with the indices ``found``."""

    def gather(
        self,
        scratch: Scratch,
        sources: KeyArrays,
        found: Any,
        following: Any,
        ahead: Any,
        wait_free: Callable[[int, int], None],
    ) -> Any:
        """Brings a pair's rows to ``scratch.keys``, each half of a slot once ``wait_free(slot, half)`` returns.

        Signals ``scratch.rows_ready``. Rows of missing keys become 0, and ``scratch.no_key`` marks them.

        Args:
          found: the indices of the pair.
          following: those of the next pair.
          ahead: what ``prefetch`` returned for ``found``.

        Returns:
          What ``prefetch`` would return for ``following``.
        """


class Interpreted:
    def __init__(self, top_k: int):
        self.top_k = top_k

    def start_matmul(self, acc, a, b, half=None):
        b = b[...].T if half is None else b[...][_half(half)]
        if not isinstance(a, jax.Array):
            a = a[...] if half is None else a[...][:, _half(half)]
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def finish_matmul(self, acc):
        return acc

    def rescale(self, acc, factor):
        return acc * factor[:, None]

    def store_half(self, p_ref, p16, half):
        p_ref[:, _half(half)] = p16
        plgpu.commit_smem()

    def store_out(self, out_ref, values):
        out_ref[...] = values

    def init_barriers(self, scratch):
        pass

    def wait_rows(self, scratch, slot, group, round_):
        plgpu.barrier_wait(scratch.interpreted_rows_ready[N_GROUPS * slot + group])

    def load_indices(self, indices, start):
        values = jnp.stack([indices[jnp.minimum(start + i, self.top_k - 1)] for i in range(PAIR)])
        return jnp.where(start + jnp.arange(PAIR) < self.top_k, values, -1)

    def prefetch(self, found, sources):
        return ()

    def gather(self, scratch, sources, found, following, ahead, wait_free):
        for slot in range(2):
            for half in range(2):
                wait_free(slot, half)
                for i in range(KEYS):
                    index = found[slot * KEYS + i]
                    row, valid, key = pl.ds(jnp.maximum(index, 0), 1), index >= 0, pl.ds(i, 1)
                    copies = [(self.latent(sources, row, half), half * HALF)]
                    if half == 1:
                        copies.append((sources.k_rope[row, :], LATENT))
                    for values, to in copies:
                        target = pl.ds(to, values.shape[1])
                        scratch.keys[slot, key, target] = jnp.where(valid, values, jnp.zeros_like(values))
                    if half == 0:
                        scratch.no_key[slot, key] = jnp.where(valid, 0.0, NO_KEY).reshape(1)
                for group in (2 * half, 2 * half + 1):
                    plgpu.barrier_arrive(scratch.interpreted_rows_ready[N_GROUPS * slot + group])
        return ahead

    def latent(self, sources, row, half):
        """Half of one latent, in bfloat16."""
        return sources.latent[row, pl.ds(half * HALF, HALF)]


class InterpretedFp8(Interpreted):
    def latent(self, sources, row, half):
        values = sources.latent[row, pl.ds(half * HALF, HALF)].astype(jnp.float32)
        scales = jnp.repeat(sources.scale[row, pl.ds(2 * half, 2)], SCALE_BLOCK, axis=1)
        return (values * scales).astype(jnp.bfloat16)


def _half(half: int) -> slice:
    return slice(half * KEYS // 2, (half + 1) * KEYS // 2)
