"""load_params from every kind of checkpoint: sharded equals unsharded, and FP8 weights compute the same."""

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

from dsa_jax.checkpoint import ReadCount, convert, load_config, load_params, names, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.config import tiny
from dsa_jax.demo.model import NANO
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.sharding import RULES, batch_sharding, make_mesh, param_shardings, use_rules
from dsa_jax.transformer import Transformer
from tests.vectors.weights import make_tokens

ROOT = Path(__file__).resolve().parents[3]
MESHES = [{}, {"tensor": 4}, {"expert": 2, "context": 2, "tensor": 2}, {"expert": 8}]


@pytest.fixture(scope="module")
def folders(release, tmp_path_factory) -> dict[str, Path]:
    above = tmp_path_factory.mktemp("orbax")
    convert(release, above / "fp8")
    convert(release, above / "bf16", dtype="bfloat16")
    return {"hf": release, "orbax fp8": above / "fp8", "orbax bf16": above / "bf16"}


@pytest.fixture(scope="module")
def other_mesh() -> Mesh:
    """A mesh of the user's own, with other axes than the model's."""
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)

    def compare(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(compare, left, right)


def assert_sharded_as_param_shardings_says(params: Any, config: Any, mesh: Mesh) -> None:
    shardings = param_shardings(params, config, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding == where, params, shardings))


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", ["hf", "orbax fp8", "orbax bf16"])
@pytest.mark.parametrize("keep_fp8", [False, True])
def test_sharded_equals_unsharded(folders, kind, keep_fp8) -> None:
    config = tiny(param_dtype="bfloat16")
    whole = load_params(folders[kind], config, keep_fp8=keep_fp8)
    for axes in MESHES:
        mesh = make_mesh(**axes)
        sharded = load_params(folders[kind], config, mesh, keep_fp8=keep_fp8)
        assert_same(sharded, whole)
        assert_sharded_as_param_shardings_says(sharded, config, mesh)
        if not keep_fp8 and "tensor" not in axes:  # over which parameters without heads are not sharded
            leaves = jax.tree.leaves(sharded)
            per_device = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
            assert per_device * 8 < 1.1 * sum(leaf.size for leaf in leaves)


@pytest.mark.devices(8)
def test_arrays_are_placed_by_the_rules_in_use(folders) -> None:
    config, mesh = tiny(), make_mesh(tensor=2)
    with use_rules(dataclasses.replace(RULES, fsdp=("context", "data"), fsdp_of_experts=())):
        params = load_params(folders["orbax bf16"], config, mesh)
        assert_sharded_as_param_shardings_says(params, config, mesh)
    assert params["params"]["embed"].sharding.spec == PartitionSpec(None, ("context", "data"))


@pytest.mark.devices(8)
@pytest.mark.parametrize("axes", [{"expert": 2, "tensor": 2}, {"context": 4}], ids=str)
def test_a_jitted_forward_pass_takes_loaded_parameters_as_they_are(axes, capfd) -> None:
    """jit refuses arrays whose sharding is another than its in_shardings, and XLA reports costly reshards."""
    config, mesh = load_config(NANO, n_mtp_layers=0, dtype="float32"), make_mesh(**axes)
    params = load_params(NANO, config, mesh)
    assert_sharded_as_param_shardings_says(params, config, mesh)
    tokens = jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=(4, 16)), jnp.int32)
    where = param_shardings(params, config, mesh), batch_sharding(config, mesh, *tokens.shape)
    forward = jax.jit(lambda params, tokens: Transformer(config).apply(params, tokens)[0], in_shardings=where)
    with jax.set_mesh(mesh):
        logits = forward(params, tokens)
        with pytest.raises(ValueError, match="[Ss]harding"):
            forward(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), tokens)
    alone = jax.jit(Transformer(config).apply)(load_params(NANO, config), tokens)[0]
    np.testing.assert_allclose(logits, alone, atol=1e-4, rtol=1e-4)
    assert "rematerialization" not in capfd.readouterr().err


def test_a_mesh_with_other_axes_is_refused(folders, other_mesh) -> None:
    with pytest.raises(
        ValueError, match="must have the axes data, expert, context, tensor, got data, model; "
    ):
        load_params(folders["hf"], tiny(), other_mesh)


@pytest.mark.devices(8)
def test_a_mesh_that_does_not_divide_the_model_is_refused_before_anything_is_read(tmp_path) -> None:
    with pytest.raises(ValueError, match="n_heads must be a multiple of the mesh's tensor=8, got 4"):
        load_params(tmp_path / "absent", tiny(), make_mesh(tensor=8))


@pytest.mark.parametrize("kind", ["hf", "orbax fp8"])
def test_a_load_expands_the_table_of_tensors_once(folders, kind) -> None:
    names._expanded.cache_clear()
    load_params(folders[kind], tiny())
    assert names._expanded.cache_info().misses == 1


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", ["hf", "orbax fp8"])
def test_any_axis_of_the_matrices_may_be_sharded(folders, other_mesh, kind, axis) -> None:
    """Shards that begin inside a 128 x 128 block get that block's scale, in the ragged matrix too."""

    def rule(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        spec: list[Any] = [None] * len(shape)
        if len(shape) > 1 and shape[axis] % 8 == 0:
            spec[axis] = ("data", "model")
        return NamedSharding(other_mesh, PartitionSpec(*spec))

    config = tiny()
    assert_same(load_params(folders[kind], config, shardings=rule), load_params(folders[kind], config))


def test_shardings_may_be_a_tree_of_the_parameters(release, other_mesh) -> None:
    config = tiny()
    whole = load_params(release, config, keep_fp8=True)
    replicated = NamedSharding(other_mesh, PartitionSpec())
    tree = jax.tree.map(lambda leaf: replicated, whole, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    experts = NamedSharding(other_mesh, PartitionSpec(None, "model"))
    tree["params"]["moe_layers"]["ffn"]["experts"] = dict.fromkeys(("w_gate", "w_up", "w_down"), experts)
    params = load_params(release, config, shardings=tree, keep_fp8=True)
    assert_same(params, whole)
    w_up = params["params"]["moe_layers"]["ffn"]["experts"]["w_up"]
    assert w_up.values.sharding == experts and w_up.scales.sharding.is_fully_replicated
    del tree["params"]["embed"]
    with pytest.raises(ValueError, match="shardings have no entry for embed"):
        load_params(release, config, shardings=tree)
    with pytest.raises(ValueError, match="not both"):
        load_params(release, config, other_mesh, shardings=tree)


@pytest.mark.devices(8)
@pytest.mark.parametrize("keep_fp8", [False, True])
@pytest.mark.parametrize("kind", ["hf", "orbax fp8"])
def test_every_byte_is_read_once(folders, kind, keep_fp8) -> None:
    """One process has all eight devices here: replicas are not read again, nor rows that devices share."""
    for axes in MESHES:
        count = ReadCount()
        config, mesh = tiny(param_dtype="bfloat16"), make_mesh(**axes)
        load_params(folders[kind], config, mesh, keep_fp8=keep_fp8, count=count)
        assert count.total <= count.read < 1.1 * count.total, axes


HOST = """
import sys
import jax, numpy as np
rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from dsa_jax.checkpoint import ReadCount, load_config, load_params, safetensors_file
from dsa_jax.sharding import make_mesh
safetensors_file._SHORTEST_SEGMENT = 1
config = load_config(path, param_dtype="bfloat16")
whole = load_params(path, config)
count = ReadCount()
sharded = load_params(path, config, make_mesh(), count=count)
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
