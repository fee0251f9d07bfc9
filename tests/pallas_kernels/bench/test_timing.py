"""Which method a time comes from: decided by medians, with injected timings."""

import itertools

import pytest

from pallas_kernels.bench.command import HEADING, line
from pallas_kernels.bench.timing import LONG, SHORT, Profile, choose, profile_of_events

DECODE = Profile(kernels=13.6e-6, span=15e-6)


def chosen(walls, profiles, one_call=1e-4):
    """choose() with these wall times of queued calls and these profiles, each list repeated."""
    walls, profiles = itertools.cycle(walls), itertools.cycle(profiles)
    ones = itertools.cycle(one_call if isinstance(one_call, list) else [one_call])
    return choose(lambda calls: next(ones if calls == 1 else walls), lambda: next(profiles))


@pytest.mark.parametrize(
    "walls",
    [[138e-6], [900e-6, 138e-6, 138e-6, 138e-6, 138e-6], [900e-6, 900e-6, 20e-6, 20e-6, 20e-6], [900e-6]],
    ids=["quiet", "one noisy probe", "two noisy probes", "a host that is slow throughout"],
)
def test_a_short_decode_is_the_sum_of_its_kernels_however_noisy_the_host_is(walls):
    """The wall clock has 138 us and more for a decode of 13.6."""
    found = chosen(walls, [DECODE])
    assert (found.method, found.seconds) == ("kernel sum", 13.6e-6)


@pytest.mark.parametrize("noisy", [Profile(kernels=5e-3, span=6e-3), Profile(kernels=1e-6, span=2e-6), None])
def test_one_noisy_profile_decides_neither_the_method_nor_the_number(noisy):
    found = chosen([138e-6], [noisy, DECODE, DECODE])
    assert (found.method, found.seconds) == ("kernel sum", 13.6e-6)


def test_a_call_of_many_kernels_is_timed_by_the_wall_clock_and_its_gaps_are_shown():
    found = chosen([2.1e-3], [Profile(kernels=1.8e-3, span=2e-3)])
    assert (found.method, found.seconds) == ("queued calls", 2.1e-3)
    assert found.as_json()["gaps_us"] == pytest.approx(200)


def test_one_noisy_call_does_not_put_a_function_on_single_calls():
    assert chosen([1e-3], [None], one_call=[3 * LONG, 1e-3, 1e-3]).method == "queued calls"
    found = chosen([1e-3], [None], one_call=[2 * LONG, 3 * LONG, 2 * LONG])
    assert (found.method, found.seconds, found.profile) == ("one call", 2 * LONG, None)


def test_without_a_gpu_there_is_no_kernel_sum():
    found = chosen([SHORT / 100], [None])
    assert (found.method, found.seconds) == ("queued calls", SHORT / 100)
    assert [found.as_json()[name] for name in ("kernels_us", "span_us", "gaps_us")] == [None] * 3


def test_span_and_sum_of_two_calls_with_two_kernels_each():
    """[0, 10) [12, 22) and [30, 40) [41, 51) microseconds, in any order."""
    events = [(30e3, 10e3), (0.0, 10e3), (12e3, 10e3), (41e3, 10e3)]
    found = profile_of_events(events, calls=2)
    assert (found.kernels, found.span) == (pytest.approx(20e-6), pytest.approx(25.5e-6))
    assert profile_of_events([], calls=2) is None


def test_a_line_of_the_table_says_how_it_was_timed():
    row = {
        "operation": "sparse_mla", "name": "decode", "error": {"out": 1e-3}, "rate": 1.0, "unit": "TB/s",
        "share": 0.5, "milliseconds": 0.0136, "us_per_query": 0.1,
    }  # fmt: skip
    text = line(row | chosen([138e-6], [DECODE]).as_json())
    assert "kernel sum" in text and text.index("kernel sum") == HEADING.index("measured by")
    assert " 1.4 " in text  # us of gaps: 15 - 13.6
