"""The lowest versions that setup.cfg declares, as requirements for pip; and, run with them, whether the project works.

python tests/lowest_versions.py > lowest.txt && pip install -r lowest.txt
python tests/lowest_versions.py --check
"""

import configparser
import re
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("search", "geo")  # gradio and its kin take long, and are of one exact version on a Space


def lowest_versions():
    """Package -> version, of what is required and of the extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    parts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in EXTRAS)]
    return dict(re.findall(r"^([\w-]+)>=([\w.]+)$", "\n".join(parts), re.MULTILINE))


def check():
    """Import everything, train a step, save, load, rank, index and look up.

    Raises:
        AssertionError: where another version is installed, or something goes wrong.
    """
    for name, lowest in lowest_versions().items():
        installed = version(name).split("+")[0]
        assert [*map(int, installed.split("."))][: lowest.count(".") + 1] == [*map(int, lowest.split("."))], (
            f"{name} {lowest} expected, the lowest version that setup.cfg declares; {installed} is installed."
        )
    sys.path.insert(0, str(ROOT))
    files = [*ROOT.glob("*.py"), *ROOT.glob("ieft/**/*.py")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    for name in sorted(modules - {"app", "ieft.page.page", "ieft.page.visitors", "ieft.search.cluster"}):
        import_module(name)
    from PIL import Image

    import ieft
    import run_retrieval
    from ieft.search.command import main as search

    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        options = ["--dataset_name", "scenes", "--max_steps", "1", "--train_batch_size", "4"]
        options += ["--max_train_samples", "8", "--max_eval_samples", "4", "--max_predict_samples", "4"]
        results = run_retrieval.main([*options, "--use_cpu", "--report_to", "none", "--output_dir", run])
        assert 0 <= results["mean_recall"] <= 100
        archive = Path(folder, "archive")
        archive.mkdir()
        for number in range(3):
            ieft.draw_scene(1, number, size=96).image.save(archive / f"{number}.png")
        model = ieft.IeftForImageTextRetrieval.from_pretrained(run)
        images = [Image.open(file) for file in sorted(archive.iterdir())]
        hits = model.rank("a river beside a house", images)
        assert [hit["rank"] for hit in hits] == [1, 2, 3]
        named = ["--model", run, "--index", f"{folder}/index.lance"]
        assert search(["index", str(archive), *named]) == 0
        assert search(["query", "a river beside a house", *named, "--where", "width >= 96"]) == 0
    print("The lowest versions work: " + ", ".join(f"{name} {each}" for name, each in lowest_versions().items()))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        print("\n".join(f"{name}=={each}" for name, each in lowest_versions().items()))
