"""Reading by byte range: everything safetensors wrote is read back, and a damaged file raises a clear ValueError."""

import json
import random
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint.safetensors_file import SafetensorsFile

TENSORS = {
    "odd_bytes": np.arange(3, dtype=np.uint8),
    "bf16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "fp8": np.linspace(-448, 448, 15).reshape(3, 5).astype(ml_dtypes.float8_e4m3fn),
    "f32": np.linspace(0, 1, 4, dtype=np.float32),
    "f16": np.float16([[0.5, -2.0]]),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def write_raw(path: Path, header: Any, data: bytes, *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape, offsets = (list(v) if isinstance(v, tuple) else v for v in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_tensor_safetensors_writes_is_read_back(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    opened = SafetensorsFile(tmp_path / "a.safetensors")
    assert opened.metadata == {"format": "pt"} and set(opened.entries) == set(TENSORS)
    for name, expected in TENSORS.items():
        array = opened.read(name)
        assert array.dtype == expected.dtype and array.shape == expected.shape
        assert array.tobytes() == expected.tobytes() and opened.entries[name].size == expected.nbytes


def test_unaligned_tensors_are_read(tmp_path) -> None:
    header = {
        "a": entry("U8", (1,), (0, 1)),
        "b": entry("BF16", (2,), (1, 5)),
        "c": entry("F32", (1,), (5, 9)),
    }
    data = b"\x07" + np.array([1, 2], ml_dtypes.bfloat16).tobytes() + np.float32([1.5]).tobytes()
    opened = SafetensorsFile(write_raw(tmp_path / "a.safetensors", header, data))
    np.testing.assert_array_equal(opened.read("b").astype(np.float32), [1, 2])
    np.testing.assert_array_equal(opened.read("c"), [1.5])


def test_the_file_cannot_be_written_through_an_array(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="read-only"):
        SafetensorsFile(tmp_path / "a.safetensors").read("f32")[0] = 1.0


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry()}, b"1234567", ["truncated", "re-download"]),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, b"12345678", ["truncated"]),
        ({"a": entry()}, b"123456789", ["1 bytes", "no tensor"]),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12, ["'b'", "overlaps"]),
        ({"a": entry(), "b": entry()}, b"12345678", ["overlaps"]),
        ({"a": entry(offsets=(4, 12))}, b"x" * 12, ["'a'", "gap"]),
        ({"a": entry(offsets=(8, 0))}, b"12345678", ["data_offsets"]),
        ({"a": entry(offsets=(-8, 0))}, b"12345678", ["data_offsets"]),
        ({"a": entry(offsets=(0, 8, 9))}, b"12345678", ["data_offsets"]),
        ({"a": entry(offsets=(0, 8.0))}, b"12345678", ["data_offsets"]),
        ({"a": entry(offsets=None)}, b"12345678", ["data_offsets"]),
        ({"a": entry(offsets=(0, 2**70))}, b"12345678", ["data_offsets"]),
        ({"a": entry(shape=(3,))}, b"12345678", ["12 bytes", "8"]),
        ({"a": entry(shape=(-2,))}, b"12345678", ["shape"]),
        ({"a": entry(shape=(True, 2))}, b"12345678", ["shape"]),
        ({"a": entry(shape="2")}, b"12345678", ["shape"]),
        ({"a": entry(shape=(2**62, 2**62))}, b"12345678", ["bytes", "offsets"]),
        ({"a": entry(shape=(1,) * 9)}, b"12345678", ["shape", "8"]),
        ({"a": entry(dtype="F31")}, b"12345678", ["unknown dtype 'F31'", "BF16"]),
        ({"a": entry(dtype=["F32"])}, b"12345678", ["unknown dtype"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678", ["'a'", "data_offsets"]),
        ({"a": entry() | {"x": 1}}, b"12345678", ["exactly"]),
        ({"a": 3}, b"", ["exactly"]),
        ([1, 2], b"", ["list", "not an object"]),
        ({"__metadata__": {"format": 1}}, b"", ["__metadata__"]),
        ({"__metadata__": []}, b"", ["__metadata__"]),
        (b'{"a": 1, "a": 2}', b"", ["'a'", "twice"]),
        (b'{"a": ', b"", ["not valid JSON"]),
        (b"\xff\xfe", b"", ["not valid JSON"]),
        (b"[" * 100_000, b"", ["not valid JSON"]),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", ["not valid JSON"]),
        (b"", b"", ["not valid JSON"]),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path, header, data, words) -> None:
    path = write_raw(tmp_path / "damaged.safetensors", header, data)
    with pytest.raises(ValueError) as error:
        SafetensorsFile(path)
    assert all(word in str(error.value) for word in [*words, "damaged.safetensors"]), str(error.value)


@pytest.mark.parametrize(
    ("length", "word"), [(10**9, "header length"), (2**64 - 1, "header length"), (1000, "truncated")]
)
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length, word) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"a": entry()}, b"12345678", length=length)
    with pytest.raises(ValueError, match=word):
        SafetensorsFile(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_a_header_length_is_truncated(tmp_path, size) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * size)
    with pytest.raises(ValueError, match="truncated.*re-download"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="re-download"):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_two_thousand_mutated_headers_are_read_or_refused_clearly(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    generator, path, refused = random.Random(0), tmp_path / "mutated.safetensors", 0
    for _ in range(2000):
        mutated = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            position = generator.randrange(header_end)
            if generator.random() < 0.3:
                del mutated[position]
            else:
                mutated[position] = generator.choice(b'0123456789"[]{},:-.eE\\n\x00\xff') ^ generator.choice(
                    (0, 1)
                )
        path.write_bytes(mutated)
        try:
            opened = SafetensorsFile(path)
            for name in opened.entries:
                opened.read(name)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "re-download" in str(error)
    assert refused > 1000
