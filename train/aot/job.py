"""The step to compile: model, mode, sizes and devices, read from the options."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dsa_jax.checkpoint import from_hf, load_config
from dsa_jax.checkpoint.files import read_json_object
from dsa_jax.checkpoint.hf_config import file_named
from dsa_jax.config import ModelConfig, deepseek_v32, glm5, glm52, tiny
from dsa_jax.sharding import AXES, check_mesh, make_mesh
from train.aot.chips import CHIPS, Chip
from train.aot.options import Options
from train.config import Stage, indexer_warmup, sparse
from train.loss import switched
from train.measure.flops import forward_flops, training_flops
from train.private_jax import get_topology_desc

CONFIGS = {"deepseek-v3.2": deepseek_v32, "glm-5": glm5, "glm-5.2": glm52, "tiny": tiny}
STAGES = {"train": sparse(1000, lr=1e-5, index_lr=1e-5), "warmup": indexer_warmup(1000)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of a model on given devices: batch rows of seq_len tokens, of which a prefill computes chunk."""

    config: ModelConfig
    mode: str
    batch: int
    seq_len: int
    chunk: int
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def stage(self) -> Stage | None:
        return STAGES.get(self.mode)

    @property
    def queries(self) -> int:
        """Tokens per row that the step computes."""
        return {"prefill": self.chunk, "decode": 1}.get(self.mode, self.seq_len)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises ValueError for a mesh that does not divide the job; the message names one that does."""
        mesh = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
        seq_len = None if self.mode == "decode" else self.queries
        check_mesh(self.config, mesh, batch=self.batch, seq_len=seq_len)

    def flops(self) -> dict[str, float]:
        """Operations that one step needs, by part, on all devices together (``train.measure.flops``)."""
        if self.stage:
            parts = training_flops(switched(self.config, self.stage), self.seq_len, self.stage.trains)
            return {name: value * self.batch * self.seq_len for name, value in parts.items()}
        # What the last ``queries`` tokens of a row add to the tokens before them; logits for one token.
        before, head = self.seq_len - self.queries, 2.0 * self.config.d_model * self.config.vocab_size
        config = dataclasses.replace(self.config, attention_form="mqa") if before else self.config
        totals = {
            length: {name: length * value for name, value in forward_flops(config, length).items()}
            for length in (self.seq_len, before)
            if length
        }
        parts = {n: v - totals.get(before, {}).get(n, 0.0) for n, v in totals[self.seq_len].items()}
        return {name: value * self.batch for name, value in (parts | {"head": head}).items()}

    def routed_flops(self) -> float:
        """Of ``flops``, the products with routed experts, which the TPU's grouped kernel hides in a custom call."""
        c = self.config
        per_token = 6.0 * c.d_model * c.d_expert * c.n_activated_experts * (c.n_moe_layers + c.n_mtp_layers)
        return per_token * self.batch * self.queries * (3 if self.mode == "train" else 1)


def read_config(name: str, ignore: tuple[str, ...] = ()) -> ModelConfig:
    """The config with this name, of a config.json, or of a checkpoint folder.

    ignore: unknown keys of config.json to accept.

    Raises:
      ValueError: ``name`` is none of these, or its config.json cannot be read.
    """
    path = Path(name)
    if name in CONFIGS:
        return CONFIGS[name]()
    if path.is_file():
        values = read_json_object(path)
        with file_named(path):
            return from_hf(values, ignore=ignore)
    if path.is_dir():
        return load_config(path, ignore=ignore)
    raise ValueError(f"--config must be one of {', '.join(CONFIGS)}, a config.json or a folder, got {name!r}")


def read_job(options: Options) -> Job:
    """The job that the options describe.

    Raises:
      ValueError: the options contradict each other.
    """
    for name in ("seq_len", "batch", "layers", "chunk", "query_block", "tries"):
        value = getattr(options, name)
        if value is not None and not 1 <= value < 2**31:
            shown = value if abs(value) < 10**20 else "more than 20 digits"
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1 and below 2**31, got {shown}")
    if options.chunk and (options.mode != "prefill" or options.chunk > options.seq_len):
        raise ValueError(
            f"--chunk is for --mode prefill and at most --seq-len={options.seq_len}, got {options.chunk} and "
            f"--mode {options.mode}"
        )
    if options.plan and CHIPS[chip_and_count(options.topology)[0]].is_gpu:
        raise ValueError(f"--plan is for TPUs, got --topology {options.topology}")
    if options.suggest and options.mesh:
        raise ValueError(f"--suggest chooses the mesh itself, got --mesh {options.mesh} too")
    config = read_config(options.config, options.ignore)
    layers = options.layers or config.n_layers
    training = options.mode in STAGES
    config = dataclasses.replace(
        config,
        n_layers=layers,
        n_dense_layers=min(config.n_dense_layers, layers),
        indexer_types=config.indexer_types and config.indexer_types[:layers],
        n_mtp_layers=config.n_mtp_layers if training else 0,
        max_seq_len=max(config.max_seq_len, options.seq_len),
        param_dtype=options.param_dtype,
        query_block=options.query_block,
        remat="layer" if training else "none",
        implementation="xla",
    )
    chip, devices = read_topology(options.topology)
    return Job(
        config=config, mode=options.mode, batch=options.batch, seq_len=options.seq_len,
        chunk=options.chunk or options.seq_len, chip=CHIPS[chip], devices=devices,
    )  # fmt: skip


def chip_and_count(topology: str) -> tuple[str, int]:
    """ "tpu7x:2x2x1" -> ("tpu7x", 8): the kind of chip and the number of devices.

    Raises:
      ValueError: not of this form, an unknown chip, or more chips than a pod has.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"--topology must be CHIP:SHAPE with a chip of {', '.join(CHIPS)}, as in v5p:8x8x16, v6e:16x16, "
            f"tpu7x:4x4x8 or h200:8, got {topology!r}"
        )
    chip, chips = CHIPS[name], math.prod(map(int, shape.split("x")))
    if chips > chip.pod and not chip.is_gpu:
        raise ValueError(f"a pod of {name} has at most {chip.pod} chips, got {topology} with {chips}")
    return name, chips * chip.devices_per_chip


def read_topology(topology: str) -> tuple[str, tuple[Any, ...]]:
    """The kind of chip and the devices to compile for.

    Raises:
      ValueError: not a topology, a shape that no pod has, or libtpu is not installed.
    """
    chip, count = chip_and_count(topology)
    if CHIPS[chip].is_gpu:
        return chip, tuple(jax.devices("cpu")[:count])
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"compiling for {chip} needs libtpu, which is not installed: pip install 'dsa-jax[tpu]'"
        )
    try:
        description = get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        cubes = "x".join(str(-(-int(size) // 4) * 4) for size in topology.partition(":")[2].split("x"))
        raise ValueError(f"{str(error).splitlines()[0]}; {chip}:{cubes} would work") from error
    return chip, tuple(description.devices)


def read_mesh(text: str, job: Job) -> dict[str, int]:
    """ "data=16,expert=64" -> the size of each axis. data defaults to the devices that the others leave.

    Raises:
      ValueError: not of this form, an unknown axis, or a mesh that does not divide the devices or the job.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or axis in sizes:
            raise ValueError(
                f"--mesh takes each of {', '.join(AXES)} once, as in data=16,expert=64, got {part!r}"
            )
        sizes[axis] = int(size)
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    sizes.setdefault("data", max(len(job.devices) // max(others, 1), 1))
    make_mesh(devices=job.devices, **sizes)
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    job.check(sizes)
    return sizes
