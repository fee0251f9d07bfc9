"""README.md, CONTRIBUTING.md, CHANGELOG.md and docs: what they show runs, and what they name exists."""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "dsa_jax", "train")
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
# CHANGELOG.md is left out where names are checked, because it also names what is gone.
DESCRIBING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *DESCRIBING,
    ROOT / "CHANGELOG.md",
    ROOT / "dsa_jax/nano/README.md",
    ROOT / "tests/vectors/README.md",
]


def blocks(text: str, language: str) -> list[str]:
    """The contents of the code blocks of a page in this language ("" for none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def named_paths(text: str) -> list[str]:
    """Paths of a page's tree: the names before the comment, below the folder they are indented under."""
    (tree,) = [block for block in blocks(text, "") if block.startswith("pallas_kernels/")]
    found, folders = [], [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth + 1]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            found.append(folders[depth] + name)
            if name.endswith("/"):
                folders.append(found[-1])
    return found


def folders_of_packages() -> Iterator[str]:
    """Every folder of the packages that holds a file, as "dsa_jax/fp8/"."""
    for package in PACKAGES:
        for folder in [ROOT / package, *(ROOT / package).rglob("*/")]:
            if folder.name != "__pycache__" and any(path.is_file() for path in folder.iterdir()):
                yield f"{folder.relative_to(ROOT)}/"


def modules_of_packages() -> Iterator[str]:
    """Every module of the packages. A folder's line stands for its __init__.py and __main__.py."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                yield str(path.relative_to(ROOT))


def lines(names: Iterable[str]) -> str:
    return "\n  ".join(["", *sorted(names)])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_path_of_the_tree_exists(page: str):
    unknown = [path for path in named_paths((ROOT / page).read_text()) if not (ROOT / path).exists()]
    assert not unknown, f"the tree of {page} names what does not exist:{lines(unknown)}"


def test_no_tree_names_a_path_twice():
    for text in (README, CONTRIBUTING):
        assert sorted(set(named_paths(text))) == sorted(named_paths(text))


def test_the_tree_of_the_readme_names_every_folder():
    missing = set(folders_of_packages()) - set(named_paths(README))
    assert not missing, f"the tree of README.md lacks:{lines(missing)}"


def test_the_tree_of_contributing_names_every_folder_and_module():
    missing = {*folders_of_packages(), *modules_of_packages()} - set(named_paths(CONTRIBUTING))
    assert not missing, f"the tree of CONTRIBUTING.md lacks:{lines(missing)}"


def test_the_python_example_runs_and_prints_what_it_says(capsys):
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    shapes, generated = capsys.readouterr().out.splitlines()
    assert f"# {shapes}\n" in example
    assert len(re.findall(r"\d+", generated)) == 8


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path):
    assert not list(broken_links(page))


def test_a_broken_link_and_a_wrong_anchor_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading, `code`\n[a](#one-heading-code) [b](page.md#none) [c](none.md) [d](https://x.org)\n"
    )
    assert list(broken_links(page)) == ["page.md#none", "none.md"]


@pytest.mark.parametrize("page", DESCRIBING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_in_backticks_exists(page: Path):
    named = re.findall(
        r"`((?:pallas_kernels|dsa_jax|train|tests|docs|notebooks)/[\w./-]*)`", page.read_text()
    )
    unknown = [
        path for path in named if "/OP/" not in path and not (ROOT / path).exists()
    ]  # OP: any operation
    assert not unknown, f"{page.name} names what does not exist:{lines(unknown)}"


def runs_as_module(name: str) -> bool:
    """Whether ``python -m name`` finds something to run."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        return False
    return spec is not None


@pytest.mark.parametrize(
    "page", [*DESCRIBING, ROOT / "dsa_jax/nano/README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_module_of_a_command_can_be_run(page: Path):
    named = set(re.findall(r"python3? -m\s+([a-z_][\w.]*\w)", page.read_text()))
    assert not [name for name in named if not runs_as_module(name)]


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in (README, CONTRIBUTING):
        commands = re.findall(r"(?:^|`)make ([^`#\n]*)", text, re.MULTILINE)
        named = {word for command in commands for word in command.split() if "=" not in word}
        assert {"test"} <= named <= targets


def test_every_command_line_option_exists(capsys):
    from dsa_jax.commands.cli import main

    for command in ("generate", "compare", "convert", "verify"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
        for line in re.findall(rf"dsa-jax {command} [^#\n`]*", README):
            assert set(re.findall(r"--[a-z0-9-]+", line)) <= known


def moves() -> list[tuple[str, list[str]]]:
    """(old place, new places) of every row of CHANGELOG.md's tables of moved commands, modules and tests."""
    _, tables = CHANGELOG.split("### Moved commands", 1)
    rows = re.findall(r"^\| `([^`]+)` \| (`.+`) \|$", tables, re.MULTILINE)
    return [(old, re.findall(r"`([^`]+)`", new)) for old, new in rows]


def test_every_move_of_the_changelog_leads_to_something_that_exists():
    def exists(place: str) -> bool:
        name = place.removeprefix("python -m ")
        return runs_as_module(name) if name != place else (ROOT / place).exists()

    assert len(moves()) > 30
    unknown = [new for _, places in moves() for new in places if not exists(new)]
    assert not unknown, f"CHANGELOG.md names new places that do not exist:{lines(unknown)}"
    kept = [old for old, _ in moves() if exists(old)]
    assert not kept, f"CHANGELOG.md names old places that still exist:{lines(kept)}"
