"""What a compiled program does, read from the text of its optimised HLO: collectives, operations, memory traffic.

XLA's ``cost_analysis`` counts the body of a loop once. Here an instruction counts as often as it runs: the product
of the rounds of the loops around it. Of a conditional the shortest branch counts, or every one if that is asked for; a
loop that does not count up to a constant counts once and is listed in ``Program.unknown_loops``. All numbers are those
of one device.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# They move nothing: names, control, and the second halves of what was counted when it started.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier async-start async-update async-done".split()
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Buffer:
    """An array as it lies in memory, tile padding included; ``in_hbm``: in the chip's main memory."""

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
        """Where in the JAX program it comes from, "" if XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """computations by name, the entry's among them; runs: how often each runs; fused: those inside one kernel."""

    computations: Mapping[str, Computation]
    runs: Mapping[str, int]
    fused: frozenset[str]
    unknown_loops: tuple[str, ...]

    def running(self, inside_fusions: bool) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that runs, with its computation and how often."""
        for name, computation in self.computations.items():
            if self.runs[name] and (inside_fusions or name not in self.fused):
                for instruction in computation.values():
                    yield instruction, computation, self.runs[name]


def parse(text: str, every_branch: bool = False) -> Program:
    """The program whose HLO text this is. every_branch: each branch of a conditional counts as if it ran.

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
    for name in reversed(computations):  # callers stand behind what they call
        for instruction in computations[name].values():
            rounds = 1
            if instruction.opcode == "while" and runs[name]:
                rounds = _rounds(instruction, computations[name], computations)
                if not rounds:
                    unknown.append(instruction.name)
            callees = _callees(instruction)
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
    if opcode[1] in ("parameter", "constant"):  # its number, or its value
        operands = (rest[opens + 1 : closes],)
    return Instruction(head[2], rest[:end], opcode[1], operands, rest[closes + 1 :], bool(head[1]))


def _closing(text: str, opens: int) -> int:
    """Where the parenthesis at ``opens`` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opens):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _rounds(loop: Instruction, caller: Computation, computations: Mapping[str, Computation]) -> int:
    """How often a loop's body runs: as XLA notes it, or of ``i < constant`` with i from a constant; 0 if neither."""
    if noted := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes):
        return int(noted[1])
    called = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
    condition, body = computations[called["condition"]], computations[called["body"]]
    test = next(instruction for instruction in condition.values() if instruction.is_root)
    start = caller.get(loop.operands[0]) if loop.operands else None
    if test.opcode != "compare" or "direction=LT" not in test.attributes or start is None:
        return 0

    def number(instruction: Instruction | None) -> int | None:
        """The value of a constant; of an element of the loop's state, that with which it starts."""
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
    result = next(instruction for instruction in body.values() if instruction.is_root)
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
    """What an instruction's value is a copy of."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _callees(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; not the scalar functions of a reduction."""
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
        dtype, dims, math.prod(padded) * _bits(dtype) // 8, in_hbm=space is None and dtype != "token"
    )


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    found = re.match(r"[a-z]+(\d+)", dtype)  # bf16, s32, f8e4m3fn
    return 8 if found is None or dtype == "pred" else int(found[1]) * (2 if dtype.startswith("c") else 1)


# -- collectives


class Exchange(NamedTuple):
    """What collectives of one kind exchange over some mesh axes. bytes: what a device receives, over all runs."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    runs: int


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Exchange]:
    """By kind and mesh axes, most bytes first. A device receives, of an operand of b bytes and in groups of n:

    all-gather b (n - 1); reduce-scatter and all-to-all b (n - 1) / n; all-reduce twice that; collective-permute b.
    """
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0])
    for instruction, computation, runs in program.running(inside_fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if kind == "all-reduce" and _becomes_a_slice(instruction, computation):
            kind = "reduce-scatter"
        operands = [computation[name] for name in instruction.operands if name in computation]
        held = sum(_dense_bytes(buffer) for operand in operands for buffer in operand.buffers)
        axes, n = _axes(instruction.attributes, mesh_shape)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        total = totals[kind, axes]
        total[0] += held * share.get(kind, (n - 1) / n) * runs
        total[1] += runs
    found = [Exchange(kind, axes, total[0], int(total[1])) for (kind, axes), total in totals.items()]
    return sorted(found, key=lambda exchange: -exchange.bytes)


def _becomes_a_slice(instruction: Instruction, computation: Computation) -> bool:
    """XLA:TPU writes a reduce-scatter as a fusion of an all-reduce and the slice that a device keeps."""
    users = [user for user in computation.values() if instruction.name in user.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _dense_bytes(buffer: Buffer) -> float:
    return math.prod(buffer.dims) * _bits(buffer.dtype) / 8


def _axes(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which a group differs, and the devices in a group."""
    groups = _groups(attributes, math.prod(mesh_shape.values()))
    places = np.stack(np.unravel_index(groups.reshape(-1), tuple(mesh_shape.values())), -1)
    places = places.reshape(*groups.shape, -1)
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, d in zip(mesh_shape, differs, strict=True) if d), groups.shape[1]


def _groups(attributes: str, n_devices: int) -> np.ndarray:
    """[groups, devices of each], by position in the mesh: a list, an iota ``[2,4]<=[4,2]T(1,0)``, or the axes of a
    mesh of XLA's own, ``mesh['a'=4,'b'=2] {'b'}``, of which ``'a':(2)2`` is a part: the 2 behind the first 2.
    """
    if pairs := re.search(r"source_target_pairs=\{([{}\d,]*)\}", attributes):
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = ([int(x) for x in text.split(",")] if text else None for text in iota.groups())
        assert shape is not None and dims is not None
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids if order is None else ids.transpose(order)).reshape(shape)
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\([^)]*\))? ?\{([^}]*)\}", attributes
    ):
        return _groups_of_axes(named[1], named[2])
    listed = re.search(r"replica_groups=\{([{}\d,]*)\}", attributes)
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    return np.array([group.split(",") for group in groups] or [range(n_devices)], int)


def _groups_of_axes(mesh: str, axes: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
    parts = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", axes)
    ]
    shape: list[int] = []  # every axis in three: what comes before the part, the part, what follows
    chosen = []
    for name, size in sizes.items():
        of_axis = sorted((before, part) for other, before, part in parts if other == name)
        done = 1
        for before, part in of_axis:
            shape += [before // done, part]
            chosen.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    ids = np.arange(math.prod(sizes.values())).reshape(shape)
    rest = [d for d in range(len(shape)) if d not in chosen]
    return ids.transpose(rest + chosen).reshape(-1, math.prod(shape[d] for d in chosen))


# -- operations


def product_flops(program: Program) -> float:
    """2 per multiplication and addition of all matrix products, over all runs: recomputed, masked and padded ones too.

    Products inside custom calls (a chip's own kernels) are not seen: ``custom_calls`` lists them.
    """
    total = 0.0
    for instruction, computation, runs in program.running(inside_fusions=True):
        if instruction.opcode in ("dot", "convolution"):
            lhs, rhs = (computation[name].buffers[0].dims for name in instruction.operands[:2])
            out = instruction.buffers[0].dims
            count = _dot_terms if instruction.opcode == "dot" else _convolution_terms
            total += 2.0 * count(lhs, rhs, out, instruction.attributes) * runs
    return total


def custom_calls(program: Program) -> dict[str, int]:
    """How often each custom-call target runs."""
    found: Counter[str] = Counter()
    for instruction, _, runs in program.running(inside_fusions=True):
        if instruction.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            found[target[1] if target else "?"] += runs
    return dict(found.most_common())


def _dot_terms(lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], attributes: str) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    sizes = [lhs[int(d)] for d in contracted[1].split(",") if d] if contracted else []
    return float(math.prod(out)) * math.prod(sizes)


def _convolution_terms(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> float:
    """XLA:TPU writes products as convolutions, a batch as a window of which one position is not padding."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))
    if not labels:
        return float(math.prod(out))
    terms = float(out[labels[3].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")])
    spatial = sorted(c for c in labels[3] if c.isdigit())
    for i, dim in enumerate(spatial):

        def part(name: str, default: str, i: int = i) -> str:
            return window[name].split("x")[i] if name in window else default

        low = int(part("pad", "0_0").split("_")[0])
        dilation = int(part("lhs_dilate", "1"))
        positions = np.arange(out[labels[3].index(dim)]) * int(part("stride", "1"))
        reach = (lhs[labels[1].index(dim)] - 1) * dilation
        inside = 0
        for tap in range(int(part("size", "1"))):
            at = positions + tap * int(part("rhs_dilate", "1")) - low
            inside += int(((at >= 0) & (at <= reach) & (at % dilation == 0)).sum())
        terms *= inside
    return terms


# -- memory


def hbm_traffic(program: Program) -> float:
    """Bytes read from and written to main memory by all kernels, over all runs.

    A kernel reads each operand once and writes each result once; of an operand that it only slices or gathers
    from, and of a result that it updates in place, only that part counts. What stays on chip between kernels
    (XLA's memory space 1) is free. Kernels that read an operand several times move more.
    """
    total = 0.0
    for instruction, computation, runs in program.running(inside_fusions=False):
        total += runs * _touched(instruction, computation, program)
    return total


def _touched(instruction: Instruction, computation: Computation, program: Program) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "custom-call" and ("AllocateBuffer" in instruction.attributes or _callees(instruction)):
        return 0.0  # nothing is moved, or by the computation that it stands for
    operands = [computation[name] for name in instruction.operands if name in computation]
    read = [float(operand.hbm_bytes) for operand in operands]
    written = float(instruction.hbm_bytes)
    if opcode.endswith("-start"):  # its result holds the operands too
        written = max(written - sum(read), 0.0)
    elif opcode in ("dynamic-slice", "gather", "slice"):
        read[0] = min(read[0], float(sum(buffer.bytes for buffer in instruction.buffers)))
    elif opcode == "dynamic-update-slice":
        read[0], written = 0.0, read[1]
    elif opcode == "scatter":
        updates = sum(read[(len(read) + 1) // 2 :])
        read[0], written = updates, updates
    elif opcode == "fusion":
        body = program.computations[_callees(instruction)[0]]
        parameters = {int(i.operands[0]): i for i in body.values() if i.opcode == "parameter"}
        for number, size in enumerate(read):
            read[number] = min(size, _read_of(parameters[number], body, size, program))
        written = min(written, _written_by(body))
    return sum(read) + written


def _read_of(source: Instruction, body: Computation, whole: float, program: Program) -> float:
    """Bytes of a fusion's parameter that its users read."""
    total = 0.0
    for user in body.values():
        if user.opcode == "parameter" or source.name not in user.operands:
            continue
        first = user.operands[0] == source.name
        if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
            total += _read_of(user, body, whole, program)
        elif first and user.opcode in ("dynamic-slice", "gather", "slice"):
            total += sum(buffer.bytes for buffer in user.buffers)
        elif user.opcode == "fusion":
            inner = program.computations[_callees(user)[0]]
            parameters = {int(i.operands[0]): i for i in inner.values() if i.opcode == "parameter"}
            parameter = parameters[user.operands.index(source.name)]
            total += _read_of(parameter, inner, whole, program)
            if _is_result(parameter, inner):
                total += _read_of(user, body, whole, program)
        elif not (first and user.opcode in ("dynamic-update-slice", "scatter")):
            return whole
    return total


def _is_result(source: Instruction, body: Computation) -> bool:
    """Whether a fusion only hands on this parameter, in another shape."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    while root.opcode == "bitcast":
        root = body[root.operands[0]]
    return root is source


def _written_by(body: Computation) -> float:
    """Bytes that a fusion writes: a result that is an updated operand counts with the update."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for result in results:
        while result.opcode == "bitcast":
            result = body[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            result = body[result.operands[1]]
        elif result.opcode == "scatter":
            result = body[result.operands[-1]]
        total += sum(buffer.bytes for buffer in result.buffers)
    return total


class Alive(NamedTuple):
    """A value that occupies memory when most is occupied; "parameter" as opcode: an argument of the program."""

    bytes: int
    shape: str
    opcode: str
    op_name: str


def alive_at_peak(program: Program, live_range: str) -> list[Alive]:
    """The values that live when most memory is in use, largest first, from XLA's dump "...-live-range.txt"."""
    _, _, peak = live_range.partition("(peak):")
    instructions = {i.name: i for computation in program.computations.values() for i in computation.values()}
    found = []
    for name, place, size in re.findall(
        r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes \(cumulative", peak, re.MULTILINE
    ):
        instruction = instructions.get(name)
        if instruction is None:
            found.append(Alive(int(size), name, "?", ""))
            continue
        index = int(place.split(",")[0]) if place else 0
        buffers = instruction.buffers
        buffer = buffers[index] if index < len(buffers) else None
        if buffer is None or buffer.in_hbm:
            shape = instruction.shape[:40] if buffer is None else str(buffer)
            found.append(Alive(int(size), shape, instruction.opcode, instruction.op_name))
    return sorted(found, key=lambda alive: -alive.bytes)
