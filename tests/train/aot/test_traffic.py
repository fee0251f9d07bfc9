"""The numbers read from compiled programs equal those counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.aot.hlo import Instruction, parse
from train.aot.traffic import alive_at_peak, collectives, hbm_traffic, product_flops

SHAPE = {"data": 2, "expert": 4}


def exchanged(text, shape=SHAPE):
    return {(e.kind, e.axes): (e.bytes, e.runs) for e in collectives(parse(text), shape)}


# -- a program that XLA compiled


@functools.cache
def compiled_loop():
    """Eight devices: 5 times a gather over expert [4 16] f32 and a sum over data; then one permutation."""
    if jax.device_count() != 8:
        pytest.skip("needs eight devices (see tests/conftest.py)")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):  # x [4 16], w [16 16] on each device
        def one_round(x, _):
            rows = lax.all_gather(x, "expert", tiled=True) @ w
            return lax.psum(jnp.tanh(rows), "data")[:4], None

        x, _ = lax.scan(one_round, x, length=5)
        return lax.ppermute(x, "expert", [(0, 1), (1, 0)])

    step = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(("data", "expert")), P()),
        out_specs=P(("data", "expert")),
        check_vma=False,
    )
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    arguments = (place((32, 16), P(("data", "expert"))), place((16, 16), P()))
    return jax.jit(step).lower(*arguments).compile().as_text()


def test_collectives_count_once_per_iteration_of_a_loop():
    block = 4 * 16 * 4  # bytes
    assert exchanged(compiled_loop()) == {
        ("all-gather", ("expert",)): (5 * 3 * block, 5),
        ("all-reduce", ("data",)): (5 * 2 * (4 * block) / 2, 5),
        ("collective-permute", ("expert",)): (block, 1),
    }


def test_products_count_once_per_iteration_of_a_loop():
    assert product_flops(parse(compiled_loop())) == 5 * 2 * 16 * 16 * 16


# -- the text that libtpu writes, which notes no trip counts

LOOP = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (param.1: f32[8,128]) -> f32[8,128] {
  %param.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %reduced = f32[8,128]{1,0:T(8,128)} all-reduce(%param.1), replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %kept = f32[2,128]{1,0:T(8,128)} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={2,128}
}

%body (state: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %state = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %limit = s32[] get-tuple-element(%state), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %scattered = f32[2,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%inner
  %whole = f32[8,128]{1,0:T(8,128)} all-gather(%scattered), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %result = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%next, %whole, %limit)
}

%condition (state.1: (s32[], f32[8,128], s32[])) -> pred[] {
  %state.1 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit.1 = s32[] get-tuple-element(%state.1), index=2
  ROOT %more = pred[] compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %one = s32[] constant(1)
  %nine = s32[] constant(9)
  %start = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%one, %x.1, %nine)
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_trip_counts_are_read_from_condition_start_and_step():
    program = parse(LOOP)
    assert program.runs["body"] == 4  # 1, 3, 5, 7
    assert program.runs["inner"] == 4
    assert program.unknown_loops == ()
    assert parse(LOOP.replace("%nine = s32[] constant(9)", "%nine = s32[] parameter(1)")).unknown_loops == (
        "loop",
    )


def test_an_all_reduce_followed_by_a_slice_is_a_reduce_scatter():
    block = 8 * 128 * 4
    assert exchanged(LOOP) == {
        ("reduce-scatter", ("expert",)): (4 * block * 3 / 4, 4),
        ("all-gather", ("expert",)): (4 * 3 * block / 4, 4),
    }


def test_the_shortest_branch_of_a_conditional_counts_or_all_branches():
    text = """%short (p.1: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0} parameter(0)
}

%long (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p.2, %p.2)
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %out = f32[8]{0} conditional(%i, %x, %x), branch_computations={%short, %long}
}
"""
    assert [parse(text).runs[name] for name in ("short", "long")] == [1, 0]
    assert [parse(text, every_branch=True).runs[name] for name in ("short", "long")] == [1, 1]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={}", ("data", "expert")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['a'=8] {'a'}", ("data", "expert")),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("expert",)),
        ("source_target_pairs={{0,1},{1,0}}", ("expert",)),
    ],
)
def test_mesh_axes_are_read_from_all_forms_of_groups(groups, axes):
    text = LOOP.replace("replica_groups=[2,4]<=[8]", groups)
    assert {e.axes for e in collectives(parse(text), SHAPE)} == {axes, ("expert",)}


def test_a_batch_written_as_a_dilated_window_adds_no_operations():
    """[8 64 32] times [8 32 16]: a window over 8 positions, only one of which hits the operand at a time."""
    text = """ENTRY %main (a: f32[8,64,32], b: f32[8,32,16]) -> f32[8,64,16] {
  %a = f32[8,64,32]{2,1,0} parameter(0)
  %b = f32[8,32,16]{2,1,0} parameter(1)
  ROOT %c = f32[8,64,16]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
"""
    text = text.replace("WINDOW", "window={size=8 stride=7 pad=0_0 lhs_dilate=8}")
    assert product_flops(parse(text)) == 2 * 8 * 64 * 32 * 16


def test_traffic_counts_slices_and_updates_at_their_own_size_and_nothing_on_chip():
    text = """%sliced (p0: f32[64,8,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,128}
  ROOT %row = f32[8,128]{1,0:T(8,128)} bitcast(%slice)
}

ENTRY %main (stack: f32[64,8,128], i: s32[]) -> f32[64,8,128] {
  %stack = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  %row.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %more = f32[1,8,128]{2,1,0:T(8,128)} exponential(%row.1), metadata={op_name="jit(step)/exp"}
  ROOT %new = f32[64,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%stack, %more, %i, %i, %i)
}
"""
    block = 8 * 128 * 4
    # a slice into on-chip memory; from there to main memory; read again and written into its place
    assert hbm_traffic(parse(text)) == block + block + 2 * block

    peak = "  Live ranges at 3 (peak):\n    stack{}: 262144 bytes (cumulative: 1 bytes)\n"
    peak += "    row.1{}: 4096 bytes (cumulative: 1 bytes)\n    more{}: 4096 bytes (cumulative: 1 bytes)\n"
    alive = alive_at_peak(parse(text), peak)
    assert [(a.bytes, a.shape, a.opcode, a.op_name) for a in alive] == [
        (262144, "f32[64,8,128]", "parameter", ""),
        (4096, "f32[1,8,128]", "exponential", "jit(step)/exp"),
    ]


def test_an_operand_that_an_inner_fusion_only_reshapes_is_read():
    text = """%reshape (q0: f32[64,1024]) -> f32[64,8,128] {
  %q0 = f32[64,1024]{1,0:T(8,128)} parameter(0)
  ROOT %b = f32[64,8,128]{2,1,0:T(8,128)} bitcast(%q0)
}

%multiply (p0: f32[64,1024], p1: f32[8,128]) -> f32[64,8,128] {
  %p0 = f32[64,1024]{1,0:T(8,128)} parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %inner = f32[64,8,128]{2,1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%reshape
  %wide = f32[64,8,128]{2,1,0:T(8,128)} broadcast(%p1), dimensions={1,2}
  ROOT %product = f32[64,8,128]{2,1,0:T(8,128)} multiply(%inner, %wide)
}

ENTRY %main (x: f32[64,1024], y: f32[8,128]) -> f32[64,8,128] {
  %x = f32[64,1024]{1,0:T(8,128)} parameter(0)
  %y = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %out = f32[64,8,128]{2,1,0:T(8,128)} fusion(%x, %y), kind=kLoop, calls=%multiply
}
"""
    assert hbm_traffic(parse(text)) == 4 * (64 * 1024 + 8 * 128 + 64 * 1024)


def test_a_fusion_that_ends_in_another_writes_what_that_one_updates():
    text = """%scatter (q0: f32[4096,128], q1: s32[64], q2: f32[64,128]) -> f32[4096,128] {
  %q0 = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %q1 = s32[64]{0:T(256)} parameter(1)
  %q2 = f32[64,128]{1,0:T(8,128)} parameter(2)
  ROOT %s = f32[4096,128]{1,0:T(8,128)} scatter(%q0, %q1, %q2), to_apply=%add
}

%sorted (p0: f32[4096,128], p1: s32[64], p2: f32[64,128]) -> f32[4096,128] {
  %p0 = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[64]{0:T(256)} parameter(1)
  %p2 = f32[64,128]{1,0:T(8,128)} parameter(2)
  ROOT %inner = f32[4096,128]{1,0:T(8,128)} fusion(%p0, %p1, %p2), kind=kCustom, calls=%scatter
}

ENTRY %main (x: f32[4096,128], i: s32[64], y: f32[64,128]) -> f32[4096,128] {
  %x = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %i = s32[64]{0:T(256)} parameter(1)
  %y = f32[64,128]{1,0:T(8,128)} parameter(2)
  ROOT %out = f32[4096,128]{1,0:T(8,128)} fusion(%x, %i, %y), kind=kCustom, calls=%sorted
}
"""
    assert hbm_traffic(parse(text)) == 256 * 4 + 2 * 64 * 128 * 4


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("bf16[3,100]{0,1:T(8,128)(2,1)}", 128 * 104 * 2),
        ("f32[5]{0:T(256)}", 256 * 4),
        ("pred[7]{0}", 7),
        ("(s32[], u32[4]{0:S(1)})", 4 + 16),
        ("f8e4m3fn[2,2]{1,0}", 4),
    ],
)
def test_arrays_have_the_size_of_their_tiles(shape, size):
    assert sum(buffer.bytes for buffer in Instruction("x", shape, "add", (), "").buffers) == size


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY computation, got 'HloModule x'"):
        parse("HloModule x")
