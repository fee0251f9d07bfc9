"""What README.md shows runs, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def named_paths() -> list[str]:
    """Paths of the annotated tree: the names before the comment, below the folder they are indented under."""
    (tree,) = [block for block in blocks("") if "pallas_kernels/" in block]
    found, folders = [], [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth + 1]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            found.append(folders[depth] + name)
            if name.endswith("/"):
                folders.append(found[-1])
    return found


def test_the_python_example_runs_and_prints_what_it_says(capsys):
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    shapes, generated = capsys.readouterr().out.splitlines()
    assert f"# {shapes}\n" in example
    assert len(re.findall(r"\d+", generated)) == 8


@pytest.mark.parametrize("path", named_paths())
def test_every_path_of_the_tree_exists(path: str):
    assert (ROOT / path).exists()


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"make ([a-z]+)\b", " ".join(blocks("sh") + re.findall(r"`(make [^`]*)`", README)))
    )
    assert {"demo", "test"} <= named <= targets


def test_every_command_line_option_exists(capsys):
    from dsa_jax.commands.cli import main

    for command in ("generate", "compare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
        for line in re.findall(rf"dsa-jax {command} .*", "\n".join(blocks("sh"))):
            assert set(re.findall(r"--[a-z0-9-]+", line)) <= known
