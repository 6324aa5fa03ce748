"""Tests that misspelt arguments, and those that would be ignored, are refused where they enter from Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoProcessor,
    BertTokenizer,
)

from ieft import IeftConfig, IeftForImageTextRetrieval, IeftImageProcessor, IeftProcessor, IeftTrainingArguments
from ieft.training.output_folder import OutputFolder
from ieft.training.settings import read_settings

CAPTIONS = ["a red house beside a river .", "two ships in a harbour ."]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=100)
    config = IeftConfig(
        vocab_size=len(tokenizer), image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=16, enhancement_layers=[1], contrastive_dim=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("saved")
    IeftForImageTextRetrieval(config).save_pretrained(folder)
    IeftProcessor(IeftImageProcessor(image_size=32), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["hiden_size", "contrastve_dim", "enhancement_layer", "layer_norm_epsilon"])
def test_a_misspelt_field_of_a_configuration_is_refused(folder, name):
    with pytest.raises(ValueError, match=f"no option {name}; did you mean"):
        IeftConfig(**{name: 3})
    with pytest.raises(ValueError, match=f"no option {name}; did you mean"):
        AutoConfig.from_pretrained(folder, **{name: 3})
    with pytest.raises(ValueError, match=f"no option {name}; did you mean"):
        AutoModelForSequenceClassification.from_pretrained(folder, **{name: 3})


def test_fields_of_transformers_and_of_later_versions_are_kept(folder):
    config = IeftConfig(num_labels=1, qkv_bias=True, max_image_length=-1, num_images=-1, a_later_thing=7)
    assert config.a_later_thing == 7
    assert AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.5).hidden_dropout_prob == 0.5


@pytest.mark.parametrize("name", ["pixel_vales", "lables", "output_atentions"])
def test_the_network_refuses_arguments_that_it_would_ignore(folder, name):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 32, 32)}
    assert model(**inputs, **{name: None}).logits.shape == (1, 1)
    with pytest.raises(ValueError, match=name):
        model(**inputs, **{name: torch.zeros(1)})


@pytest.mark.parametrize("kind", [AutoProcessor, AutoImageProcessor, IeftImageProcessor, IeftProcessor])
def test_a_misspelt_option_of_a_stored_processor_is_refused(folder, kind):
    with pytest.raises(ValueError, match="no option do_rezise; did you mean do_resize"):
        kind.from_pretrained(folder, do_rezise=False)
    loaded = kind.from_pretrained(folder, do_resize=False)
    assert not getattr(loaded, "image_processor", loaded).do_resize


def test_options_that_the_processor_names_are_those_it_has(folder):
    processor, image = AutoProcessor.from_pretrained(folder), Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="no option crop_size; there are (?!.*crop_size).*do_resize"):
        processor(image, "a", crop_size=3)
    for wrong in (0.5, [0.5, 0.5]):
        with pytest.raises(ValueError, match="image_std must be three numbers"):
            processor.image_processor(image, image_std=wrong)
    for wrong in (3, image):
        with pytest.raises(ValueError, match="A caption or a list of captions expected"):
            processor("a", wrong)


@pytest.mark.parametrize("name, value", [
    ("label_smoothing_factor", 0.1), ("prediction_loss_only", True), ("label_names", ["a"]), ("max_steps", 0),
    ("eval_accumulation_steps", 2), ("contrastive_weight", "much"),
])  # fmt: skip
def test_training_options_without_effect_are_refused(tmp_path, name, value):
    IeftTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=name):
        IeftTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("name, text", [
    ("twice.json", '{"seed": 1, "seed": 2}'), ("twice.yaml", "seed: 1\nseed: 2\n"),
])  # fmt: skip
def test_an_option_that_stands_twice_in_a_settings_file_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="seed stands in it twice"):
        read_settings(tmp_path / name, {"seed"})


def test_resuming_without_a_record_of_the_options_warns(tmp_path, caplog):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}", encoding="utf-8")
    run = OutputFolder(tmp_path, training={"seed": 1}, evaluation=None)
    run._check_same_run()
    assert "cannot be compared" in caplog.text
    run.record()
    caplog.clear()
    run._check_same_run()
    assert not caplog.text
    with pytest.raises(ValueError, match="seed was 1 and is 2"):
        OutputFolder(tmp_path, training={"seed": 2}, evaluation=None)._check_same_run()


def test_importing_the_package_lets_pipeline_load_a_saved_folder_without_trusting_its_code(folder):
    script = (
        "import ieft, json\nfrom PIL import Image\nfrom transformers import pipeline\n"
        f"ranker = pipeline('image-text-retrieval', model={str(folder)!r})\n"
        "image = Image.new('RGB', (40, 40))\n"
        f"print(json.dumps(ranker(image, {CAPTIONS!r})))\n"
        f"for wrong in (0, -1, 1.5, '2'):\n"
        "    for name in ('batch_size', 'top_k'):\n"
        f"        try: ranker(image, {CAPTIONS!r}, **{{name: wrong}})\n"
        "        except ValueError: continue\n"
        "        raise SystemExit(f'{name}={wrong!r} was taken')\n"
        f"assert len(ranker.model.rank(image, iter({CAPTIONS!r}), processor=ranker.processor)) == 2\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) == 2
