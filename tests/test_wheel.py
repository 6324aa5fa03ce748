"""What is declared: every package that is imported, with a lowest version; and a wheel that works from elsewhere."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_hub_code import saved  # noqa: F401

ROOT = Path(__file__).parent.parent
PACKAGE_OF = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "lance": "pylance",
              "open_clip": "open_clip_torch", "pystac_client": "pystac-client", "yaml": "pyyaml"}  # fmt: skip
USE_WHEEL = """
import json, sys
import ieft, ieft.hub
from transformers import pipeline
folder, image, *captions = sys.argv[1:]
assert ieft.__file__.startswith(sys.path[0] or "."), ieft.__file__
card = ieft.hub.render_model_card(ieft.IeftConfig.from_pretrained(folder), repo_id="someone/ieft")
assert card.startswith("---") and "# ieft" in card
hits = pipeline("image-text-retrieval", model=folder)(image, captions)
print(json.dumps([hit["score"] for hit in hits]))
"""


def imported_packages():
    """Package -> the files of the product that import it; without those of the standard library and our own."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("ieft/**/*.py"), *ROOT.glob("metrics/**/*.py")]
    own = {file.stem for file in ROOT.glob("*.py")} | {"ieft"}
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names):
                found.setdefault(PACKAGE_OF.get(name, name), set()).add(file.relative_to(ROOT).as_posix())
    return found


def test_every_package_that_is_imported_is_declared_with_a_lowest_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    parts = [
        setup["options"]["install_requires"],
        *(setup["options.extras_require"][name] for name in ("search", "geo", "app", "openclip", "stac", "cluster")),
    ]
    declared = {re.split(r"\[|>=", line)[0].lower() for part in parts for line in part.split() if ">=" in line}
    assert {name: files for name, files in imported_packages().items() if name not in declared} == {}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the project's wheel, and nothing else, in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = {".git", "outputs", "build", ".venv", "shared", "__pycache__"}
    shutil.copytree(ROOT, source, ignore=lambda _, names: ignored & {*names})
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(built, check=True, capture_output=True, timeout=300)
    wheel = next(folder.glob("*.whl"))
    target = [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run(target, check=True, capture_output=True, timeout=300)
    return folder / "site"


def test_the_wheel_works_from_another_folder(installed, saved, tmp_path):  # noqa: F811
    folder, image, scores, _ = saved
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(installed), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    captions = ["a red house beside a river .", "two ships in a harbour .", "two red ships ."]

    def run(*command):
        return subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    script = tmp_path / "use.py"
    script.write_text(USE_WHEEL.replace('sys.path[0] or "."', repr(str(installed))))
    done = run(sys.executable, script, folder, image, *captions)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)
    web = {file.name for file in (installed / "ieft" / "page" / "web").iterdir()}
    assert web == {file.name for file in (ROOT / "ieft" / "page" / "web").iterdir()} and "leaflet.js" in web
    assert "ieft.page.command" in (installed / "bin" / "ieft-page").read_text()
    command = run(sys.executable, installed / "bin" / "ieft-search", "--help")
    assert command.returncode == 0 and "query" in command.stdout, command.stderr
