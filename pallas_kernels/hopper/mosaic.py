"""Every experimental or private name of JAX that the Hopper kernels use. They import it from here alone.

Tested with jax 0.11.2 and 0.12.0.1, interpreted and compiled for sm_90a. It also imports with jax 0.10.2, where
the kernels refuse to run. Names are looked up on import: one that a JAX release removes is an ImportError or
AttributeError of the kernel's module, and ``pallas_kernels.dispatch`` then falls back to ``xla``.

Experimental, and what the kernels are written in: Pallas (``pl``) and its Mosaic GPU backend (``plgpu``).

Public in ``jax.extend.mlir``: ``ir``, ``arith``, ``scf``, ``vector``, to build MLIR inside ``plgpu.inline_mgpu``.

Experimental, in ``mosaic.gpu``: ``wgmma``, ``WGMMAAccumulator``, ``memref_transpose``, ``optimization_barrier``. They
issue a matrix product without waiting for it; Pallas waits after each.

Private:

- ``llvm``, ``nvvm``: pointers, inline assembly, fences, warp instructions. ``jax.extend.mlir`` has no such dialects.
- ``mosaic.gpu.utils`` (``inline_ptx``, ``memref_ptr``, ``when``, ...): PTX, addresses, branches, the thread's index.
- The constructor and registers of ``FragmentedArray``: code per thread needs the registers that hold an array.
- ``ACCUMULATOR``: the only layout in which a product can stay in flight without its registers being copied.
- ``wgmma_m64``, ``wgmma_fence``, ``create_descriptor``, ``encode_addr``, ``Dim``: a product over 32 keys; ``wgmma``
  takes no fewer than 64.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import (
    FragmentedArray,
    WGMMAAccumulator,
    memref_transpose,
    optimization_barrier,
    wgmma,
)
from jax.experimental.mosaic.gpu.mma_utils import Dim, create_descriptor, encode_addr
from jax.experimental.mosaic.gpu.utils import (
    ThreadSubset,
    bitcast,
    getelementptr,
    memref_ptr,
    ptr_as_memref,
    shfl_bfly,
    single_thread_predicate,
    thread_idx,
    warpgroup_barrier,
    when,
)
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector
from jaxlib.mlir.dialects import llvm, nvvm

if jax.__version_info__ >= (0, 11):  # jax 0.10 has none: there the kernels' checks run, and refuse
    from jax.experimental.mosaic.gpu.utils import inline_ptx

__all__ = [
    "ACCUMULATOR",
    "FragmentedArray",
    "ThreadSubset",
    "accumulate",
    "accumulate_rows",
    "accumulator",
    "arith",
    "bitcast",
    "getelementptr",
    "inline_ptx",
    "ir",
    "llvm",
    "memref_ptr",
    "memref_transpose",
    "nvvm",
    "optimization_barrier",
    "pl",
    "plgpu",
    "ptr_as_memref",
    "registers",
    "scf",
    "shfl_bfly",
    "single_thread_predicate",
    "thread_idx",
    "vector",
    "warpgroup_barrier",
    "when",
    "with_registers",
    "word_array",
    "words",
]

ACCUMULATOR = (
    plgpu.Layout._WGMMA_ACC_32BIT
)  # WGMMA with one register per element, as the instruction takes it


def words(count: int):
    """The layout of an int32 array that gives each thread of a warpgroup ``count`` words."""
    return plgpu.Layout.WG_STRIDED((count * 128,), vec_size=1)


def word_array(values: Sequence[ir.Value]) -> FragmentedArray:
    """The int32 array whose elements, in the layout ``words``, are these values of each thread."""
    vector_type = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    array = np.array([vector.broadcast(vector_type, value) for value in values], dtype=object)
    return FragmentedArray(_registers=array, _layout=words(len(values)).to_mgpu(), _is_signed=True)


def registers(array: FragmentedArray) -> list[ir.Value]:
    """The registers of one thread that hold its part of ``array``, in the order of its layout."""
    return list(array.registers.flat)


def with_registers(array: FragmentedArray, values: Sequence[ir.Value]) -> FragmentedArray:
    """A float array in the layout of ``array``, held by other registers."""
    new = np.array(list(values), dtype=object).reshape(array.registers.shape)
    return FragmentedArray(_registers=new, _layout=array.layout, _is_signed=None)


def accumulator(array: FragmentedArray) -> WGMMAAccumulator:
    """``array``, in the layout ACCUMULATOR, fenced so that products may be added to it."""
    return WGMMAAccumulator.from_registers(array)


def accumulate(acc: WGMMAAccumulator, a: ir.Value | FragmentedArray, b: ir.Value) -> FragmentedArray:
    """Issues acc += a @ b and returns at once; the result may be read once the wgmma group is waited for."""
    return wgmma(acc, a, b)._value


def accumulate_rows(
    acc: WGMMAAccumulator, a: ir.Value | FragmentedArray, b: ir.Value, first: int
) -> FragmentedArray:
    """The same over 32 of the 64 rows of ``b`` (bfloat16, swizzled): rows ``first`` to ``first + 31``.

    ``a`` is in registers and holds just the 32 columns, or is in shared memory and holds all 64.
    """
    array = acc._value
    n = array.shape[1]

    def descriptor(operand, group_size, logical_k_major):
        (base, strides), _, fastest = create_descriptor(
            operand, swizzle=128, large_tile=(64, 64), group_size=group_size, logical_k_major=logical_k_major
        )
        stride = strides[1][0]  # bytes from the 16 rows of one instruction to the next 16
        start = arith.constant(ir.IntegerType.get_signless(64), encode_addr(first // 16 * stride))
        return llvm.add(base, start, overflow_flags=llvm.IntegerOverflowFlags.none), stride, fastest

    b, b_stride, b_fastest = descriptor(b, (64, n), True)
    if isinstance(a, FragmentedArray):
        a, a_stride, a_transpose = wgmma_fence(a), None, None
    else:
        a, a_stride, a_fastest = descriptor(a, (64, 64), False)
        a_transpose = a_fastest != Dim.K
    new = wgmma_m64(
        array.registers.copy(),
        a,
        b,
        a_transpose=a_transpose,
        b_transpose=b_fastest != Dim.K,
        a_k_stride=a_stride,
        b_k_stride=b_stride,
        n=n,
        swizzle=64,  # here it only says how many instructions of 16 rows are issued: 2
        a_element_type=ir.BF16Type.get(),
        b_element_type=ir.BF16Type.get(),
    )
    return with_registers(array, new.flat)
