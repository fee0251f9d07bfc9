"""Text to tokens on disk: no loss, no leak between splits, and the same bytes for the same input."""

import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import train.data.prepare
from train.data.documents import read_source, split_documents, stdlib_documents
from train.data.prepare import main, prepare
from train.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = [f"def f{n}(x):\n    return x + {n}  # été, \t日本 {'<|eos|>' * (n % 2)}\n" for n in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with all four kinds of file, an empty file, a repeated text and a file that is not text."""
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    for n, text in enumerate(TEXTS[:20]):
        (folder / "inner" / f"{n}.py").write_text(text, encoding="utf-8")
    (folder / "a.txt").write_text(TEXTS[20], encoding="utf-8")
    (folder / "b.md").write_text(TEXTS[21], encoding="utf-8")
    (folder / "repeated.md").write_text(TEXTS[21], encoding="utf-8")
    (folder / "empty.txt").write_text("\n")
    (folder / "image.png").write_bytes(b"\xff\xfe")
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(TEXTS[22:])]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def documents_of(folder: Path, split: str) -> list[np.ndarray]:
    tokens, starts = np.load(folder / f"{split}.npy"), np.load(folder / f"{split}_starts.npy")
    assert starts[0] == 0 and starts.dtype == np.int64
    return np.split(tokens, starts[1:])


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_each_text_is_restored_from_between_bos_and_eos_of_one_split(corpus, tmp_path):
    prepare([str(corpus)], out := tmp_path / "out", vocab_size=300, validation_share=0.1)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = []
    for split in ("train", "validation"):
        for document in documents_of(out, split):
            assert document.dtype == np.uint16
            assert (document[0], document[-1]) == (0, 1)
            assert document[1:-1].min() >= len(SPECIAL_TOKENS)  # "<|eos|>" in a text is text
            texts.append(tokenizer.decode(document[1:-1].tolist(), skip_special_tokens=False))
    assert sorted(texts) == sorted(TEXTS)


def test_the_manifest_describes_the_folder(corpus, tmp_path):
    manifest = prepare([str(corpus)], out := tmp_path / "out", vocab_size=300, licence="MIT")
    assert manifest == json.loads((out / "manifest.json").read_text())
    (source,) = manifest["sources"]
    assert (source["source"], source["licence"], source["documents"]) == ("corpus", "MIT", 62)
    assert manifest["empty_or_repeated"] == 2
    assert manifest["vocab_size"] == 300
    assert list(manifest["special_tokens"].items())[:4] == [
        ("bos", 0),
        ("eos", 1),
        ("pad", 2),
        ("reserved_0", 3),
    ]
    for split, size in manifest["splits"].items():
        documents = documents_of(out, split)
        assert (size["documents"], size["tokens"]) == (len(documents), sum(map(len, documents)))
        assert size["sha256"] == digests(out)[f"{split}.npy"]
    assert sum(size["bytes"] for size in manifest["splits"].values()) == sum(len(t.encode()) for t in TEXTS)
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_the_same_input_gives_the_same_bytes_in_any_folder(corpus, tmp_path):
    prepare([str(corpus)], tmp_path / "once", vocab_size=320)
    (tmp_path / "elsewhere").mkdir()
    moved = corpus.rename(tmp_path / "elsewhere" / "corpus")
    prepare([str(moved)], tmp_path / "twice", vocab_size=320)
    assert digests(tmp_path / "once") == digests(tmp_path / "twice")


def test_adding_documents_moves_none_to_the_other_split(corpus, tmp_path):
    def validation_texts(folder: Path) -> set[str]:
        splits = split_documents(read_source(str(folder), False, None)[0], 0.2)
        assert splits["validation"] and splits["train"]
        return {document.text for document in splits["validation"]}

    before = validation_texts(corpus)
    added = [f"new {n}\n" for n in range(30)]
    for n, text in enumerate(added):
        (corpus / f"added_{n}.txt").write_text(text)
    assert validation_texts(corpus) - set(added) == before


def test_a_few_documents_still_have_a_validation_split(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    manifest = prepare(files, tmp_path / "out", vocab_size=267)
    assert [size["documents"] for size in manifest["splits"].values()] == [1, 1]
    with pytest.raises(ValueError, match="at least 2 different documents, got 1"):
        prepare(files[:1] * 2, tmp_path / "other")


def test_a_tokenizer_made_elsewhere_is_used_unchanged(corpus, tmp_path):
    own = Tokenizer.from_str(train_tokenizer(TEXTS, 280).to_str())
    text = own.to_str().replace("<|bos|>", "<｜begin▁of▁sentence｜>").replace("<|reserved_", "<|tool_")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    manifest = prepare([str(corpus)], tmp_path / "out", tokenizer_file=tmp_path / "tokenizer.json")
    assert manifest["special_tokens"] == {"bos": 0, "eos": 1, "pad": 2}
    assert manifest["vocab_size"] == 280

    (tmp_path / "bad.json").write_text(text.replace("<|pad|>", "<|fill|>"), encoding="utf-8")
    with pytest.raises(ValueError, match="must have a token for pad"):
        prepare([str(corpus)], tmp_path / "bad", tokenizer_file=tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"fine\nso far\nbad \xff here", "corpus/x.txt:3: text must be utf-8.*0xff"),
        ("x.py", b"# coding: no-such-thing\n", "corpus/x.py:1: .*no-such-thing"),
        ("x.py", b"a = 1\nb = '\xe9'\n", "corpus/x.py:2?"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "corpus/x.jsonl:2: must be JSON"),
        ("x.jsonl", b'\n{"txt": "a"}\n', 'corpus/x.jsonl:2: must be an object with a "text" string'),
        ("x.jsonl", b'["a"]\n', "corpus/x.jsonl:1: must be an object"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "corpus/x.jsonl:1: .*valid Unicode"),
    ],
)
def test_bad_input_is_named_by_file_and_line_and_nothing_is_written(corpus, tmp_path, name, content, message):
    (corpus / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_bad_arguments_are_refused_before_any_work(corpus, tmp_path, capsys):
    with pytest.raises(ValueError, match="at least 267, got 266"):
        prepare([str(corpus)], tmp_path / "out", vocab_size=266)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.0"):
        prepare([str(corpus)], tmp_path / "out", validation_share=1.0)
    with pytest.raises(ValueError, match="must be stdlib, a folder or a .*, got .*image.png"):
        prepare([str(corpus / "image.png")], tmp_path / "out")
    with pytest.raises(ValueError, match="must be new or empty"):
        prepare([str(corpus)], corpus)
    assert main([str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("python -m train.data.prepare: a source must be stdlib")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_no_folder_and_the_next_succeeds(corpus, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.data.prepare, "write_split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(corpus)], tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()
    assert main([str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_the_standard_library_is_read_without_installed_generated_or_test_files(tmp_path):
    files = {
        "abc.py": "'''été'''\n".encode(),
        "old.py": b"# coding: latin-1\nname = '\xe9'\n",
        "pydoc_data/topics.py": b"# made by Sphinx\ntopics = {'if': 'The if\\nstatement', 'for': 'Loops'}\n",
        "json/__pycache__/x.py": b"cached",
        "site-packages/numpy.py": b"installed",
        "_sysconfigdata__linux.py": b"build = '/home/me'",
        "config-3.12-linux/python-config.py": b"build",
        "test/test_abc.py": b"assert True\n",
        "test/bad_utf8.py": b"\xff\n",
        "idlelib/idle_test/test_x.py": b"assert 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    plain = {
        "stdlib/abc.py": "'''été'''\n",
        "stdlib/old.py": "# coding: latin-1\nname = 'é'\n",
        "stdlib/pydoc_data/topics.py:if": "The if\nstatement",
        "stdlib/pydoc_data/topics.py:for": "Loops",
    }
    tests = {"stdlib/test/test_abc.py": "assert True\n", "stdlib/idlelib/idle_test/test_x.py": "assert 1\n"}
    documents, left_out = stdlib_documents(tmp_path, False)
    assert (dict(documents), left_out) == (plain, [])
    documents, left_out = stdlib_documents(tmp_path, True)
    assert (dict(documents), left_out) == (plain | tests, ["stdlib/test/bad_utf8.py"])

    (tmp_path / "broken.py").write_bytes(b"x = 1\ny = '\xff'\n")
    with pytest.raises(ValueError, match=r"stdlib/broken.py:"):
        stdlib_documents(tmp_path, True)


def test_the_running_standard_library_can_be_read():
    documents, left_out = stdlib_documents(Path(sysconfig.get_path("stdlib")), False)
    names = {document.name for document in documents}
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "stdlib/pydoc_data/topics.py:lambda"} <= names
    assert len(names) == len(documents) and not left_out
    assert sum(len(document.text) for document in documents) > 5_000_000
