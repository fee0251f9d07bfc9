"""load_params from every kind of checkpoint: sharded equals unsharded, and weights kept in FP8 compute the same."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsa_jax.checkpoint import ReadCount, convert, load_params, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.config import tiny
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.transformer import Transformer
from tests.vectors.weights import make_tokens

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folders(release, tmp_path_factory) -> dict[str, Path]:
    above = tmp_path_factory.mktemp("orbax")
    convert(release, above / "fp8")
    convert(release, above / "bf16", dtype="bfloat16")
    return {"hf": release, "orbax fp8": above / "fp8", "orbax bf16": above / "bf16"}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)

    def compare(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(compare, left, right)


@pytest.mark.parametrize("kind", ["hf", "orbax fp8", "orbax bf16"])
@pytest.mark.parametrize("keep_fp8", [False, True])
def test_sharded_equals_unsharded(folders, mesh, kind, keep_fp8) -> None:
    config = tiny(param_dtype="bfloat16")
    whole = load_params(folders[kind], config, keep_fp8=keep_fp8)
    sharded = load_params(folders[kind], config, mesh, keep_fp8=keep_fp8)
    assert_same(sharded, whole)
    leaves = jax.tree.leaves(sharded)
    split = [leaf for leaf in leaves if not leaf.sharding.is_fully_replicated]
    assert sum(leaf.size for leaf in split) > 0.9 * sum(leaf.size for leaf in leaves)
    assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in split)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", ["hf", "orbax fp8"])
def test_any_axis_of_the_matrices_may_be_split(folders, mesh, kind, axis) -> None:
    """Shards that begin inside a 128 x 128 block get that block's scale, in the ragged matrix too."""

    def rule(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        spec: list[Any] = [None] * len(shape)
        if len(shape) > 1 and shape[axis] % 8 == 0:
            spec[axis] = ("data", "model")
        return NamedSharding(mesh, PartitionSpec(*spec))

    config = tiny()
    assert_same(load_params(folders[kind], config, shardings=rule), load_params(folders[kind], config))


def test_shardings_may_be_a_tree_of_the_parameters(release, mesh) -> None:
    config = tiny()
    whole = load_params(release, config, keep_fp8=True)
    rule = NamedSharding(mesh, PartitionSpec())
    tree = jax.tree.map(lambda leaf: rule, whole, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    experts = NamedSharding(mesh, PartitionSpec(None, "model"))
    tree["params"]["moe_layers"]["ffn"]["experts"] = dict.fromkeys(("w_gate", "w_up", "w_down"), experts)
    params = load_params(release, config, shardings=tree, keep_fp8=True)
    assert_same(params, whole)
    w_up = params["params"]["moe_layers"]["ffn"]["experts"]["w_up"]
    assert w_up.values.sharding == experts and w_up.scales.sharding.is_fully_replicated
    del tree["params"]["embed"]
    with pytest.raises(ValueError, match="shardings have no entry for embed"):
        load_params(release, config, shardings=tree)
    with pytest.raises(ValueError, match="not both"):
        load_params(release, config, mesh, shardings=tree)


def test_every_byte_is_read_once(folders, mesh, monkeypatch) -> None:
    """One process holds all eight devices here: replicas are not read again, and nothing is read in vain."""
    # The small model's rows are shorter than what is worth a call of its own.
    monkeypatch.setattr("dsa_jax.checkpoint.safetensors_file._SHORTEST_SEGMENT", 1)
    for kind in ("hf", "orbax fp8"):
        count = ReadCount()
        load_params(folders[kind], tiny(param_dtype="bfloat16"), mesh, keep_fp8=True, count=count)
        assert count.total <= count.read < 1.1 * count.total, kind


HOST = """
import sys
import jax, numpy as np
rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from dsa_jax.checkpoint import ReadCount, load_config, load_params, safetensors_file
from jax.sharding import Mesh
safetensors_file._SHORTEST_SEGMENT = 1
config = load_config(path, param_dtype="bfloat16")
whole = load_params(path, config, keep_fp8=True)
count = ReadCount()
mesh = Mesh(np.array(jax.devices()), ("model",))
sharded = load_params(path, config, mesh, keep_fp8=True, count=count)
def compare(a, b):
    for shard in a.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.asarray(b)[shard.index].tobytes()
jax.tree.map(compare, sharded, whole)
print(len(jax.devices()), len(jax.local_devices()), count.read, count.total)
"""


@pytest.mark.parametrize("kind", ["hf", "orbax fp8"])
def test_each_of_two_hosts_reads_half(folders, kind) -> None:
    """Two processes with four devices each. What cannot be divided by eight is read by both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(rank), port, str(folders[kind])],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        devices, local, read, total = map(int, output.split())
        assert (devices, local) == (8, 4) and 0.5 * total <= read < 0.53 * total


def test_rows_of_a_shard_are_read_and_no_others(release) -> None:
    """What a host with one of eight devices would read of the largest matrix."""
    folder = HfFolder(release)
    name = "model.layers.0.mlp.gate_proj.weight"
    folder.read_rows(name, 64, 128)
    assert folder.bytes_read == folder.entries[name].size // 8


@pytest.mark.parametrize("kind", ["hf", "orbax fp8"])
@pytest.mark.parametrize("form", ["mha", "mqa"])
def test_weights_kept_in_fp8_compute_what_dequantised_ones_do(folders, kind, form) -> None:
    config = tiny(dtype="float32", param_dtype="float32", attention_form=form)
    model, tokens = Transformer(config), jnp.asarray(make_tokens("tiny"), jnp.int32)
    kept = load_params(folders[kind], config, keep_fp8=True)
    plain = load_params(folders[kind], config)

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, _, aux = model.apply(params, tokens)
        mtp, _, _ = model.apply(params, aux["hidden"], tokens, method="mtp_logits")
        return logits, mtp

    for ours, reference in zip(run(kept), run(plain), strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5, rtol=0)


def test_fp8_takes_half_the_bytes_of_bfloat16(release) -> None:
    config = tiny(param_dtype="bfloat16")
    kept = load_params(release, config, keep_fp8=True)["params"]["moe_layers"]["ffn"]["experts"]
    plain = load_params(release, config)["params"]["moe_layers"]["ffn"]["experts"]
    size = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (kept, plain)]
    assert isinstance(kept["w_up"], Fp8Weight) and size[0] < 0.501 * size[1]


def test_write_hf_says_that_it_takes_plain_arrays(release, tmp_path) -> None:
    with pytest.raises(ValueError, match="is kept in FP8, write_hf takes plain arrays"):
        write_hf(tmp_path / "out", load_params(release, tiny(), keep_fp8=True), tiny())


def test_a_folder_without_fp8_has_nothing_to_keep(folders) -> None:
    params = load_params(folders["orbax bf16"], tiny(param_dtype="bfloat16"), keep_fp8=True)
    assert not any(isinstance(leaf, Fp8Weight) for leaf in jax.tree.leaves(params))
    assert_same(params, load_params(folders["hf"], tiny(param_dtype="bfloat16")))


def test_a_config_of_another_size_is_refused(folders) -> None:
    wrong = dataclasses.replace(tiny(), q_lora_rank=256)
    with pytest.raises(ValueError, match="of a wrong shape"):
        load_params(folders["hf"], wrong)
    with pytest.raises(ValueError, match=r"leaves of a wrong shape: .*attn/wq_a/values"):
        load_params(folders["orbax fp8"], wrong)
    with pytest.raises(ValueError, match="leaves unknown to this config: dense_layers/attn_norm"):
        load_params(folders["orbax fp8"], dataclasses.replace(tiny(), n_dense_layers=0))
    assert "mtp" not in load_params(folders["orbax fp8"], tiny(n_mtp_layers=0))["params"]


def test_a_damaged_orbax_folder_says_which_leaf(release, tmp_path) -> None:
    convert(release, tmp_path / "orbax")
    metadata = json.loads((tmp_path / "orbax" / "_METADATA").read_text())
    key = str(("params", "moe_layers", "attn", "wo", "scales"))
    del metadata["tree_metadata"][key]
    (tmp_path / "orbax" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="leaves missing: moe_layers/attn/wo/scales"):
        load_params(tmp_path / "orbax", tiny())
    (tmp_path / "orbax" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_params(tmp_path / "orbax", tiny())
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_params(tmp_path / "absent", tiny())
