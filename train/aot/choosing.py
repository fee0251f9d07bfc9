"""Which meshes to try: all that divide the job, ranked by a quick estimate of memory and time."""

import contextlib
from dataclasses import dataclass

from dsa_jax.sharding import AXES, meshes_of
from train.aot.job import Job


def meshes(job: Job) -> list[dict[str, int]]:
    """All meshes of all devices that divide the job."""
    found = []
    for sizes in meshes_of(len(job.devices)):
        with contextlib.suppress(ValueError):
            job.check(sizes)
            found.append(sizes)
    return found


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A quick estimate without compiling: bytes of memory per device and seconds per step on this mesh."""

    mesh: dict[str, int]
    bytes: float
    seconds: float


# Counted in the compiled 671B steps: passes over the dispatch buffers; passes over the experts' matrices per row of the
# batch; bytes alive at once per gathered number.
DISPATCH_PASSES = {"train": 40, "warmup": 14, "prefill": 14, "decode": 14}
EXPERT_PASSES = {"train": 9, "warmup": 1, "prefill": 1, "decode": 0}
GATHERED_BYTES = {"train": 24, "warmup": 10, "prefill": 10, "decode": 10}


def estimate(job: Job, sizes: dict[str, int]) -> Estimate:
    """A quick estimate, good enough to rank meshes; the compiler decides whether one fits.

    Memory: state, or weights and cache, divided over all devices; what the backward pass keeps per layer; the tokens
    gathered from devices with other experts. Time, without overlap: arithmetic over all devices; weights, cache and
    dispatch buffers through main memory; over two links, gathered matrices, dispatch and combine, latents along the
    context axis, and sums over heads.
    """
    c, mode, chip, n = job.config, job.mode, job.chip, len(job.devices)
    data, expert, context, tensor = (sizes[axis] for axis in AXES)
    passes = 3 if job.stage else 1
    width = 2 if c.param_dtype == "bfloat16" else 4
    tokens = job.batch / (data * expert) * max(job.queries / context, 1)  # per device
    gathered = tokens * expert
    keys = job.batch / (data * expert) * job.seq_len
    latent = (c.kv_lora_rank + c.qk_rope_head_dim + c.index_head_dim * len(c.full_layers) / c.n_layers) * 2
    experts = 3 * c.d_model * c.d_expert * c.n_routed_experts * (c.n_moe_layers + c.n_mtp_layers)
    rest = c.param_count() - experts

    memory = c.param_count() * width * (4 if mode == "train" else 1) / n  # with two moments and gradients
    memory += gathered * c.d_model * GATHERED_BYTES[mode]
    one_layer = rest / (tensor * c.n_layers) + experts / (expert * tensor * c.n_layers)
    memory += one_layer * width * 2
    if mode == "train":
        # Each layer's input and each selection, twice where other layers share it.
        selections = c.n_layers if c.indexer_types is None else 2 * len(c.full_layers)
        memory += (2 * c.d_model * c.n_layers + 4 * c.index_topk * selections) * tokens
    if mode == "warmup":
        memory += keys * c.n_heads / tensor * (c.qk_head_dim + c.v_head_dim) * 6
    if not job.stage:
        memory += c.n_layers * latent * keys

    used = rest / tensor + experts / (expert * tensor)  # parameters per device
    dispatch = gathered * c.n_activated_experts * c.d_model * 2 * DISPATCH_PASSES[mode] * c.n_moe_layers
    moved = used * width * passes + dispatch + (0 if job.stage else c.n_layers * latent * keys)
    moved += job.batch / data * experts / (expert * tensor) * width * EXPERT_PASSES[mode]
    layer = tokens * c.d_model * (6 * (expert - 1) + 8 * (tensor > 1)) + keys * latent * (context > 1)
    received = (width * used * (1 - expert * tensor / n) + c.n_layers * layer) * passes
    seconds = sum(job.flops().values()) / n / chip.bf16_flops
    seconds += moved / chip.hbm_bandwidth + received / (2 * chip.link_bandwidth)
    return Estimate(mesh=sizes, bytes=memory, seconds=seconds)


def ranked(job: Job) -> list[Estimate]:
    """All meshes: those that should fit come first, and among them the fastest."""
    found = [estimate(job, sizes) for sizes in meshes(job)]
    return sorted(found, key=lambda e: (max(e.bytes / job.chip.hbm_bytes, 1.0), e.seconds))
