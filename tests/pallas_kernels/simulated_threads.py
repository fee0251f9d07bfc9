"""Replaces pallas_kernels.hopper.thread_code on CPU: all threads of one block in lockstep, in NumPy.

It checks what a GPU would not report. Every access to global memory must stay inside its array. No two threads may
touch the same word of shared memory between two barriers of their team, unless both read it or both add to it. It
cannot detect a branch that only some threads of a warp take before a barrier.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from pallas_kernels.hopper import thread_code


class Block:
    """The running block: its index, which threads are active, and how many barriers each has passed."""

    index = 0
    active = np.ones(1, bool)
    epoch = np.zeros(1, np.int64)  # barriers passed by each thread


def start_block(index: int, threads: int) -> None:
    Block.index, Block.active, Block.epoch = index, np.ones(threads, bool), np.zeros(threads, np.int64)


def _array(value) -> np.ndarray:
    if isinstance(value, Word):
        return value.value
    return np.full(Block.active.shape, value % 2**32, np.uint32)


def _signed(value: np.ndarray) -> np.ndarray:
    return value.view(np.int32)


class Word(thread_code.Word):  # so that annotated functions take it
    def __init__(self, value):
        self.value = _array(value) if isinstance(value, Word | int) else value.astype(np.uint32)
        self.ir = self

    def __add__(self, other):
        return Word(self.value + _array(other))

    def __sub__(self, other):
        return Word(self.value - _array(other))

    def __mul__(self, other):
        return Word(self.value * _array(other))

    def __and__(self, other):
        return Word(self.value & _array(other))

    def __or__(self, other):
        return Word(self.value | _array(other))

    def __lshift__(self, other):
        return Word(self.value << _array(other))

    def __rshift__(self, other):
        return Word(self.value >> _array(other))

    def __lt__(self, other):
        return Flag(self.value < _array(other))

    def __le__(self, other):
        return Flag(self.value <= _array(other))

    def __gt__(self, other):
        return Flag(self.value > _array(other))

    def equals(self, other):
        return Flag(self.value == _array(other))

    def signed_minimum(self, other):
        return Word(np.minimum(_signed(self.value), _signed(_array(other))).view(np.uint32))

    def signed_maximum(self, other):
        return Word(np.maximum(_signed(self.value), _signed(_array(other))).view(np.uint32))

    def signed_less(self, other):
        return Flag(_signed(self.value) < _signed(_array(other)))

    def minimum(self, other):
        return Word(np.minimum(self.value, _array(other)))


class Flag(thread_code.Flag):
    def __init__(self, value):
        self.value = value

    def __and__(self, other):
        return Flag(self.value & other.value)

    def __or__(self, other):
        return Flag(self.value | other.value)

    def word(self):
        return Word(self.value.astype(np.uint32))

    def select(self, yes, no):
        return Word(np.where(self.value, _array(yes), _array(no)))


def i32():
    return "i32"


def thread_index():
    return Word(np.arange(Block.active.size))


def block_index():
    return Word(Block.index)


def named_barrier(name: Word, threads: int) -> None:
    teams = Block.active.reshape(-1, threads)
    assert (teams.all(axis=1) | ~teams.any(axis=1)).all(), "a barrier that only some threads of a team reach"
    Block.epoch[Block.active] += 1


def _by_warp(value):
    return value.reshape(-1, 32)


def shuffle_from(value, lane: int):
    return Word(np.repeat(_by_warp(value.value)[:, lane], 32))


def warp_sum(value):
    return Word(np.repeat(_by_warp(value.value).sum(axis=1, dtype=np.uint32), 32))


def warp_prefix_sum(value, lane):
    return Word(_by_warp(value.value).cumsum(axis=1, dtype=np.uint32).reshape(-1))


class SharedMemory:
    """A block's shared memory, with the last reader and writer of each word."""

    def __init__(self):
        self.words = np.zeros(58_112, np.uint32)  # 227 KiB
        self.used = 0
        self.write, self.read = (np.full((2, self.words.size), -1, np.int64) for _ in "wr")  # epoch, thread
        self.added = np.zeros(self.words.size, bool)  # the last write was an addition

    def allocate(self, words: int) -> "SharedRef":
        self.used += words
        assert self.used <= self.words.size, "more shared memory than a block can have"
        return SharedRef(self, 4 * (self.used - words))

    def access(self, address: np.ndarray, kind: str, mask: np.ndarray) -> np.ndarray:
        threads = np.flatnonzero(mask)
        words = address[threads] >> 2
        assert (address[threads] % 4 == 0).all()
        epoch = Block.epoch[threads]

        def conflict(record):
            return (record[0, words] == epoch) & (record[1, words] != threads)

        race = conflict(self.write)
        if kind == "add":
            race &= ~self.added[words]
        if kind != "read":
            race |= conflict(self.read)
        if kind == "write":
            race |= np.bincount(words, minlength=1)[words] > 1
        assert not race.any(), f"race: {kind} of words {words[race][:4]} by threads {threads[race][:4]}"
        record = self.read if kind == "read" else self.write
        shared = (record[0, words] == epoch) & (record[1, words] != threads)
        record[0, words], record[1, words] = epoch, np.where(shared, -2, threads)
        self.added[words] = kind == "add" if kind != "read" else self.added[words]
        return words


class SharedRef:
    def __init__(self, memory, address):
        self.memory, self.address = memory, address


MEMORY: list[SharedMemory] = []  # the block's, set by the test


def shared_address(ref):
    return Word(ref.address)


def _load(address: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values = np.full(address.shape, 0xDEAD, np.uint32)
    values[mask] = MEMORY[0].words[MEMORY[0].access(address, "read", mask)]
    return values


def _store(address: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
    MEMORY[0].words[MEMORY[0].access(address, "write", mask)] = value[mask]


def load_shared(address, offset: int = 0):
    return Word(_load(address.value + np.uint32(offset), Block.active))


def load_shared_x4(address):
    assert (address.value[Block.active] % 16 == 0).all()
    return [load_shared(address, 4 * i) for i in range(4)]


def store_shared(address, value, offset: int = 0) -> None:
    _store(address.value + np.uint32(offset), _array(value), Block.active)


def store_shared_x4(address, values) -> None:
    for i, value in enumerate(values):
        store_shared(address, value, 4 * i)


class Address(thread_code.Address):
    def __init__(self, ref, offset):
        self.ref, self.offset = ref, offset

    def plus(self, index, stride: int):
        return Address(self.ref, self.offset + _signed(index.value).astype(np.int64) * stride)

    def low(self):
        return Word(self.offset)


def global_address(ref: np.ndarray):
    return Address(ref, np.zeros(Block.active.shape, np.int64))


def _words(address) -> np.ndarray:
    """The word that each active thread addresses, and 0 for the others."""
    words = np.where(Block.active, address.offset >> 2, 0)
    assert (words >= 0).all() and (words < address.ref.size).all(), "outside the array"
    return words


def load_global(address):
    return Word(address.ref.reshape(-1).view(np.uint32)[_words(address)])


def load_global_x4(address):
    assert (address.offset[Block.active] % 16 == 0).all()
    return [load_global(Address(address.ref, address.offset + 4 * i)) for i in range(4)]


def store_global(address, value) -> None:
    address.ref.reshape(-1).view(np.uint32)[_words(address)[Block.active]] = value.value[Block.active]


@contextlib.contextmanager
def when(condition) -> Iterator[None]:
    before = Block.active
    Block.active = before & condition.value
    yield
    Block.active = before


def branch(condition, yes: Callable, no: Callable, count: int):
    results = [np.zeros(Block.active.shape, np.uint32) for _ in range(count)]
    for flag, values in ((condition.value, yes), (~condition.value, no)):
        with when(Flag(flag)):
            if Block.active.any():
                new = values()
                assert len(new) == count
                for result, value in zip(results, new, strict=True):
                    result[Block.active] = _array(value)[Block.active]
    return [Word(result) for result in results]


def while_loop(condition, carry, body):
    carry = [Word(value) for value in carry]
    before = Block.active
    while (Block.active & condition(carry).value).any():
        with when(condition(carry)):
            new = body(carry)
            carry = [
                Word(np.where(Block.active, _array(n), c.value)) for n, c in zip(new, carry, strict=True)
            ]
    assert Block.active is before
    return carry


def loop(start, stop, step, carry, body):
    def next_round(values):
        i, *carry = values
        return [i + step, *body(i, carry)]

    return while_loop(lambda values: values[0] < stop, [Word(start), *carry], next_round)[1:]


COMPARE = {"gt": np.greater, "eq": np.equal, "ne": np.not_equal, "lt": np.less}


def ptx(text: str, *args, returns=None, has_side_effects=True):
    """Interprets the few PTX instructions that the kernel uses."""
    n_results = len(returns) if isinstance(returns, list) else int(returns is not None)
    registers = {f"${n_results + i}": _array(arg) for i, arg in enumerate(args)}

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        if name.startswith("0f"):
            return np.full(Block.active.shape, int(name[2:], 16), np.uint32)
        return np.full(Block.active.shape, int(name, 0), np.uint32)

    def address(name: str) -> np.ndarray:
        base, _, offset = name.strip("[]").partition("+")
        return value(base) + np.uint32(int(offset or 0))

    for statement in filter(None, (s.strip() for s in text.strip("{} \n").split(";"))):
        if statement.startswith(".reg"):
            continue
        mask = Block.active
        if statement.startswith("@p"):
            mask, statement = mask & registers["p"], statement[2:].strip()
        operation, operands = statement.split(maxsplit=1)
        names = [name.strip() for name in operands.split(",")]
        parts = operation.split(".")
        if parts[0] == "setp":
            result = COMPARE[parts[1]](value(names[1]), value(names[2]))
            if len(names) == 4:
                result = {"and": np.logical_and, "or": np.logical_or}[parts[2]](result, registers[names[3]])
            registers[names[0]] = result
        elif operation == "st.shared.b32":
            _store(address(names[0]), value(names[1]), mask)
        elif operation == "red.shared.add.u32":
            words = MEMORY[0].access(address(names[0]), "add", mask)
            np.add.at(MEMORY[0].words, words, value(names[1])[mask])
        elif operation == "selp.b32":
            registers[names[0]] = np.where(registers[names[3]], value(names[1]), value(names[2]))
        elif operation == "mov.b32":
            registers[names[0]] = value(names[1])
        elif operation == "shr.s32":
            registers[names[0]] = (_signed(value(names[1])) >> int(names[2])).view(np.uint32)
        elif operation == "add.rn.f32":
            x = value(names[1]).view(np.float32)
            total = np.where(np.isnan(x), np.uint32(0x7FFFFFFF), (x + np.float32(0)).view(np.uint32))
            registers[names[0]] = total
        else:
            function = {
                "add.u32": np.add,
                "or.b32": np.bitwise_or,
                "and.b32": np.bitwise_and,
                "xor.b32": np.bitwise_xor,
            }[operation]
            registers[names[0]] = function(value(names[1]), value(names[2]))
    results = [registers[f"${i}"] for i in range(n_results)]
    if isinstance(returns, list):
        return [Word(result) for result in results]
    return Word(results[0]) if results else None
