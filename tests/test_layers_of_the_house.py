"""Tests of the import rules: packages are layers, and a package imports only lower layers, as `docs` draws them."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
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
    "page": {"data", "search"},
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


# The drawing in docs/architecture.md ---------------------------------------------------------------------------------


def box_of(module):
    """The box of the drawing that a module is in, or None for a library."""
    package = package_of(module)
    if package in MAY_IMPORT:
        return package
    return {"Hub file": "hub_files", "": "ieft"}.get(
        package, "commands" if (ROOT / f"{package}.py").exists() else None
    )


def measure():
    """Box -> the boxes it imports; box -> its share of the lines of code, in percent."""
    below, lines = {}, Counter()
    for module, path in modules().items():
        box = box_of(module.removesuffix(".__init__"))
        lines[box] += len(path.read_text(encoding="utf-8").splitlines())
        below.setdefault(box, set()).update(box_of(name) for name in imported(path))
    below = {box: targets - {box, None} for box, targets in below.items()}
    return below, {box: 100 * count / lines.total() for box, count in lines.items()}


def draw(below):
    """Boxes and arrows in the language of Mermaid, which GitHub draws."""
    arrows = [f"    {box} --> {' & '.join(sorted(targets))}" for box, targets in sorted(below.items()) if targets]
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```"])


def test_no_import_runs_in_a_circle():
    below, _ = measure()
    assert list(TopologicalSorter(below).static_order())[-1] == "commands"


def test_no_package_holds_more_than_three_tenths_of_the_code():
    _, shares = measure()
    assert {box: round(share) for box, share in shares.items() if share > 30} == {}


def test_the_drawing_of_imports_is_the_imports():
    drawing = draw(measure()[0])
    assert drawing in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), f"Expected:\n{drawing}"
