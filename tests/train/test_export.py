"""`python -m train.export`: what it writes is the newest checkpoint, with adapters merged at alpha / rank."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dsa_jax.checkpoint import convert, load_config, load_params, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from tests.train.same import same_bits
from tests.train.small import CONFIG, initial, small_run
from train.checkpoint import Checkpoints
from train.config import Lora, Source, dense, to_json
from train.export import carried_files, main
from train.initial import from_checkpoint
from train.lora import with_adapters
from train.step import begin_stage

STAGES = (dense(2, lr=1e-3),)


def write_run(folder, params, **changes):
    """A run's folder as training leaves it after step 1."""
    run = small_run(*STAGES, **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(run)))
    checkpoints = Checkpoints(folder / "checkpoints", run.keep)
    checkpoints.save(begin_stage(jnp.int32(1), params, run.stages[0]), {"position": 0}, run)
    checkpoints.close()
    return run


def adapted(lora):
    """The initial parameters with adapters that matter: B is random too."""
    params = with_adapters(initial(), lora, jax.random.key(1))
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, params["lora"])
    return params


def exported(folder, out):
    assert main([str(folder), str(out), "--dtype", "float32"]) == 0
    config = load_config(out, dtype="float32", param_dtype="float32")
    return traverse_util.flatten_dict(load_params(out, config)["params"], sep=".")


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 1.0), (2, 32.0)])
def test_adapters_are_merged_with_alpha_over_rank(tmp_path, rank, alpha):
    lora = Lora(rank=rank, alpha=alpha)
    params = adapted(lora)
    write_run(tmp_path / "run", params, lora=lora)
    found = exported(tmp_path / "run", tmp_path / "out")
    base, adapters = (traverse_util.flatten_dict(params[name], sep=".") for name in ("params", "lora"))
    assert set(found) == set(base)
    for path, leaf in base.items():
        expected = np.asarray(leaf, np.float64)
        if f"{path}.a" in adapters:
            a, b = (np.asarray(adapters[f"{path}.{name}"], np.float64) for name in "ab")
            expected = expected + alpha / rank * a @ b
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_without_adapters_the_parameters_are_exported_to_the_last_bit(tmp_path):
    write_run(tmp_path / "run", initial())
    found = exported(tmp_path / "run", tmp_path / "out")
    expected = traverse_util.flatten_dict(initial()["params"], sep=".")
    assert set(found) == set(expected)
    assert all(same_bits(found[path], leaf) for path, leaf in expected.items())


def test_files_of_the_checkpoint_that_training_started_from_are_passed_on(tmp_path):
    """As `dsa-jax convert` does; also when the run started from an Orbax checkpoint that convert wrote."""
    base = tmp_path / "base"
    write_hf(base, initial(), CONFIG)
    names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    for name in names:
        (base / name).write_text(f'{{"{name}": 1}}')
    convert(base, tmp_path / "orbax")
    for kind in ("base", "orbax"):
        write_run(tmp_path / f"run-{kind}", initial(), init_from=str(tmp_path / kind))
        exported(tmp_path / f"run-{kind}", tmp_path / f"out-{kind}")
        for name in names:
            assert (tmp_path / f"out-{kind}" / name).read_bytes() == (base / name).read_bytes()


COPIES = {
    f"model.layers.{CONFIG.n_layers}.{name}" for name in ("embed_tokens.weight", "shared_head.head.weight")
}


def test_an_mtp_layer_that_came_without_copies_is_exported_without_them(tmp_path):
    """As GLM-5 is released. A run that started from random parameters gets the copies of DeepSeek's release."""
    params = {"params": dict(initial()["params"])}
    params["params"]["mtp"] = {k: v for k, v in params["params"]["mtp"].items() if k not in ("embed", "head")}
    shared = dataclasses.replace(CONFIG, mtp_shared_embeddings=True)
    write_hf(tmp_path / "base", params, shared, mtp_copies=False)
    convert(tmp_path / "base", tmp_path / "orbax")
    for kind, copies in (("base", False), ("orbax", False), (None, True)):
        run = small_run(*STAGES, model=shared, init_from=kind and str(tmp_path / kind))
        assert from_checkpoint(run).model.mtp_shared_embeddings
        write_run(tmp_path / f"run-{kind}", params, model=run.model, init_from=run.init_from)
        found = exported(tmp_path / f"run-{kind}", out := tmp_path / f"out-{kind}")
        names = set(HfFolder(out).entries)
        assert names >= COPIES if copies else not names & COPIES
        assert load_config(out).mtp_shared_embeddings is not copies
        expected = traverse_util.flatten_dict(params["params"], sep=".")
        assert all(same_bits(found[path], leaf) for path, leaf in expected.items())


def test_the_tokenizer_of_the_data_replaces_that_of_init_from(tmp_path):
    for name in ("base", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(name)
    source = Source(kind="text", folder=str(tmp_path / "data"))
    run = small_run(*STAGES, init_from=str(tmp_path / "base"), data=(source,))
    assert [file.read_text() for file in carried_files(run)] == ["data"]


def test_a_missing_init_from_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="the run started from .*absent.*that folder is not there; put it back"
    ):
        carried_files(small_run(*STAGES, init_from=str(tmp_path / "absent")))


def test_a_checkpoint_with_adapters_is_not_read_as_the_base_model(tmp_path):
    """convert and load_params, by the step's own folder and by that of its parameters."""
    lora = Lora(rank=4)
    run = write_run(tmp_path / "run", adapted(lora), lora=lora)
    write_hf(tmp_path / "base", initial(), CONFIG)
    message = rf"leaves of LoRA adapters such as lora\..*python -m train\.export {tmp_path / 'run'} OUT` and read OUT"
    params = tmp_path / "run" / "checkpoints" / "1" / "params"
    with pytest.raises(ValueError, match=message):
        convert(params, tmp_path / "out", config_file=tmp_path / "base" / "config.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        load_params(params, run.model)


def test_a_checkpoint_without_adapters_is_still_converted_and_loaded(tmp_path):
    run = write_run(tmp_path / "run", initial())
    write_hf(tmp_path / "base", initial(), CONFIG)
    params = tmp_path / "run" / "checkpoints" / "1" / "params"
    convert(params, tmp_path / "out", config_file=tmp_path / "base" / "config.json")
    assert jax.tree.all(jax.tree.map(same_bits, load_params(params, run.model), initial()))


def test_a_folder_that_is_no_run_gives_one_line(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no config.json: give the folder of a run" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": ', "is not valid JSON"),
        ("[1]", "must hold a JSON object, got a list"),
        ('{"architectures": ["DeepseekV32ForCausalLM"]}', "does not describe a run of `python -m train`"),
        ('{"model": {"vocab_size": "x"}}', "does not describe a run of `python -m train`"),
    ],
)
def test_a_description_that_is_none_gives_one_line(tmp_path, capsys, content, message):
    (tmp_path / "config.json").write_text(content)
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'config.json'} {message}" in line


def test_options_and_destination_are_checked_before_the_run_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.export.trained", lambda folder: pytest.fail("the run was read"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("")
    assert main([str(tmp_path), str(tmp_path / "taken")]) == 2
    assert "taken exists and is not an empty folder" in capsys.readouterr().err
    for size in ("0", "-1"):
        assert main([str(tmp_path), str(tmp_path / "out"), f"--max-shard-bytes={size}"]) == 2
        assert f"max_shard_bytes must be positive, got {size}" in capsys.readouterr().err
