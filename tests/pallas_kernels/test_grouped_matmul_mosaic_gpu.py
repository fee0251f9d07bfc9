"""The Hopper kernels of grouped_matmul: interpreted, compiled, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul import mosaic_gpu_product as product
from pallas_kernels.grouped_matmul.mosaic_gpu_plan import TASK_ROWS, Plan, make_tasks
from tests.pallas_kernels import sm90a

ON_GPU = jax.default_backend() == "gpu"
# Sizes of the groups, and rows behind the last one.
SIZES = {
    "ragged, with an empty group": ([5, 0, 130, 60], 5),
    "one row": ([0, 1, 0], 7),
    "all in one group": ([0, 0, 400, 0], 0),
    "whole tiles": ([192, 384, 0, 192], 0),
    "more groups than rows": ([0] * 20 + [1, 0, 2, 1] + [0] * 20, 4),
    "no row in a group": ([0, 0], 16),
}


def make(sizes, behind, X, Y, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    rows = sum(sizes) + behind
    return normal(rows, X), normal(len(sizes), X, Y), normal(rows, Y), jnp.asarray(sizes, jnp.int32)


def same(inputs, n_blocks=None):
    """Product and gradients equal float64's, and rows behind the last group give and get 0, whatever they hold."""
    rows, weights, d_out, sizes = inputs
    n = int(sizes.sum())
    spoil = lambda x: x.at[n:].set(jnp.nan)  # noqa: E731
    out, pull = jax.vjp(lambda r, w: mosaic_gpu.run(r, w, sizes, n_blocks), spoil(rows), weights)
    d_rows, d_weights = pull(spoil(d_out))
    group = np.repeat(np.arange(len(sizes)), sizes)
    r, w, d = (np.asarray(x, np.float64) for x in (rows[:n], weights, d_out[:n]))
    expected_weights = np.stack([r[group == e].T @ d[group == e] for e in range(len(sizes))])
    for ours, expected in (
        (out[:n], np.einsum("MX,MXY->MY", r, w[group])),
        (d_rows[:n], np.einsum("MY,MXY->MX", d, w[group])),
        (d_weights, expected_weights),
    ):
        difference = np.linalg.norm(np.asarray(ours, np.float64) - expected)
        assert difference <= 4e-3 * np.linalg.norm(expected)
    np.testing.assert_array_equal(np.asarray(jnp.concatenate([out[n:], d_rows[n:]], axis=1), np.float32), 0.0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_tasks_cover_every_row_once(sizes):
    sizes, behind = sizes
    plan = Plan(sum(sizes) + behind, len(sizes), common=128, columns=128, transposed=False, n_blocks=1)
    count, group, first, low, high = make_tasks(jnp.asarray(sizes), plan)
    n = int(count[0])
    assert n <= plan.tasks and (first % 8 == 0).all()
    expected = np.repeat(np.arange(len(sizes) + 1), [*sizes, behind])
    covered = [(row, g) for g, a, b in zip(group[:n], low[:n], high[:n], strict=True) for row in range(a, b)]
    assert covered == list(enumerate(expected))
    assert ((low >= first) & (high <= first + TASK_ROWS))[:n].all()


@pytest.mark.skipif(ON_GPU, reason="runs on CPU")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter needs jax 0.11")
@pytest.mark.parametrize("case", ["ragged, with an empty group", "all in one group"])
def test_the_pipeline_in_the_interpreter_equals_float64(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        same(make(*SIZES[case], 128, 256), n_blocks=3)


def product_and_gradients():
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731

    def run(rows, weights, d_out, sizes):
        out, pull = jax.vjp(lambda r, w: mosaic_gpu.run(r, w, sizes, 132), rows, weights)
        return out, pull(d_out)

    M, E, X, Y = 32768, 256, 7168, 2048
    return run, (of(M, X), of(E, X, Y), of(M, Y), of(E, dtype=jnp.int32))


def test_it_compiles_for_hopper_without_spills():
    kernels = sm90a.resources(f"{__name__}:product_and_gradients")
    assert len(kernels) == 3
    for used in kernels:
        assert used["registers"] * 3 * 128 <= sm90a.REGISTER_FILE and used["spills"] == 0, used


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("X", "Y"), [(128, 128), (512, 384), (1024, 512)])
@pytest.mark.parametrize("sizes", [*SIZES.values(), ([700, 3, 1, 999, 0, 64, 8], 1)])
def test_it_equals_float64(sizes, X, Y):
    same(make(*sizes, X, Y))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
def test_runs_are_bitwise_equal():
    run, _ = product_and_gradients()
    run, inputs = jax.jit(run), make([700, 3, 1, 999, 0, 64, 9], 0, 1024, 512)
    first = run(*inputs)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, run(*inputs), first)


def test_what_it_does_not_serve_is_refused_with_a_reason():
    rows, weights, _, sizes = make([3, 5], 0, 128, 256)
    run = lambda *x, **options: pk.grouped_matmul(*x, implementation="mosaic_gpu", **options)  # noqa: E731
    with pytest.raises(NotImplementedError, match="multiplies bfloat16, got rows of float32"):
        run(rows.astype(jnp.float32), weights, sizes)
    with pytest.raises(NotImplementedError, match="multiples of 128 and at least one row"):
        run(rows[:, :64], weights[:, :64], sizes)
    scales = jnp.ones((2, 1, 2), jnp.float32)
    with pytest.raises(NotImplementedError, match="weights of float8_e4m3fn"):
        run(rows, weights.astype(jnp.float8_e4m3fn), sizes, weight_scales=scales)


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a Hopper GPU")
def test_other_devices_are_refused():
    rows, weights, _, sizes = make([3, 5], 0, 128, 256)
    with pytest.raises(NotImplementedError, match="need jax 0.11|run on Hopper GPUs"):
        pk.grouped_matmul(rows, weights, sizes, implementation="mosaic_gpu")


@pytest.mark.parametrize("parts", [1, 2, 4, 6])
def test_shared_memory_is_not_overwritten_while_it_is_copied(parts, monkeypatch):
    """The interpreter copies at once and cannot show this: on a GPU one slot in two was lost in short tiles."""
    pending: list[int] = []

    def wait(allowed, wait_read_only):
        del pending[: max(len(pending) - allowed, 0)], wait_read_only

    monkeypatch.setattr(product.plgpu, "wait_smem_to_gmem", wait)
    slots = type("Slots", (), {"at": range(product.OUT_SLOTS)})
    for _ in range(4):  # tiles
        for nth in range(parts):
            slot = product.free_slot(slots, nth)
            assert slot not in pending
            pending.append(slot)
