"""Every file that a user hands to `dsa-jax`, damaged in every way: one sentence with its path, exit code 2."""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from dsa_jax.checkpoint import convert, write_hf
from dsa_jax.commands.cli import main
from dsa_jax.config import tiny
from dsa_jax.transformer import Transformer
from tests.damage import BINARY, JSON, cases, copied, damage, the_one_line

Command = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """hf: several shards and a tokenizer; orbax: converted from it; and a text, numbers and a config.json."""
    root = tmp_path_factory.mktemp("folders")
    config = tiny(
        vocab_size=64, d_model=64, d_ff=64, d_expert=32, n_layers=2, n_heads=2, q_lora_rank=32, index_topk=8,
        max_seq_len=64, n_mtp_layers=0, param_dtype="float32", fp8=None,
    )  # fmt: skip
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    write_hf(root / "hf", params, config, max_shard_bytes=1_000_000)
    vocabulary = {"<bos>": 0} | {chr(ord("0") + i): i for i in range(1, 64)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<bos>")).save(
        str(root / "hf/tokenizer.json")
    )
    convert(root / "hf", root / "orbax")
    (root / "text.txt").write_text("1234 " * 20)
    (root / "config.json").write_bytes((root / "hf" / "config.json").read_bytes())
    np.savez(root / "numbers.npz", input_ids=np.ones((1, 4), int), logits=np.zeros((1, 4, 64), np.float32))
    return root


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch) -> None:
    """A command that gets as far as the model has not noticed the damage."""
    monkeypatch.delenv("DSA_JAX_TRACEBACK", raising=False)

    def run(*args, **kwargs):
        pytest.fail("the command went on to run the model")

    # The package has a function of the module's name.
    monkeypatch.setattr(importlib.import_module("dsa_jax.generate"), "stream", run)
    monkeypatch.setattr("dsa_jax.parity.compare.run_ours", run)


def generate(model: str, *more: str) -> Command:
    prompt = more or ("--token-ids", "1,2")
    return lambda root: ["generate", "--model", str(root / model), "--max-new-tokens", "2", *prompt]


def compare(model: str, option: str, file: str) -> Command:
    return lambda root: ["compare", "--model", str(root / model), option, str(root / file), "--seq-len", "4"]


def conversion(source: str, *more: str) -> Command:
    return lambda root: ["convert", str(root / source), str(root / "out"), *more]


def with_config(root: Path) -> list[str]:
    return ["convert", str(root / "hf"), str(root / "out"), "--config", str(root / "config.json")]


def verify(folder: str) -> Command:
    return lambda root: ["verify", str(root / folder)]


SHARD = "hf/model-00001-of-00002.safetensors"
# File -> kinds of damage, and the commands that read it.
FILES: dict[str, tuple[Iterable[str], dict[str, Command]]] = {
    "hf/config.json": (
        JSON,
        {"generate": generate("hf"), "compare": compare("hf", "--checkpoint", "orbax"),
         "convert": conversion("hf"), "verify": verify("hf")},
    ),
    "hf/model.safetensors.index.json": (
        set(JSON) - {"missing", "a folder"},  # then the folder has no weights at all, see below
        {"generate": generate("hf"), "convert": conversion("hf"), "verify": verify("hf")},
    ),
    SHARD: (set(BINARY) - {"missing"}, {"generate": generate("hf"), "convert": conversion("hf"),
                                        "compare": compare("hf", "--checkpoint", "orbax")}),
    "hf/tokenizer.json": (
        set(JSON) - {"missing", "a folder"},
        {"generate": generate("hf", "--prompt", "12"), "compare": compare("hf", "--text", "text.txt")},
    ),
    "text.txt": (set(BINARY) - {"truncated", "zeros"} | {"invalid UTF-8"},
                 {"compare": compare("hf", "--text", "text.txt")}),
    "numbers.npz": (BINARY, {"compare": compare("hf", "--vectors", "numbers.npz")}),
    "config.json": (JSON, {"convert": with_config}),
    "orbax/dsa_jax.json": (
        set(JSON) - {"missing", "a folder"},
        {"generate": generate("orbax"), "convert": conversion("orbax"), "verify": verify("orbax")},
    ),
    "orbax/_METADATA": (
        set(JSON) - {"missing", "a folder"},
        {"generate": generate("orbax"), "convert": conversion("orbax"), "verify": verify("orbax")},
    ),
    "orbax/dsa_jax_tensors.json": (
        set(JSON) - {"missing", "a folder"}, {"verify": verify("orbax"), "convert": conversion("orbax")},
    ),
    "orbax/hf/config.json": (set(JSON) - {"missing", "a folder", "an object of other keys", "NaN"},
                             {"convert": conversion("orbax")}),
    "orbax/hf/tokenizer.json": (set(JSON) - {"missing", "a folder"}, {"generate": generate("orbax", "--prompt", "1")}),
    "orbax/manifest.ocdbt": (BINARY, {"convert": conversion("orbax"), "generate": generate("orbax")}),
}  # fmt: skip


@pytest.mark.parametrize(("file", "command", "kind"), cases(FILES))
def test_a_damaged_file_is_one_sentence_with_its_path(folders, tmp_path, capsys, file, command, kind) -> None:
    root = copied(folders, tmp_path / "root")
    damage(root / file, kind)
    assert main(FILES[file][1][command](root)) == 2
    # Of a store in several files, and of one that is gone, the folder is named.
    named = root / "orbax" if file.endswith(".ocdbt") else root / file
    if file == SHARD:
        named = Path(named.name)
    the_one_line(capsys, named)
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / SHARD).unlink(), f"1 shards missing, download them: {Path(SHARD).name}"),
        (
            lambda root: (root / "hf/model.safetensors.index.json").unlink(),
            "hf holds neither model.safetensors nor",
        ),
    ],
)
def test_weights_that_are_gone_are_one_sentence(folders, tmp_path, capsys, change, message) -> None:
    change(root := copied(folders, tmp_path / "root"))
    for command in (generate("hf"), conversion("hf")):
        assert main(command(root)) == 2
        assert message in the_one_line(capsys, root / "hf")


@pytest.mark.parametrize("place", ["absent", "text.txt", "empty"])
def test_what_is_no_checkpoint_folder_is_one_sentence(folders, tmp_path, capsys, place) -> None:
    root = copied(folders, tmp_path / "root")
    (root / "empty").mkdir()
    for command in (generate(place), conversion(place), verify(place), compare("hf", "--checkpoint", place)):
        assert main(command(root)) == 2
        the_one_line(capsys, root / place)


@pytest.mark.parametrize("kind", sorted(set(BINARY) - {"missing"}))
def test_a_file_that_is_carried_along_does_not_stop_a_conversion_silently(
    folders, tmp_path, capsys, kind
) -> None:
    """generation_config.json is not read: it arrives as it was, or its path is named."""
    root = copied(folders, tmp_path / "root")
    file = root / "hf" / "generation_config.json"
    file.write_text('{"temperature": 0.6}')
    damage(file, kind)
    code = main(conversion("hf")(root))
    if code:
        the_one_line(capsys, file)
    elif file.is_file():
        assert (root / "out" / "hf" / file.name).read_bytes() == file.read_bytes()
