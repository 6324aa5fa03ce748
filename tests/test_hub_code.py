"""Tests that a saved folder loads in another process and working directory: with its own code if the project is not
installed, and by the auto classes alone if it is.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_modeling import tiny_config
from transformers import BertTokenizer

from modeling_ieft import IeftForImageTextRetrieval, IeftModel
from processing_ieft import IeftImageProcessor, IeftProcessor

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a red house beside a river .", "two ships in a harbour .", "two red ships ."]
# The project is installed in the environment of the tests: these modules are hidden.
WITHOUT_PROJECT = """
import sys
for name in ("ieft", "configuration_ieft", "layers_ieft", "modeling_ieft", "pipeline_ieft", "processing_ieft",
             "ranking_ieft"):
    sys.modules[name] = None
options = {"trust_remote_code": True}
"""
WITH_PROJECT = """
import ieft
options = {}
"""
LOAD_AND_SCORE = """
import json, sys, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
folder, image, *captions = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, **options)
processor = AutoProcessor.from_pretrained(folder, **options)
network = AutoModel.from_pretrained(folder, **options)
model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
inputs = processor(images=[Image.open(image)] * len(captions), text=captions)
with torch.no_grad():
    scores = model(**inputs).logits[:, 0].tolist()
    pooled = network(**inputs).pooler_output[0].tolist()
objects = (config, processor, network, model)
print(json.dumps({
    "names": [type(each).__name__ for each in objects],
    "own_code": [type(each).__module__.startswith("transformers_modules.") for each in objects],
    "scores": scores, "pooled": pooled, "ranked": model.rank(image, captions),
}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model and its processor, an image, and the model's output for it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=60)
    model = IeftForImageTextRetrieval(tiny_config(vocab_size=len(tokenizer))).eval()
    processor = IeftProcessor(IeftImageProcessor(32), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image = tmp_path_factory.mktemp("image") / "image.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(image)
    inputs = processor(images=[Image.open(image)] * len(CAPTIONS), text=CAPTIONS)
    with torch.no_grad():
        return folder, image, model(**inputs).logits[:, 0], model.vilt(**inputs).pooler_output[0]


@pytest.mark.parametrize("with_project", [False, True])
def test_auto_classes_in_another_process_give_the_same_scores(saved, tmp_path, with_project):
    folder, image, scores, pooled = saved
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(tmp_path / "cache")} | ({"PYTHONPATH": str(ROOT)} if with_project else {})
    script = (WITH_PROJECT if with_project else WITHOUT_PROJECT) + LOAD_AND_SCORE
    command = [sys.executable, "-c", script, str(folder), str(image), *CAPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["names"] == ["IeftConfig", "IeftProcessor", "IeftModel", "IeftForImageTextRetrieval"]
    assert said["own_code"] == [not with_project] * 4
    torch.testing.assert_close(torch.tensor(said["scores"]), scores)
    torch.testing.assert_close(torch.tensor(said["pooled"]), pooled)
    best = scores.argmax().item()
    assert said["ranked"][0] == {
        "caption": CAPTIONS[best],
        "score": pytest.approx(scores[best].item(), abs=1e-5),
        "rank": 1,
    }


def test_the_network_comes_out_of_a_retrieval_checkpoint_whole(saved):
    network, report = IeftModel.from_pretrained(saved[0], output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert {key.split(".")[0] for key in report["unexpected_keys"]} <= {
        "rank_output",
        "image_projection",
        "text_projection",
        "logit_scale",
    }
    assert isinstance(network, IeftModel)


SAVE_AGAIN = """
import shutil, sys
from transformers import AutoModelForSequenceClassification
folder, first, second, third = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
model.save_pretrained(first)
shutil.rmtree(folder)
model.save_pretrained(second)
model.config._name_or_path = ""  # as of a model that was made in memory
model.save_pretrained(third)
"""


def test_a_model_of_own_code_is_saved_again_also_where_its_folder_is_gone(saved, tmp_path):
    """transformers does not fetch the pipeline's file, which is copied from the folder as long as that is there."""
    shutil.copytree(saved[0], tmp_path / "copy")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    folders = [str(tmp_path / name) for name in ("copy", "first", "second", "third")]
    command = [sys.executable, "-c", WITHOUT_PROJECT + SAVE_AGAIN, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first" / "pipeline_ieft.py").is_file()
    assert "pipelines need that file" in done.stderr
    for folder in ("first", "second", "third"):
        assert (tmp_path / folder / "model.safetensors").is_file()
        assert (tmp_path / folder / "ranking_ieft.py").is_file()
