"""The chips that programs are compiled for or estimated on: memory, arithmetic, network."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates of one kind of chip, per JAX device. FLOPs per second are dense; bandwidths are in bytes per second.

    hbm_bytes: what a program may use. links: to neighbours. link_bandwidth: per link and direction. pod: the most
    chips in one network. devices_per_chip: JAX devices per chip. source: where the numbers are from.
    """

    hbm_bytes: float
    bf16_flops: float
    fp8_flops: float | None
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    pod: int
    source: str
    devices_per_chip: int = 1
    is_gpu: bool = False


_GIB = 2**30
_LIBTPU = "HBM: the limit that libtpu 0.0.52 names when it refuses a program"

# The published ICI bandwidth of a TPU is the sum over both directions of all links of a chip.
CHIPS = {
    "v5e": Chip(
        hbm_bytes=15.75 * _GIB, bf16_flops=197e12, fp8_flops=None, hbm_bandwidth=819e9, links=4,
        link_bandwidth=50e9, pod=256, source=f"docs.cloud.google.com/tpu/docs/v5e; {_LIBTPU}",
    ),
    "v5p": Chip(
        hbm_bytes=95.73 * _GIB, bf16_flops=459e12, fp8_flops=None, hbm_bandwidth=2765e9, links=6,
        link_bandwidth=100e9, pod=8960, source=f"docs.cloud.google.com/tpu/docs/v5p; {_LIBTPU}",
    ),
    "v6e": Chip(
        hbm_bytes=31.24 * _GIB, bf16_flops=918e12, fp8_flops=918e12, hbm_bandwidth=1638e9, links=4,
        link_bandwidth=100e9, pod=256, source=f"docs.cloud.google.com/tpu/docs/tpu7x (its comparison); {_LIBTPU}",
    ),
    "tpu7x": Chip(
        hbm_bytes=94.74 * _GIB, bf16_flops=2307e12 / 2, fp8_flops=4614e12 / 2, hbm_bandwidth=7380e9 / 2, links=6,
        link_bandwidth=100e9 / 2, pod=9216, devices_per_chip=2,
        source=f"docs.cloud.google.com/tpu/docs/tpu7x, halved: a chip is two devices; {_LIBTPU}",
    ),
    "h200": Chip(
        hbm_bytes=141e9, bf16_flops=989e12, fp8_flops=1979e12, hbm_bandwidth=4.8e12, links=1,
        link_bandwidth=450e9, pod=8, is_gpu=True,
        source="NVIDIA's data sheet of the H200 SXM, without sparsity; NVLink inside a node",
    ),
}  # fmt: skip
