"""A parser for the text of compiled programs (optimised HLO): instructions, and how often each runs.

XLA's ``cost_analysis`` counts a loop's body once. Here each instruction counts as often as it runs: the product of the
trip counts of the loops around it. Only the shortest branch of a conditional counts, unless all are asked for. A loop
that does not count up to a constant counts once and is listed in ``Program.unknown_loops``.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Buffer:
    """An array in memory. bytes: with tile padding. in_hbm: in the chip's main memory."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """``%name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(map(_buffer, _SHAPE.finditer(self.shape)))

    @property
    def hbm_bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers if buffer.in_hbm)

    @property
    def op_name(self) -> str:
        """Its origin in the JAX program, "" if XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """computations by name, including the entry; runs: how often each runs; fused: those inside one kernel."""

    computations: Mapping[str, Computation]
    runs: Mapping[str, int]
    fused: frozenset[str]
    unknown_loops: tuple[str, ...]

    def running(self, inside_fusions: bool) -> Iterator[tuple[Instruction, Computation, int]]:
        """Each instruction that runs, with its computation and the number of runs."""
        for name, computation in self.computations.items():
            if self.runs[name] and (inside_fusions or name not in self.fused):
                for instruction in computation.values():
                    yield instruction, computation, self.runs[name]


def parse(text: str, every_branch: bool = False) -> Program:
    """The program of an HLO text. every_branch: each branch of a conditional counts as if it ran.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line[:1].isspace():
            if instruction := _instruction(line):
                current[instruction.name] = instruction
        elif line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+)", line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    if not entry:
        raise ValueError(f"the text of an HLO module has an ENTRY computation, got {text[:60]!r}")

    runs: Counter[str] = Counter({entry: 1})
    fused: set[str] = set()
    unknown: list[str] = []
    for name in reversed(computations):  # callers come after their callees
        for instruction in computations[name].values():
            rounds = 1
            if instruction.opcode == "while" and runs[name]:
                rounds = _trip_count(instruction, computations[name], computations)
                if not rounds:
                    unknown.append(instruction.name)
            callees = callees_of(instruction)
            if instruction.opcode == "conditional" and not every_branch:
                callees = [min(callees, key=lambda callee: len(computations[callee]))]
            for callee in callees:
                runs[callee] += runs[name] * max(rounds, 1)
                if instruction.opcode == "fusion" or name in fused:
                    fused.add(callee)
    return Program(computations, runs, frozenset(fused), tuple(unknown))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not opcode:
        return None
    opens = end + opcode.end() - 1
    closes = _closing(rest, opens)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opens:closes]))
    if opcode[1] in ("parameter", "constant"):  # its index, or its value
        operands = (rest[opens + 1 : closes],)
    return Instruction(head[2], rest[:end], opcode[1], operands, rest[closes + 1 :], bool(head[1]))


def _closing(text: str, opens: int) -> int:
    """Position at which the parenthesis at ``opens`` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opens):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _trip_count(loop: Instruction, caller: Computation, computations: Mapping[str, Computation]) -> int:
    """Trip count of a loop: as XLA notes it, or from ``i < constant`` with a constant start; 0 if neither is there."""
    if noted := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes):
        return int(noted[1])
    called = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
    condition, body = computations[called["condition"]], computations[called["body"]]
    test = result_of(condition)
    start = caller.get(loop.operands[0]) if loop.operands else None
    if test.opcode != "compare" or "direction=LT" not in test.attributes or start is None:
        return 0

    def number(instruction: Instruction | None) -> int | None:
        """The value of a constant, or the initial value of an element of the loop's state."""
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
        if instruction.opcode == "get-tuple-element" and start.opcode == "tuple":
            return number(_through_copies(start.operands[_index(instruction)], caller))
        return None

    first, limit = (number(_through_copies(name, condition)) for name in test.operands)
    counter = _through_copies(test.operands[0], condition)
    if limit is None or counter is None or counter.opcode != "get-tuple-element":
        return 0
    result = result_of(body)
    step = 1
    if result.opcode == "tuple":
        added = _through_copies(result.operands[_index(counter)], body)
        if added is not None and added.opcode == "add":
            steps = [_through_copies(name, body) for name in added.operands]
            step = next((int(s.operands[0]) for s in steps if s is not None and s.opcode == "constant"), 1)
    return max(-(-(limit - (first or 0)) // step), 0)


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    assert found is not None, instruction
    return int(found[1])


def _through_copies(name: str, computation: Computation) -> Instruction | None:
    """The instruction behind any copies and bitcasts."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def callees_of(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs, without the scalar function of a reduction."""
    found = []
    for kind, names in _CALLS.findall(instruction.attributes):
        if kind != "to_apply" or instruction.opcode == "call":
            found += [name.strip().lstrip("%") for name in names.strip("{}").split(",") if name.strip()]
    return found


def _buffer(found: re.Match[str]) -> Buffer:
    dtype, dims_text, layout = found.groups()
    dims = tuple(int(d.lstrip("<=")) for d in dims_text.split(",") if d)
    padded = list(dims)
    order, _, rest = (layout or "").partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile and dims:
        minor_to_major = [int(d) for d in order.split(",")]
        for dim, size in zip(minor_to_major, reversed(tile[1].split(",")), strict=False):
            padded[dim] = -(-padded[dim] // int(size)) * int(size)
    space = re.search(r"S\((\d+)\)", rest)
    return Buffer(
        dtype, dims, math.prod(padded) * bits(dtype) // 8, in_hbm=space is None and dtype != "token"
    )


def bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    found = re.match(r"[a-z]+(\d+)", dtype)  # bf16, s32, f8e4m3fn
    return 8 if found is None or dtype == "pred" else int(found[1]) * (2 if dtype.startswith("c") else 1)


def result_of(computation: Computation) -> Instruction:
    """The instruction whose value the computation returns."""
    return next(instruction for instruction in computation.values() if instruction.is_root)
