"""Tests of the import rules: packages are layers, and a package imports only lower layers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Package -> the packages that it may import, besides itself and the Hub files. Commands may import all of them.
MAY_IMPORT = {
    "data": set(),
    "cpu": set(),
    "evaluation": {"cpu"},
    "training": {"evaluation"},
    "search": {"data", "evaluation"},
    "hub": set(),
}
HUB_FILES = {"configuration_ieft", "layers_ieft", "modeling_ieft", "processing_ieft", "ranking_ieft", "pipeline_ieft"}


def modules():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("ieft/**/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(path):
    """Names of the modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(name):
    """The package of `ieft` that a module is in, the Hub's files as "Hub file", commands as their name, or None."""
    first, _, rest = name.partition(".")
    if first in HUB_FILES:
        return "Hub file"
    return rest.partition(".")[0] if first == "ieft" else first


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    package = package_of(module)
    commands = {path.stem for path in ROOT.glob("*.py")} - HUB_FILES
    allowed = {
        "Hub file": {"Hub file"},
        **{name: below | {name, "Hub file"} for name, below in MAY_IMPORT.items()},
    }.get(package)
    known = {*MAY_IMPORT, *commands, "Hub file"}
    for name in imported(modules()[module]):
        target = package_of(name)
        if target in known and allowed is not None:
            assert target in allowed, f"{module} imports {name}"


def test_every_package_has_its_rule():
    packages = {path.parent.name for path in ROOT.glob("ieft/*/__init__.py")}
    assert packages | {"hub"} == set(MAY_IMPORT)


# Hub file -> the Hub files that it may import, which are those below it.
BELOW = {
    "configuration_ieft": set(),
    "layers_ieft": set(),
    "processing_ieft": {"configuration_ieft"},
    "ranking_ieft": {"processing_ieft"},
    "modeling_ieft": {"configuration_ieft", "layers_ieft", "ranking_ieft"},
    "pipeline_ieft": {"ranking_ieft"},
}


@pytest.mark.parametrize("module", sorted(HUB_FILES))
def test_imports_of_hub_files_point_down(module):
    targets = {name.partition(".")[0] for name in imported(modules()[module])} & HUB_FILES
    assert targets <= BELOW[module]
