"""The checkpoint that the tests of `convert` and `verify` start from."""

from pathlib import Path

import pytest

from tests.vectors.weights import write_release_checkpoint


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("release") / "fp8"
    write_release_checkpoint(path)
    return path
