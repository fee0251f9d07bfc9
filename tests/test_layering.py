"""Imports point one way: jax <- pallas_kernels <- dsa_jax <- train <- tests, notebooks."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("pallas_kernels", "dsa_jax", "train", "tests")  # lowest first
# Needed by one command, or by nobody at run time: they may only be imported inside the function that needs
# them.
OPTIONAL = {"torch", "transformers", "matplotlib", "beartype", "hypothesis", "pytest"}
# What a layer may import besides the standard library, jax, numpy, jaxtyping and the layers below it.
THIRD_PARTY = {
    "pallas_kernels": {"ml_dtypes", "rich"},
    "dsa_jax": {"flax", "ml_dtypes", "orbax", "rich", "safetensors", "tensorstore", "tokenizers", "tyro"}
    | OPTIONAL,
    "train": {
        "chex",
        "flax",
        "grain",
        "ml_dtypes",
        "optax",
        "orbax",
        "rich",
        "safetensors",
        "tokenizers",
        "tyro",
    }
    | OPTIONAL,
}
ALWAYS = {"jax", "jaxlib", "numpy", "jaxtyping"}


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it runs when the module is imported) of every import in a file."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, at_import
            elif isinstance(child, ast.ImportFrom):
                yield "." * child.level + (child.module or ""), child.lineno, at_import
            elif isinstance(child, ast.If) and ast.unparse(child.test) in {
                "TYPE_CHECKING",
                "typing.TYPE_CHECKING",
            }:
                yield from visit(child, False)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_import and not inside)

    return visit(ast.parse(path.read_text(), str(path)), True)


def found(layer: str) -> list[tuple[str, str, bool]]:
    """(file:line, dotted name, at import time) of every import of a layer."""
    return [
        (f"{path.relative_to(ROOT)}:{line}", name, at_import)
        for path in source_files(layer)
        for name, line, at_import in imports(path)
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_are_absolute(layer: str):
    assert [place for place, name, _ in found(layer) if name.startswith(".")] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_a_higher_one(layer: str):
    higher = LAYERS[LAYERS.index(layer) + 1 :]
    assert [(place, name) for place, name, _ in found(layer) if name.split(".")[0] in higher] == []


@pytest.mark.parametrize("layer", sorted(THIRD_PARTY))
def test_a_layer_imports_only_its_own_dependencies(layer: str):
    allowed = ALWAYS | THIRD_PARTY[layer] | set(LAYERS[: LAYERS.index(layer) + 1]) | sys.stdlib_module_names
    assert [(place, name) for place, name, _ in found(layer) if name.split(".")[0] not in allowed] == []


@pytest.mark.parametrize("layer", sorted(THIRD_PARTY))
def test_optional_packages_are_imported_only_where_they_are_used(layer: str):
    at_import = [(place, name) for place, name, at_import in found(layer) if at_import]
    assert [(place, name) for place, name in at_import if name.split(".")[0] in OPTIONAL] == []


@pytest.mark.parametrize("layer", sorted(THIRD_PARTY))
def test_modules_of_a_layer_have_no_import_cycle(layer: str):
    def dotted(path: Path) -> str:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    modules = {dotted(path): path for path in source_files(layer)}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from package import module` needs the module; `from package import name` needs the package.
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
                names |= submodules or {node.module}
        edges[module] = names & set(modules) - {module}

    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in finished:
            for below in sorted(edges[module]):
                visit(below, (*above, module))
            finished.add(module)

    for module in modules:
        visit(module, ())


# The one file per layer in which names of other packages stand that may move without notice.
UNSTABLE = {
    "pallas_kernels": {"pallas_kernels/private_jax.py", "pallas_kernels/hopper/mosaic.py"},
    "dsa_jax": {"dsa_jax/unstable.py"},
    "train": {"train/private_jax.py"},
}


@pytest.mark.parametrize("layer", sorted(UNSTABLE))
def test_private_and_experimental_imports_stand_in_one_file(layer: str):
    def unstable(name: str) -> bool:
        return "._src" in name or name.startswith(("jaxlib", "jax.experimental", "jax.extend"))

    places = [(place, name) for place, name, _ in found(layer) if unstable(name)]
    assert places, "this test looks for names that are no longer used"
    assert [p for p in places if p[0].split(":")[0] not in UNSTABLE[layer]] == []
