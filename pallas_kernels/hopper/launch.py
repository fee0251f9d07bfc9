"""How the Hopper kernels are launched: persistent thread blocks of a few warpgroups, code per warpgroup."""

from collections.abc import Callable
from typing import Any

from pallas_kernels.hopper.mosaic import plgpu


def persistent_kernel(
    body: Callable[..., None], *, out_type: Any, scratch: Any, n_blocks: int, warpgroups: int, **options: Any
) -> Callable[..., Any]:
    """The kernel whose thread blocks each run ``body(*inputs, *outputs, scratch)`` in all of their warpgroups.

    ``body`` finds its place by ``lax.axis_index`` of "block" and "warpgroup". Every barrier is its own affair.

    Args:
      out_type: of the results, as ``plgpu.kernel`` takes it.
      scratch: a tree of shared memory and barriers.
      options: further fields of ``plgpu.CompilerParams``.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch],
        grid=(n_blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane, **options
        ),
    )
