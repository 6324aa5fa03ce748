"""Tests of the training command, run as users run it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch.distributed as dist
from hub_server import running_hub
from PIL import Image
from small_training import run_ranks

import run_retrieval
from configuration_ieft import CALIBRATION, IeftConfig
from convert_checkpoint import VILT_RELEASE
from ieft.data.invalid_examples import BadRowsError
from ieft.hub import LAST_PUSH
from ieft.training.output_folder import OutputFolder
from modeling_ieft import IeftForImageTextRetrieval
from prepare_datasets import load_retrieval_dataset
from processing_ieft import IeftProcessor

ROOT = Path(__file__).parent.parent
PREDICT = ["--dataset_name", "scenes", "--use_cpu", "--max_predict_samples", "8", "--disable_tqdm", "true"]
SMALL = [*PREDICT, "--max_train_samples", "24", "--max_eval_samples", "6", "--first_joint_layer", "2",
         "--train_batch_size", "8"]  # fmt: skip
RESUME = ["--resume_from_checkpoint"]
RECALLS = [f"{way}_r{k}" for way in ("ir", "tr") for k in (1, 5, 10)] + ["mean_recall"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a short training, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "run_retrieval.py", *SMALL, "--output_dir", str(folder), "--max_steps", "4",
               "--eval_steps", "2", "--save_steps", "2"]  # fmt: skip
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder, finished.stdout


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_everything_promised_is_written(trained):
    folder, printed = trained
    results = read(folder, "test_results.json")
    expected = RECALLS + [f"dedup_{name}" for name in RECALLS] + ["num_images", "num_captions", "protocol", "dataset"]
    assert set(expected) <= set(results)
    assert (results["num_images"], results["protocol"], results["dataset"]) == (8, "clean", "scenes")
    assert results["mean_recall"] == pytest.approx(sum(results[name] for name in RECALLS[:6]) / 6)
    everything = read(folder, "all_results.json")
    assert everything["test_mean_recall"] == results["mean_recall"] and "eval_mean_recall" in everything
    assert f"{results['mean_recall']:.1f}" in printed
    card = (folder / "README.md").read_text()
    assert f"{results['mean_recall']:.2f}" in card and "| `learning_rate` | `0.002` |" in card
    for picture in ("ranked.png", "training.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200


def test_the_folder_loads_and_scores(trained):
    folder, _ = trained
    model = IeftForImageTextRetrieval.from_pretrained(folder).eval()
    processor = IeftProcessor.from_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (200, 90), "green"), text="two white storage tanks .")
    assert model(**inputs).logits.shape == (1, 1)


def test_an_earlier_run_is_not_written_over_but_gone_on_with(trained, tmp_path):
    folder, _ = trained
    again = [*SMALL, "--output_dir", str(folder), "--max_steps", "4"]
    with pytest.raises(ValueError, match="--resume_from_checkpoint true"):
        run_retrieval.main(again)
    before = read(folder, "test_results.json")
    resumed = run_retrieval.main([*again, "--resume_from_checkpoint", "true"])
    assert resumed == before  # all its steps are done: the same weights, the same recalls


def run_command(folder, arguments):
    run_retrieval.main([*arguments, "--output_dir", folder])


def test_two_processes_give_the_same_recalls_as_one(trained, tmp_path):
    arguments = [*PREDICT, "--do_eval", "--do_predict", "--max_eval_samples", "6",
                 "--model_name_or_path", str(trained[0])]  # fmt: skip
    codes = run_ranks(tmp_path / "two", 2, call=run_command, arguments=arguments)
    printed = [(tmp_path / "two" / f"printed{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [0, 0], printed
    run_command(str(tmp_path / "one"), arguments)
    assert read(tmp_path / "two", "test_results.json") == read(tmp_path / "one", "test_results.json")
    assert read(tmp_path / "two", "eval_results.json") == read(tmp_path / "one", "eval_results.json")
    assert [each.count("mean recall") for each in printed] == [1, 0]  # one process speaks


def train_as_a_command(folder, arguments):
    sys.argv = ["run_retrieval.py", *arguments, "--output_dir", folder]
    run_retrieval.command()
    print("group open:", dist.is_initialized(), flush=True)
    os._exit(0)


def test_two_processes_train_and_take_leave(tmp_path):
    """A process that ends without destroying its group is sometimes aborted, and the launcher reports a failure."""
    arguments = [*SMALL, "--max_steps", "3", "--eval_steps", "3", "--save_steps", "3"]
    codes = run_ranks(tmp_path, 2, call=train_as_a_command, arguments=arguments)
    printed = [(tmp_path / f"printed{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [0, 0], printed
    assert "mean_recall" in read(tmp_path, "test_results.json")
    assert all("group open: False" in each for each in printed)


def test_push_to_hub_is_one_flag(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with running_hub() as (address, hub):
        environment |= {"HF_ENDPOINT": address, "HF_TOKEN": "anything", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "run_retrieval.py", *SMALL[:-2], "--do_eval", "--do_predict",
                   "--output_dir", str(tmp_path), "--push_to_hub", "--hub_model_id", "someone/scenes"]  # fmt: skip
        command.remove("--max_train_samples"), command.remove("24")
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert finished.returncode == 0, finished.stderr[-3000:]
        files = hub.files("someone/scenes")
        (tmp_path / LAST_PUSH).unlink()  # as if somebody else had pushed there
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert refused.returncode == 1 and "--overwrite_repository" in refused.stderr
        assert "Traceback" not in refused.stderr and hub.files("someone/scenes") == files
    assert f"Pushed: {address}/someone/scenes/commit/" in finished.stdout
    assert {"model.safetensors", "modeling_ieft.py", "tokenizer.json", "ranked.png", "test_results.json"} <= set(files)
    assert "model-index" in files["README.md"].decode() and not any(name.startswith("checkpoint") for name in files)


def test_a_checkpoint_is_calibrated_in_place_and_its_probabilities_judged(tmp_path, capsys):
    small, out = tmp_path / "small", tmp_path / "out"
    shutil.copytree(ROOT / "checkpoints" / "small", small)
    before = read(small, "config.json") | {"calibration_scale": 9.0, "calibration_offset": 9.0}
    (small / "config.json").write_text(json.dumps(before))
    weights = (small / "model.safetensors").read_bytes()
    arguments = [*PREDICT, "--max_eval_samples", "40", "--model_name_or_path", str(small), "--output_dir", str(out)]
    assert run_retrieval.main([*arguments, "--do_calibrate", "--do_predict"])["num_images"] == 8
    after, judged = read(small, "config.json"), read(out, "probability.json")
    assert {name for name in before | after if before.get(name) != after.get(name)} == set(CALIBRATION)
    assert 0 < after["calibration_scale"] < 9 and (small / "model.safetensors").read_bytes() == weights
    assert judged["sentences"] == read(out, "test_results.json")["num_captions"] and 0 <= judged["ece"] <= 1
    assert f"expected calibration error {judged['ece']:.3f}" in capsys.readouterr().out
    with Image.open(out / "reliability.png") as image:
        assert min(image.size) > 200
    # What is trained further has other scores.
    model, _ = run_retrieval.load_model(*run_retrieval.parse_arguments([*arguments, "--do_train"])[::2], [])
    assert model.config.calibration_scale is None


def test_other_datasets_are_ranked_without_the_images_trained_on(trained, tmp_path):
    """A collection of five test images: three re-encoded ones of the scenes' training split, and two new ones."""
    scenes = load_retrieval_dataset("scenes")
    pictures = [scenes["train"][row]["image"] for row in range(3)] + [scenes["test"][row]["image"] for row in (60, 61)]
    records = []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.bmp")
        records.append({"image": f"{number}.bmp", "captions": [f"a field {number} ."], "split": "test"})
    records += [{"image": "0.bmp", "captions": [" "], "split": "test"}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = [*PREDICT, "--do_predict", "--model_name_or_path", str(trained[0]), "--on_bad_rows", "skip",
                 "--output_dir", str(tmp_path / "out"), "--eval_datasets", str(tmp_path / "other.jsonl")]  # fmt: skip
    results = run_retrieval.main(arguments)["eval_datasets"][str(tmp_path / "other.jsonl")]
    assert (results["num_images"], results["removed_overlap"], results["bad_rows"]) == (2, 3, 2)
    assert read(tmp_path / "out", "eval_datasets.json")[str(tmp_path / "other.jsonl")] == results
    assert (
        read(tmp_path / "out", "bad_rows.json") == [] and read(tmp_path / "out", "test_results.json")["bad_rows"] == 0
    )


def write_fields(folder, *, deep=False):
    """Sixteen images per split, of 8 bits, or of 16 bits, which have to be stretched."""
    folder.mkdir()
    records = []
    for split in ("train", "validation", "test"):
        for number in range(16):
            pixels = np.random.default_rng([len(split), number]).integers(0, 256, (3, 30, 30), dtype=np.uint8)
            name, options = f"{split}_{number}.tif", {"photometric": "rgb", "dtype": "uint16" if deep else "uint8"}
            with rasterio.open(folder / name, "w", driver="GTiff", width=30, height=30, count=3, **options) as scene:
                scene.write(pixels.astype(options["dtype"]) + 100 * deep)
            captions = [f"a field of number {number} in {split} ."]
            records.append({"image": name, "captions": captions, "split": split})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "rows.jsonl"


def test_a_streaming_run_copies_no_image_and_gives_the_same_recalls(tmp_path, monkeypatch):
    path = str(write_fields(tmp_path / "deep", deep=True))
    arguments = ["--use_cpu", "--disable_tqdm", "true", "--dataset_name", path, "--network", "tiny",
                 "--max_steps", "3", "--eval_steps", "3", "--save_steps", "3", "--num_negatives", "4",
                 "--protocol", "published", "--train_batch_size", "4"]  # fmt: skip
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    streamed = run_retrieval.main([*arguments, "--streaming", "--output_dir", str(tmp_path / "streamed")])
    assert {each.suffix for each in cache.rglob("*") if each.is_file()} == {".json"}  # what the check of images found
    prepared = run_retrieval.main([*arguments, "--output_dir", str(tmp_path / "prepared")])
    assert streamed == prepared and streamed["num_images"] == 16
    assert [each for each in cache.rglob("*.arrow")]
    with pytest.raises(ValueError, match="someone/fields on the Hub is a stream"):
        run_retrieval.main([*arguments, "--streaming", "--dataset_name", "someone/fields"])


def test_any_split_can_be_ranked_as_another_dataset(trained, tmp_path):
    path = str(write_fields(tmp_path / "data"))
    out, wishes = str(tmp_path / "out"), [f"{path}:validation", path]
    arguments = [*PREDICT, "--do_predict", "--model_name_or_path", str(trained[0]), "--output_dir", out]
    results = run_retrieval.main([*arguments, "--eval_datasets", *wishes])["eval_datasets"]
    assert [(each["num_images"], each["split"], each["removed_overlap"]) for each in map(results.get, wishes)] == [
        (16, "validation", 0), (16, "test", 0),
    ]  # fmt: skip
    assert run_retrieval.parse_wish("scenes:validation") == ("scenes", None, "validation")
    assert run_retrieval.parse_wish("rsicd=C:/RSICD:train") == ("rsicd", "C:/RSICD", "train")
    assert run_retrieval.parse_wish("rsicd=C:/RSICD") == ("rsicd", "C:/RSICD", "test")
    (tmp_path / "year=2020").mkdir()
    assert run_retrieval.parse_wish(f"{tmp_path}/year=2020") == (f"{tmp_path}/year=2020", None, "test")


def test_another_copy_of_the_dataset_is_ranked_without_the_images_trained_on(tmp_path):
    """The splits of the copy are others: its validation images are those trained on."""
    write_fields(tmp_path / "UCM")
    rows = [json.loads(line) for line in (tmp_path / "UCM" / "rows.jsonl").read_text().splitlines()]
    folders = {}
    for folder, names in (("A", {}), ("B", {"train": "validation", "validation": "train"})):
        folders[folder] = shutil.copytree(tmp_path / "UCM", tmp_path / folder)
        moved = [row | {"split": names.get(row["split"], row["split"])} for row in rows]
        (folders[folder] / "rows.jsonl").write_text("\n".join(map(json.dumps, moved)))
    splits = load_retrieval_dataset("ucm", folders["A"])
    options = {"dataset_name": "ucm", "data_dir": str(folders["A"])}
    wanted = run_retrieval.DataArguments(**options, eval_datasets=[f"ucm={folders['A']}:validation"])
    assert [len(kept) for kept, _ in run_retrieval.load_others(wanted, splits, 0).values()] == [16]
    wanted = run_retrieval.DataArguments(**options, eval_datasets=[f"ucm={folders['B']}:validation"])
    with pytest.raises(ValueError, match="all 16 images of its validation split are in the training or validation"):
        run_retrieval.load_others(wanted, splits, 0)


@pytest.mark.parametrize("wish", ["nothere", "ucm", "scenes:tset"])
def test_a_dataset_to_evaluate_that_cannot_be_found_is_named_with_its_option(wish):
    scenes = load_retrieval_dataset("scenes")
    with pytest.raises(ValueError, match=f"--eval_datasets {wish}: .*\n.*NAME=FOLDER.*:validation"):
        run_retrieval.load_others(run_retrieval.DataArguments(eval_datasets=[wish]), scenes, 0)


def test_bad_rows_stop_a_run_before_training_and_are_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "gone.png", "captions": ["a field ."]}))
    with pytest.raises(BadRowsError, match="gone.png: no such image file"):
        run_retrieval.main(
            ["--use_cpu", "--dataset_name", str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path / "o")]
        )
    assert read(tmp_path / "o", "bad_rows.json")[0]["filename"] == "gone.png"


# Arguments -----------------------------------------------------------------------------------------------------------


def test_a_push_without_a_place_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="--hub_model_id user/name"):
        run_retrieval.main([*SMALL, "--push_to_hub"])


def test_presets_follow_dataset_and_network_and_yield_to_the_user(tmp_path):
    _, data_args, args = run_retrieval.parse_arguments(["--dataset_name", "sydney", "--use_cpu"])
    assert (args.train_batch_size, args.num_train_epochs, args.learning_rate) == (512, 100, 1e-4)
    assert (args.adam_beta2, args.weight_decay, args.contrastive_weight, args.num_negatives) == (0.98, 0.01, 0, 15)
    assert args.do_train and args.do_eval and args.do_predict and args.metric_for_best_model == "mean_recall"
    model_args, _, args = run_retrieval.parse_arguments(["--use_cpu", "--learning_rate", "1e-3", "--do_eval"])
    assert (model_args.network, args.learning_rate, args.contrastive_weight) == ("tiny", 1e-3, 1.0)
    assert not args.do_train and args.do_eval and not args.do_predict
    model_args, _, args = run_retrieval.parse_arguments(["--use_cpu", "--num_train_epochs", "2"])
    assert args.max_steps == -1 and args.num_train_epochs == 2
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"dataset_name": "ucm", "network": "tiny", "use_cpu": True, "max_steps": 7}))
    model_args, data_args, args = run_retrieval.parse_arguments([str(path)])
    assert (data_args.dataset_name, model_args.network, args.max_steps) == ("ucm", "tiny", 7)


@pytest.mark.parametrize(
    "arguments, start",
    [
        (["--dataset_name", "rsicd"], VILT_RELEASE),
        (["--dataset_name", "MyImages", "--network", "base", "--enhancement_layers", "1"], VILT_RELEASE),
        (["--network", "base"], VILT_RELEASE),
        (["--dataset_name", "ucm", "--from_scratch"], None),
        (["--dataset_name", "ucm", "--network", "tiny"], None),
        ([], None),
        (["--dataset_name", "ucm", "--do_predict"], None),
        (["--dataset_name", "ucm", "--model_name_or_path", "a/b"], "a/b"),
    ],
)
def test_a_full_size_network_starts_as_the_published_one_unless_from_scratch(arguments, start):
    model_args, _, _ = run_retrieval.parse_arguments(["--use_cpu", *arguments])
    assert model_args.model_name_or_path == start


@pytest.mark.parametrize("name, epochs, batch", [("rsicd", 50, 256), ("rsitmd", 50, 256), ("ucm", 100, 256)])
def test_published_epochs_and_batches(name, epochs, batch):
    _, _, args = run_retrieval.parse_arguments(["--dataset_name", name, "--use_cpu"])
    assert (args.num_train_epochs, args.train_batch_size) == (epochs, batch)


def test_the_published_protocol_trains_on_validation_and_chooses_on_test(tmp_path):
    _, data_args, args = run_retrieval.parse_arguments(
        ["--use_cpu", "--protocol", "published", "--output_dir", str(tmp_path)]
    )
    published, _ = run_retrieval.load_splits(data_args, args)
    data_args.protocol = "clean"
    clean, _ = run_retrieval.load_splits(data_args, args)
    assert len(published["train"]) == len(clean["train"]) + len(clean["validation"]) == 1100
    assert list(published["validation"]["filename"]) == list(clean["test"]["filename"])
    assert set(clean["test"]["filename"]).isdisjoint([*clean["train"]["filename"], *clean["validation"]["filename"]])


# What was made is never written over --------------------------------------------------------------------------------


def snapshot(folder):
    """Name -> bytes of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the trained folder."""
    return Path(shutil.copytree(trained[0], tmp_path / "finished"))


def command(*arguments, **environment):
    """The command as users run it: exit code and what it wrote on its error stream."""
    finished = subprocess.run([sys.executable, "run_retrieval.py", *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True, timeout=300, env=os.environ | environment)  # fmt: skip
    return finished.returncode, finished.stderr


@pytest.mark.parametrize("stage", ["--do_predict", "--do_eval"])
def test_an_evaluation_judges_the_model_in_the_folder_and_saves_none(finished, stage):
    before = snapshot(finished)
    sizes = ["--max_predict_samples", "8"] if stage == "--do_predict" else ["--max_eval_samples", "6"]
    options = [*PREDICT[:3], "--disable_tqdm", "true", *sizes, "--output_dir", str(finished)]
    others = {"--do_predict": "max_eval_samples", "--do_eval": "max_predict_samples"}
    record = json.loads((finished / ".run.json").read_text())
    record["evaluation"][others[stage]] = None  # what this stage does not take
    (finished / ".run.json").write_text(json.dumps(record))
    epochs = [json.loads(before[name]).get("epoch") for name in ("all_results.json", "eval_results.json")]
    run_retrieval.main([*options, stage])
    after = snapshot(finished)
    assert json.loads(after["all_results.json"]).get("epoch") == epochs[0]  # of the training
    assert json.loads(after["eval_results.json"]).get("epoch") in (epochs[1], None)
    results = {"all_results.json", "eval_results.json", "ranked.png", ".run.json", "bad_rows.json"}  # written again
    assert {name: before[name] for name in before.keys() - results} == {
        name: after[name] for name in after.keys() - results
    }


def test_an_evaluation_without_a_model_stops_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="No model to evaluate"):
        run_retrieval.main([*PREDICT, "--do_predict", "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*SMALL, "--max_steps", "4"], "--resume_from_checkpoint true"),
        (["--use_cpu", "--max_steps", "4", "--do_train"], "training would write over"),
        ([*SMALL, "--max_steps", "4", *RESUME, "true", "--seed", "5"], "seed was 0 and is 5"),
        (
            [*SMALL, "--max_steps", "4", *RESUME, "true", "--learning_rate", "1"],
            "learning_rate was",
        ),
        ([*SMALL, "--max_steps", "4", *RESUME, "yes please"], "no such folder"),
        (["--use_cpu", "--dataset_name", "twins", "--do_predict"], "dataset_name was 'scenes' and is 'twins'"),
        (["--use_cpu", "--dataset_name", "scenes", "--protocol", "published", "--do_predict"], "protocol was"),
        (["--use_cpu", "--dataset_name", "scenes", "--do_predict", "--model_name_or_path", "OTHER"], "another model"),
        ([*PREDICT, "--max_eval_samples", "6", "--do_predict", "--fit", "squash"], "fit was None and is 'squash'"),
    ],
)
def test_nothing_in_a_finished_folder_is_touched_by_another_run(finished, trained, monkeypatch, arguments, message):
    def no_data(*_, **__):
        raise AssertionError("data was loaded before the check")

    monkeypatch.setattr(run_retrieval, "load_splits", no_data)
    before = snapshot(finished)
    arguments = [str(trained[0]) if each == "OTHER" else each for each in arguments]
    with pytest.raises(ValueError, match=message):
        run_retrieval.main([*arguments, "--output_dir", str(finished)])
    assert snapshot(finished) == before


def test_a_folder_with_results_of_the_version_before_is_known_by_its_results(finished):
    (finished / ".run.json").unlink()
    with pytest.raises(ValueError, match="dataset_name was 'scenes' and is 'twins'"):
        run_retrieval.main(["--use_cpu", "--dataset_name", "twins", "--do_predict", "--output_dir", str(finished)])


@pytest.mark.parametrize("name", ["config.json", "README.md", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_training_into_a_folder_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}"):
        run_retrieval.main([*SMALL, "--max_steps", "1", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        run_retrieval.main([*SMALL, "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path)])
    assert snapshot(tmp_path) == {name: b"mine"}


def test_two_runs_never_train_into_one_folder(tmp_path):
    held = OutputFolder(tmp_path, training={}, evaluation={})
    with held.claimed():
        code, printed = command(*SMALL, "--max_steps", "1", "--output_dir", tmp_path)
    assert code == 1 and "Another run is writing to" in printed and "Traceback" not in printed
    with held.claimed(), pytest.raises(ValueError, match="Another run is writing to"):  # nor evaluates
        run_retrieval.main(
            ["--use_cpu", "--do_predict", "--model_name_or_path", "/no/model", "--output_dir", str(tmp_path)]
        )


@pytest.mark.parametrize("stage", ["--do_train", "--do_predict"])
def test_an_output_folder_must_be_a_folder_that_can_be_written(tmp_path, stage):
    (tmp_path / "file").write_text("mine")
    options = ["--use_cpu", stage, *(["--model_name_or_path", "/no/model"] if stage == "--do_predict" else [])]
    with pytest.raises(ValueError, match="file is a file: --output_dir must be a folder"):
        run_retrieval.main([*options, "--output_dir", str(tmp_path / "file")])
    with pytest.raises(OSError, match="cannot be written: .* Pass another --output_dir"):
        run_retrieval.main([*options, "--output_dir", str(tmp_path / "file" / "below")])
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("option, first, second, file", [
    ("rerank_top_k", "8", "16", "two_stage.json"), ("eval_datasets", "ucm=A", "ucm=B", "eval_datasets.json"),
])  # fmt: skip
def test_results_beside_the_test_split_are_replaced_by_the_same_options_alone(tmp_path, option, first, second, file):
    def folder(*more):
        options = [
            "--use_cpu",
            "--do_predict",
            "--model_name_or_path",
            "/no/model",
            "--output_dir",
            str(tmp_path),
            *more,
        ]
        return OutputFolder(tmp_path, **run_retrieval.deciding_options(*run_retrieval.parse_arguments(options)))

    folder(f"--{option}", first).record()
    (tmp_path / file).write_text("{}")
    for same in ([f"--{option}", first], []):
        assert folder(*same).find_model("/no/model") == "/no/model"
    with pytest.raises(ValueError, match=f"{option} was .* Pass another --output_dir"):
        folder(f"--{option}", second).find_model("/no/model")


# Options mean what they say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_step", "3"], "unrecognized arguments: --max_step"),
        (["--negatives", "distnct"], "invalid choice"),
        (["--augmentation", "flip"], "invalid choice"),
        (["--fit", "pad"], "invalid choice"),
        (["--batches", "hard"], "invalid choice"),
    ],
)
def test_a_misspelt_option_or_choice_is_refused_by_the_parser(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_retrieval.parse_arguments(["--use_cpu", *arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--do_predict", "--teacher", "x"], "--teacher has no effect without --do_train"),
        (["--do_train", "--rerank_top_k", "5"], "--rerank_top_k has no effect without --do_predict"),
        (["--do_eval", "--eval_datasets", "ucm"], "--eval_datasets has no effect"),
        (["--eval_datasets", "ucm=A", "ucm=B"], "--eval_datasets has ucm more than once"),
        (["--do_predict", "--network", "tiny"], "--network has no effect"),
        (["--data_dir", "X"], "--data_dir has no effect on synthetic scenes"),
        (["--dataset_name", "twins", "--bands", "1"], "--bands has no effect on synthetic scenes"),
        (["--model_name_or_path", "x", "--network", "tiny"], "starts from a checkpoint"),
        (["--model_name_or_path", "x", "--enhancement_layers", "1"], "starts from a checkpoint"),
        (["--model_name_or_path", "x", "--from_scratch"], "starts from a checkpoint"),
        (["--do_predict", "--from_scratch"], "--from_scratch has no effect"),
        (["--contrastive_weight", "0", "--contrastive_dim", "8"], "--contrastive_dim has no effect"),
        (["--do_calibrate", "--do_train"], "training calibrates its own"),
        (
            ["--do_calibrate", "--model_name_or_path", "user/name"],
            "a folder expected; got --model_name_or_path user",
        ),
        (["--do_calibrate", "--model_name_or_path", "checkpoints/small", "--fit", "crop"], "leave out --fit"),
        (["--rerank_top_k", "0"], "--rerank_top_k must be 1 or more"),
        (["--max_train_samples", "-1"], "--max_train_samples must be 1 or more"),
        (["--learning_rate", "0"], "learning_rate must be above 0"),
        (["--num_negatives", "0"], "num_negatives must be above 0"),
        (["--num_train_epochs", "0"], "num_train_epochs must be above 0"),
        (["--ranking_start", "3"], "ranking_start is a share"),
        (["--contrastive_weight", "nan"], "contrastive_weight must be 0 or more"),
        (["--do_train", "false", "--do_eval", "false", "--do_predict", "false"], "Nothing to do"),
    ],
)
def test_options_that_would_be_ignored_or_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_retrieval.parse_arguments(["--use_cpu", *arguments])


def test_the_recipe_is_that_of_the_network_trained(trained, tmp_path):
    IeftConfig().save_pretrained(tmp_path)
    _, _, args = run_retrieval.parse_arguments(["--use_cpu", "--model_name_or_path", str(tmp_path)])  # scenes
    assert (args.learning_rate, args.max_steps) == (1e-4, -1)
    _, _, args = run_retrieval.parse_arguments(
        ["--use_cpu", "--model_name_or_path", str(trained[0]), "--dataset_name", "ucm"]
    )
    assert (args.learning_rate, args.max_steps) == (2e-3, 800)


def test_settings_may_be_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset_name: ucm\nnetwork: tiny\nuse_cpu: true\nmax_steps: 7\nlearning_rate: 1e-3\n")
    model_args, data_args, args = run_retrieval.parse_arguments([str(path)])
    assert (data_args.dataset_name, model_args.network, args.max_steps, args.learning_rate) == ("ucm", "tiny", 7, 1e-3)
    path.write_text("datset_name: ucm")
    with pytest.raises(ValueError, match="there is no option datset_name"):
        run_retrieval.parse_arguments([str(path)])
    with pytest.raises(ValueError, match="run.yaml must be the only argument"):
        run_retrieval.parse_arguments([str(path), "--output_dir", "x"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataloader_drop_last", "true", "--train_batch_size", "500"], "No step can be taken"),
        (["--train_batch_size", "1"], "is 0 in batches of one"),
    ],
)
def test_a_run_that_cannot_learn_ends_with_an_error(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_retrieval.main([*SMALL[:-2], *arguments, "--max_steps", "2", "--output_dir", str(tmp_path)])
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "README.md").exists()


def test_launched_by_accelerate_an_error_is_one_message(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "run_retrieval.py"]
    finished = subprocess.run(
        [*launch, *SMALL, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert "run_retrieval.py: " in finished.stderr and "would write over" in finished.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--do_predict", "--teacher", "x"], "--teacher has no effect"), (["--max_step", "3"], "unrecognized arguments"),
])  # fmt: skip
def test_the_main_process_reports_an_error_first_and_another_its_own_after_it(monkeypatch, capsys, arguments, message):
    """Launchers end all processes once one fails: without the time between, an error could be reported by none."""
    monkeypatch.setattr(sys, "argv", ["run_retrieval.py", *arguments])
    monkeypatch.setattr(run_retrieval, "SECONDS_FOR_THE_MAIN_PROCESS", 0.5)
    for rank, name, seconds in (("0", "run_retrieval.py: ", 0), ("1", "run_retrieval.py (process 1): ", 0.5)):
        monkeypatch.setenv("RANK", rank)
        begun = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            run_retrieval.command()
        assert ended.value.code == 1 and time.monotonic() - begun >= seconds
        printed = capsys.readouterr().err
        assert printed.startswith(name + message) and len(printed.splitlines()) == 1


def test_a_name_that_the_terminal_cannot_show_ends_no_run(monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(run_retrieval, "main", lambda: print("日本"))
    run_retrieval.command()
    printed.flush()
    assert printed.buffer.getvalue() == b"\\u65e5\\u672c\n"
