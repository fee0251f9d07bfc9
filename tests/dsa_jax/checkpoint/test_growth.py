"""Work grows with the number of tensors, not with its square: lines of our code are counted, no time is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_jax.checkpoint.hf_plan import HfOptions, plan_hf
from dsa_jax.checkpoint.save import ParamsTensors
from tests.dsa_jax.checkpoint.growth import config_of, lines_of, params_of, plans

ROOT = Path(__file__).parents[3]


def assert_linear(counts: dict[int, dict[str, int]]) -> None:
    """Each tensor more costs as much between the larger sizes as between the smaller ones, within 10 %."""
    small, middle, large = sorted(counts)
    for name in counts[small]:
        first = (counts[middle][name] - counts[small][name]) / (middle - small)
        second = (counts[large][name] - counts[middle][name]) / (large - middle)
        assert second < 1.1 * first, f"{name}: {first:.1f} lines per expert, then {second:.1f}"


def counted(*sizes: int) -> dict[int, dict[str, int]]:
    """Number of experts -> operation -> lines. Each expert has three tensors."""
    command = [sys.executable, "-m", "tests.dsa_jax.checkpoint.growth", *map(str, sizes)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return {int(size): found for size, found in json.loads(done.stdout).items()}


def test_work_grows_linearly_with_the_number_of_tensors() -> None:
    assert_linear(counted(40, 120, 360))


@pytest.mark.slow
def test_work_grows_linearly_from_1_000_to_10_000_tensors() -> None:
    assert_linear(counted(333, 1_000, 3_333))


def test_plans_grow_linearly_to_3_000_tensors() -> None:
    assert_linear({experts: plans(experts) for experts in (100, 300, 1_000)})


@pytest.mark.slow
def test_plans_grow_linearly_to_100_000_tensors() -> None:
    assert_linear({experts: plans(experts) for experts in (333, 3_333, 33_333)})


def test_the_count_notices_a_sum_over_everything_for_each_tensor() -> None:
    def quadratic(experts: int) -> int:
        config = config_of(experts)
        tensors = ParamsTensors(Path("nowhere"), params_of(config), config, mtp_copies=True)
        plan = plan_hf(tensors, config, {}, HfOptions())
        return lines_of(lambda: [plan.n_bytes for _ in tensors.entries])

    with pytest.raises(AssertionError, match="lines per expert"):
        assert_linear({experts: {"sum": quadratic(experts)} for experts in (5, 10, 20)})
