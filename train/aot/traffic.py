"""What a compiled program does: collectives, operations, memory traffic. All numbers are per device."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from train.aot.hlo import Buffer, Computation, Instruction, Program, bits, callees_of, result_of

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# These move no data: names, control flow, and the ends of operations that were counted at their start.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier async-start async-update async-done".split()
)

# -- collectives


class Exchange(NamedTuple):
    """Collectives of one kind over the same mesh axes. bytes: received per device, over all runs."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    runs: int


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Exchange]:
    """Collectives by kind and mesh axes, most bytes first.

    For an operand of b bytes and groups of n devices, each device receives: all-gather b (n - 1); reduce-scatter and
    all-to-all b (n - 1) / n; all-reduce twice that; collective-permute b.
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
    """XLA:TPU writes a reduce-scatter as a fusion of an all-reduce and the slice that each device keeps."""
    users = [user for user in computation.values() if instruction.name in user.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _dense_bytes(buffer: Buffer) -> float:
    return math.prod(buffer.dims) * bits(buffer.dtype) / 8


def _axes(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes along which the devices of a group differ, devices per group)."""
    groups = _groups(attributes, math.prod(mesh_shape.values()))
    coordinates = np.stack(np.unravel_index(groups.reshape(-1), tuple(mesh_shape.values())), -1)
    coordinates = coordinates.reshape(*groups.shape, -1)
    differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, d in zip(mesh_shape, differs, strict=True) if d), groups.shape[1]


def _groups(attributes: str, n_devices: int) -> np.ndarray:
    """[groups, devices per group], as positions in the mesh.

    XLA writes a list, an iota ``[2,4]<=[4,2]T(1,0)``, or axes of a mesh of its own, ``mesh['a'=4,'b'=2] {'b'}``.
    There ``'a':(2)2`` is a part of an axis: the factor 2 that follows the first factor 2.
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
    shape: list[int] = []  # each axis in three factors: before the part, the part, after it
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
    """2 per multiply-add of all matrix products, over all runs, including recomputed, masked and padded ones.

    Products inside custom calls (kernels of the chip) are invisible here: ``custom_calls`` lists those.
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
    """Number of runs of each custom-call target."""
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
    """XLA:TPU writes products as convolutions, and a batch as a window with one position that is not padding."""
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

    Each kernel is taken to read its operands once and to write its results once. If it only slices or gathers from an
    operand, or updates a result in place, only that part counts. Data that stay on chip between kernels (XLA's
    memory space 1) are free. Kernels that read an operand several times move more than this says.
    """
    total = 0.0
    for instruction, computation, runs in program.running(inside_fusions=False):
        total += runs * _touched(instruction, computation, program)
    return total


def _touched(instruction: Instruction, computation: Computation, program: Program) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "custom-call" and ("AllocateBuffer" in instruction.attributes or callees_of(instruction)):
        return 0.0  # moves nothing, or the computation that it calls is counted instead
    operands = [computation[name] for name in instruction.operands if name in computation]
    read = [float(operand.hbm_bytes) for operand in operands]
    written = float(instruction.hbm_bytes)
    if opcode.endswith("-start"):  # its result includes the operands
        written = max(written - sum(read), 0.0)
    elif opcode in ("dynamic-slice", "gather", "slice"):
        read[0] = min(read[0], float(sum(buffer.bytes for buffer in instruction.buffers)))
    elif opcode == "dynamic-update-slice":
        read[0], written = 0.0, read[1]
    elif opcode == "scatter":
        updates = sum(read[(len(read) + 1) // 2 :])
        read[0], written = updates, updates
    elif opcode == "fusion":
        body = program.computations[callees_of(instruction)[0]]
        for number, size in enumerate(read):
            read[number] = min(size, _read_of(_parameter(number, body), body, size, program))
        written = min(written, _written_by(body, program))
    return sum(read) + written


def _read_of(source: Instruction, body: Computation, whole: float, program: Program) -> float:
    """Bytes of a fusion's parameter ``source`` that its users read; ``whole`` is its size."""
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
            inner = program.computations[callees_of(user)[0]]
            parameter = _parameter(user.operands.index(source.name), inner)
            total += _read_of(parameter, inner, whole, program)
            if _without_bitcasts(result_of(inner), inner) is parameter:  # passed on in another shape
                total += _read_of(user, body, whole, program)
        elif not (first and user.opcode in ("dynamic-update-slice", "scatter")):
            return whole
    return total


def _parameter(number: int, body: Computation) -> Instruction:
    return next(i for i in body.values() if i.opcode == "parameter" and int(i.operands[0]) == number)


def _without_bitcasts(instruction: Instruction, body: Computation) -> Instruction:
    """The instruction behind any bitcasts."""
    while instruction.opcode == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction


def _written_by(body: Computation, program: Program) -> float:
    """Bytes that a fusion writes. Of a result that updates an operand in place, only the update counts."""
    root = result_of(body)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for result in (_without_bitcasts(result, body) for result in results):
        if result.opcode == "fusion":
            total += _written_by(program.computations[callees_of(result)[0]], program)
            continue
        update = {"dynamic-update-slice": 1, "scatter": -1}.get(result.opcode)
        written = result if update is None else body[result.operands[update]]
        total += sum(buffer.bytes for buffer in written.buffers)
    return total


class Alive(NamedTuple):
    """A value in memory at the peak. The opcode "parameter" marks arguments of the program."""

    bytes: int
    shape: str
    opcode: str
    op_name: str


def alive_at_peak(program: Program, live_range: str) -> list[Alive]:
    """The values in memory at the peak, largest first, from XLA's dump "...-live-range.txt"."""
    _, _, peak = live_range.partition("(peak):")
    instructions = {i.name: i for computation in program.computations.values() for i in computation.values()}
    found = []
    for name, shape_index, size in re.findall(
        r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes \(cumulative", peak, re.MULTILINE
    ):
        instruction = instructions.get(name)
        if instruction is None:
            found.append(Alive(int(size), name, "?", ""))
            continue
        index = int(shape_index.split(",")[0]) if shape_index else 0
        buffers = instruction.buffers
        buffer = buffers[index] if index < len(buffers) else None
        if buffer is None or buffer.in_hbm:
            shape = instruction.shape[:40] if buffer is None else str(buffer)
            found.append(Alive(int(size), shape, instruction.opcode, instruction.op_name))
    return sorted(found, key=lambda alive: -alive.bytes)
