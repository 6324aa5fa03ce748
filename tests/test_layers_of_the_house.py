"""Who may import whom: data flows one way, from the network to the commands."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# File -> layer. A file imports from lower layers alone, but for the exceptions in SAME_LAYER.
LAYERS = {
    "configuration_ieft": 0,
    "layers_ieft": 0,
    "modeling_ieft": 0,
    "processing_ieft": 0,
    "pipeline_ieft": 0,
    "ieft.checkpoints": 0,
    "ieft.metrics": 0,
    "ieft.processes": 0,
    "ieft.scenes": 0,
    "ieft.twins": 1,
    "ieft.neighbours": 0,
    "ieft.two_stage": 2,
    "ieft.cpu_attention": 0,
    "ieft.prepacked": 0,
    "ieft.pictures": 1,
    "ieft.ranking": 1,
    "ieft.tiles": 2,
    "ieft.batches": 2,
    "ieft.distillation": 0,
    "ieft.states": 0,
    "ieft.filters": 0,
    "ieft.settings": 0,
    "ieft.explain": 2,
    "ieft.index": 3,
    "ieft.index_files": 3,
    "ieft.report": 2,
    "ieft.trainer": 2,
    "ieft.archives": 0,
    "ieft.bad_rows": 0,
    "ieft.builders": 2,
    "ieft.dataset_report": 2,
    "ieft.downloads": 0,
    "ieft.sources": 1,
    "ieft.streams": 3,
    "ieft.search": 4,
    "prepare_datasets": 4,
}
TOP_LAYER = 5  # the root commands, benchmarks, the `evaluate` module, the package's lazy front
SAME_LAYER = {
    "modeling_ieft": {"configuration_ieft", "layers_ieft", "pipeline_ieft"},
    "pipeline_ieft": {"processing_ieft"},
    "ieft.index": {"ieft.index_files"},
    "ieft.prepacked": {"ieft.cpu_attention"},
    "processing_ieft": {"configuration_ieft"},
}


def local_modules():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("ieft/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(path, modules):
    """Names of the local modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(modules)


@pytest.mark.parametrize("module", sorted(local_modules()))
def test_imports_go_down(module):
    modules = local_modules()
    layer = LAYERS.get(module, TOP_LAYER)
    allowed = SAME_LAYER.get(module, set())
    for name in imported(modules[module], modules) - {module}:
        below = LAYERS.get(name, TOP_LAYER) < layer or (layer == TOP_LAYER and name != "ieft")
        assert below or name in allowed, f"{module} (layer {layer}) imports {name}"


def test_the_table_names_files_that_exist():
    assert set(LAYERS) <= set(local_modules())
