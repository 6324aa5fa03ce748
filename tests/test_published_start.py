"""Tests of the main command with nothing but a benchmark's name, against servers with the layouts of the real ones."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from file_server import running_files
from hub_server import running_hub
from test_convert_checkpoint import save_lightning, tiny_published, write_vocabulary

from convert_checkpoint import VILT_RELEASE
from ieft.data.scenes import draw_scene

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com"
COUNTS = {"train": 5, "valid": 1, "test": 2}
FAULTY = "bridge_218.jpg"  # one of the three images of RSICD with a caption that is a full stop


def encoded(image, kind):
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def scenes(count):
    """Images with five distinct captions each."""
    return [(encoded(scene.image, "JPEG"), [f"{caption} {number} {each}" for each, caption in
             enumerate((scene.captions * 5)[:5])])
            for number, scene in ((number, draw_scene(1, number, size=64)) for number in range(count))]  # fmt: skip


def rsicd_on_the_hub(folder):
    """Path -> bytes of a repository like `arampacha/rsicd`."""
    columns = {"filename": datasets.Value("string"), "captions": datasets.List(datasets.Value("string")),
               "image": datasets.Image()}  # fmt: skip
    rows, files = scenes(sum(COUNTS.values())), {"README.md": b"---\nlanguage: en\n---\n"}
    for split, count in COUNTS.items():
        records = []
        for number in range(count):
            content, captions = rows.pop()
            name = FAULTY if (split, number) == ("train", 0) else f"river_{len(rows)}.jpg"
            captions[0] = " ." if name == FAULTY else captions[0]
            image = {"bytes": content, "path": None}
            records.append({"filename": f"rsicd_images/{name}", "captions": captions, "image": image})
        path = folder / f"{split}-00000-of-00001-0123456789abcdef.parquet"
        datasets.Dataset.from_list(records, datasets.Features(columns)).to_parquet(path)
        files[f"data/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture
def internet(tmp_path):
    """The environment of a machine whose Hub and GitHub are servers on loopback; the `Hub` and the `FileServer`."""
    tensors = {name: tensor for name, tensor in tiny_published(with_stages=False).items()
               if not re.match(r"transformer\.blocks\.([2-9]|1\d)", name)}  # fmt: skip
    release = save_lightning(tensors, tmp_path / "release.ckpt").read_bytes()
    vocabulary = (write_vocabulary(tmp_path / "vocabulary", 60) / "vocab.txt").read_bytes()
    config = json.dumps({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}).encode()
    (tmp_path / "parquet").mkdir()
    with running_hub() as (address, hub), running_files({VILT_RELEASE.removeprefix(GITHUB): release}) as github:
        hub.put("arampacha/rsicd", rsicd_on_the_hub(tmp_path / "parquet"))
        hub.put("bert-base-uncased", {"vocab.txt": vocabulary, "tokenizer_config.json": config})
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1",
            "IEFT_GITHUB_ENDPOINT": github.address, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        yield environment, hub, github


def run(environment, folder, *options, launch=("-m", "accelerate.commands.launch")):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *launch, str(ROOT / "run_retrieval.py"), "--dataset_name", "rsicd", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_the_name_of_the_benchmark_is_enough(internet, tmp_path):
    """Data, start and tokenizer are fetched; trained, evaluated and written; again without a network."""
    environment, hub, github = internet
    github.cuts = [1000]  # the release file breaks off once
    finished = run(environment, tmp_path / "fresh")
    assert finished.returncode == 0, finished.stderr[-3000:]
    output = tmp_path / "fresh" / "outputs" / "rsicd"
    results = json.loads((output / "test_results.json").read_text())
    assert (results["num_images"], results["num_captions"], results["bad_rows"]) == (2, 10, 1)
    assert results["dataset"] == "rsicd" and (output / "model.safetensors").is_file()
    state = json.loads(max(output.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime).read_text())
    assert state["epoch"] == 50
    assert f"The network starts from {VILT_RELEASE}" in finished.stderr
    assert "1 captions that are known to be faulty as published are skipped" in finished.stderr
    assert "rsicd: 8 images; 10,921 are published" in finished.stderr
    assert "starts from random weights" not in finished.stderr
    assert f"It starts from [vilt_200k_mlm_itm.ckpt]({VILT_RELEASE})" in (output / "README.md").read_text()
    assert [wish for _, wish in github.requests] == [None, "bytes=1000-"]
    asked = len(hub.requests) + len(github.requests)
    options = ["--do_predict", "--use_cpu", "--output_dir", str(output)]
    again = run(environment | {"HF_HUB_OFFLINE": "1"}, tmp_path / "fresh", *options, launch=())
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(hub.requests) + len(github.requests) == asked
    assert json.loads((output / "test_results.json").read_text()) == results
