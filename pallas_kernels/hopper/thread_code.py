"""What one CUDA thread does, for the parts of a Mosaic GPU kernel that Pallas cannot express.

Inside ``plgpu.inline_mgpu`` the traced function builds the MLIR that every thread of the block runs. ``Word`` gives
Python's operators to 32-bit registers. The functions are the few instructions that the kernels need: shared and
global memory, warp shuffles and reductions, named barriers, branches and loops.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import arith, ir, llvm, nvvm, scf, vector

FULL_WARP = 0xFFFFFFFF


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


class Word:
    """A 32-bit integer register. Comparisons, ``>>``, ``//`` and ``%`` are unsigned."""

    def __init__(self, value: "Word | ir.Value | int"):
        if isinstance(value, Word):
            self.ir: Any = value.ir
        elif isinstance(value, int):
            self.ir = arith.constant(i32(), ir.IntegerAttr.get(i32(), (value + 2**31) % 2**32 - 2**31))
        else:
            self.ir = value

    def _binary(self, operation, other) -> "Word":
        return Word(operation(self.ir, Word(other).ir))

    def _compare(self, predicate, other) -> "Flag":
        return Flag(arith.cmpi(predicate, self.ir, Word(other).ir))

    def __add__(self, other):
        return self._binary(arith.addi, other)

    def __sub__(self, other):
        return self._binary(arith.subi, other)

    def __mul__(self, other):
        return self._binary(arith.muli, other)

    def __and__(self, other):
        return self._binary(arith.andi, other)

    def __or__(self, other):
        return self._binary(arith.ori, other)

    def __xor__(self, other):
        return self._binary(arith.xori, other)

    def __lshift__(self, other):
        return self._binary(arith.shli, other)

    def __rshift__(self, other):
        return self._binary(arith.shrui, other)

    def __floordiv__(self, other):
        return self._binary(arith.divui, other)

    def __mod__(self, other):
        return self._binary(arith.remui, other)

    def __lt__(self, other):
        return self._compare(arith.CmpIPredicate.ult, other)

    def __le__(self, other):
        return self._compare(arith.CmpIPredicate.ule, other)

    def __gt__(self, other):
        return self._compare(arith.CmpIPredicate.ugt, other)

    def __ge__(self, other):
        return self._compare(arith.CmpIPredicate.uge, other)

    def equals(self, other) -> "Flag":
        return self._compare(arith.CmpIPredicate.eq, other)

    def signed_less(self, other) -> "Flag":
        return self._compare(arith.CmpIPredicate.slt, other)

    def minimum(self, other) -> "Word":
        return self._binary(arith.minui, other)

    def signed_minimum(self, other) -> "Word":
        return self._binary(arith.minsi, other)

    def signed_maximum(self, other) -> "Word":
        return self._binary(arith.maxsi, other)


class Flag:
    """A predicate."""

    def __init__(self, value: ir.Value):
        self.ir = value

    def __and__(self, other: "Flag") -> "Flag":
        return Flag(arith.andi(self.ir, other.ir))

    def __or__(self, other: "Flag") -> "Flag":
        return Flag(arith.ori(self.ir, other.ir))

    def word(self) -> Word:
        return Word(arith.extui(i32(), self.ir))

    def select(self, yes: Word | int, no: Word | int) -> Word:
        return Word(arith.select(self.ir, Word(yes).ir, Word(no).ir))


# Threads


def thread_index() -> Word:
    """Index of the thread in its block."""
    return Word(mosaic.thread_idx())


def block_index() -> Word:
    """Index of the block in a one-dimensional grid."""
    return Word(ptx("mov.u32 $0, %ctaid.x;", returns=i32(), has_side_effects=False))


def named_barrier(name: Word, threads: int) -> None:
    """Waits until ``threads`` threads have arrived; all of them then see the shared memory written before.

    A block has barriers 0 to 15. Barrier 0 is the whole block's; Mosaic uses 1 to 8, one per warpgroup.
    """
    nvvm.barrier(barrier_id=name.ir, number_of_threads=Word(threads).ir)


def shuffle_up(value: Word, distance: int) -> Word:
    """The value of the lane ``distance`` below, or its own value where there is none."""
    return Word(nvvm.shfl_sync(Word(FULL_WARP).ir, value.ir, Word(distance).ir, Word(0).ir, nvvm.ShflKind.up))


def shuffle_from(value: Word, lane: int) -> Word:
    return Word(nvvm.shfl_sync(Word(FULL_WARP).ir, value.ir, Word(lane).ir, Word(31).ir, nvvm.ShflKind.idx))


def warp_sum(value: Word) -> Word:
    return Word(nvvm.redux_sync(value.ir, nvvm.ReductionKind.ADD, Word(FULL_WARP).ir))


def warp_prefix_sum(value: Word, lane: Word) -> Word:
    """Sum over the lanes up to and including this one."""
    for distance in (1, 2, 4, 8, 16):
        value = value + (lane >= distance).select(shuffle_up(value, distance), 0)
    return value


# Memory


class Address:
    """A byte address in global memory."""

    def __init__(self, value: ir.Value):
        self.ir = value

    def plus(self, index: Word, stride: int) -> "Address":
        """The address ``index`` (signed) times ``stride`` bytes further on."""
        stride_ir = arith.constant(i64(), ir.IntegerAttr.get(i64(), stride))
        return Address(arith.addi(self.ir, arith.muli(arith.extsi(i64(), index.ir), stride_ir)))

    def low(self) -> Word:
        """The low 32 bits."""
        return Word(arith.trunci(i32(), self.ir))


def global_address(ref: ir.Value) -> Address:
    return Address(llvm.ptrtoint(i64(), mosaic.memref_ptr(ref)))


def load_global(address: Address) -> Word:
    return Word(ptx("ld.global.b32 $0, [$1];", address.ir, returns=i32()))


def load_global_x4(address: Address) -> list[Word]:
    """Four words from a 16-byte boundary, by the read-only path and without L1."""
    text = "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];"
    return [Word(value) for value in ptx(text, address.ir, returns=[i32()] * 4)]


def store_global(address: Address, value: Word) -> None:
    ptx("st.global.b32 [$0], $1;", address.ir, value.ir)


def shared_address(ref: ir.Value) -> Word:
    """Byte address of a shared memory ref."""
    return Word(llvm.ptrtoint(i32(), mosaic.memref_ptr(ref)))


def load_shared(address: Word, offset: int = 0) -> Word:
    return Word(ptx(f"ld.shared.b32 $0, [$1+{offset}];", address.ir, returns=i32()))


def load_shared_x4(address: Word) -> list[Word]:
    values = ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address.ir, returns=[i32()] * 4)
    return [Word(value) for value in values]


def store_shared(address: Word, value: Word | int, offset: int = 0) -> None:
    ptx(f"st.shared.b32 [$0+{offset}], $1;", address.ir, Word(value).ir)


def store_shared_x4(address: Word, values: Sequence[Word | int]) -> None:
    ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", address.ir, *(Word(value).ir for value in values))


def ptx(
    text: str,
    *args: ir.Value,
    returns: ir.Type | Sequence[ir.Type] | None = None,
    has_side_effects: bool = True,
) -> Any:
    """Inline PTX: $0, $1, ... are first the results, then the arguments. With side effects it is not moved."""
    return mosaic.inline_ptx(text, *args, result_types=returns, has_side_effects=has_side_effects)


def ptx_in_place(text: str, values: Sequence[ir.Value], constraints: str) -> list[ir.Value]:
    """Inline PTX that updates its operands in place."""
    types = [value.type for value in values]
    struct = llvm.StructType.get_literal(types)
    result = llvm.inline_asm(struct, list(values), text, constraints, has_side_effects=True, asm_dialect=0)
    return [llvm.extractvalue(t, result, [i]) for i, t in enumerate(types)]


# Control flow


def _unwrap(values: Sequence[Word]) -> list[ir.Value]:
    return [value.ir for value in values]


def branch(
    condition: Flag, yes: Callable[[], Sequence[Word]], no: Callable[[], Sequence[Word]], count: int
) -> list[Word]:
    """The ``count`` Words that ``yes()`` or ``no()`` returns; only one of them runs."""
    operation = scf.IfOp(condition.ir, [i32()] * count, has_else=True)
    for block, values in ((operation.then_block, yes), (operation.else_block, no)):
        with ir.InsertionPoint(block):
            scf.YieldOp(_unwrap([Word(value) for value in values()]))
    return [Word(result) for result in operation.results]


def when(condition: Flag):
    """Context manager whose body runs where the condition holds."""
    return mosaic.when(condition.ir)


def loop(
    start: Word | int,
    stop: Word | int,
    step: Word | int,
    carry: Sequence[Word | int],
    body: Callable[[Word, list[Word]], Sequence[Word]],
) -> list[Word]:
    """``for i in range(start, stop, step): carry = body(i, carry)``."""
    operation = scf.ForOp(Word(start).ir, Word(stop).ir, Word(step).ir, _unwrap([Word(c) for c in carry]))
    with ir.InsertionPoint(operation.body):
        new = body(Word(operation.induction_variable), [Word(c) for c in operation.inner_iter_args])
        scf.YieldOp(_unwrap([Word(c) for c in new]))
    return [Word(result) for result in operation.results]


def while_loop(
    condition: Callable[[list[Word]], Flag],
    carry: Sequence[Word],
    body: Callable[[list[Word]], Sequence[Word]],
) -> list[Word]:
    """``while condition(carry): carry = body(carry)``."""
    types = [i32()] * len(carry)
    operation = scf.WhileOp(types, _unwrap(carry))
    before = operation.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        scf.ConditionOp(condition([Word(c) for c in before.arguments]).ir, before.arguments)
    after = operation.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.YieldOp(_unwrap(body([Word(c) for c in after.arguments])))
    return [Word(result) for result in operation.results]


# Floats are plain ir.Values of type f32.


def add(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.addf(x, y)


def multiply(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.mulf(x, y)


def add_relu(x: ir.Value, weight: ir.Value, total: ir.Value | None) -> ir.Value:
    """total + weight * (x + |x|): an addition, where |x| is an operand modifier, and a fused multiply-add."""
    twice = "{ .reg .f32 a; abs.f32 a, $1; add.rn.f32 a, a, $1; "
    if total is None:
        return ptx(twice + "mul.rn.f32 $0, a, $2; }", x, weight, returns=x.type, has_side_effects=False)
    text = twice + "fma.rn.f32 $0, a, $2, $3; }"
    return ptx(text, x, weight, total, returns=x.type, has_side_effects=False)


def select_float(condition: Flag, yes: ir.Value, no: ir.Value) -> ir.Value:
    return arith.select(condition.ir, yes, no)


def exchange(x: ir.Value, distance: int) -> ir.Value:
    """The value of the lane whose number differs in bit ``distance``."""
    return mosaic.shfl_bfly(x, distance)


def float_bits(x: ir.Value) -> Word:
    return Word(arith.bitcast(i32(), x))


def load_global_float(address: Address) -> ir.Value:
    return arith.bitcast(ir.F32Type.get(), load_global(address).ir)


def store_global_x4(address: Address, values: Sequence[Word]) -> None:
    """Four words to a 16-byte boundary."""
    ptx("st.global.v4.b32 [$0], {$1, $2, $3, $4};", address.ir, *(value.ir for value in values))


def lane_of(pair: ir.Value, c: int) -> ir.Value:
    return vector.extract(pair, [], [c])
