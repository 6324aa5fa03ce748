"""Tests of pushing to a local Hub over HTTP, loading from it with an empty cache, and the model card there."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import running_hub
from huggingface_hub import ModelCard
from PIL import Image
from test_modeling import tiny_config
from transformers import BertTokenizer

from ieft.hub import push_folder, render_model_card, write_model_card
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a red house beside a river .", "two ships in a harbour ."]
RESULTS = {
    "ir_r1": 12.5, "ir_r5": 40.0, "ir_r10": 60.1234, "tr_r1": 11.0, "tr_r5": 39.0, "tr_r10": 55.5,
    "mean_recall": 36.35, "dedup_ir_r1": 14.25, "dedup_mean_recall": 41.0, "num_images": 93, "num_captions": 419,
    "protocol": "clean",
    "dataset": "rsicd",
}  # fmt: skip
LOAD_AND_SCORE = """
import json, sys
from transformers import pipeline
scores = []
for name in sys.argv[1].split(","):
    retrieval = pipeline("image-text-retrieval", model=name, trust_remote_code=True)
    scores.append([hit["score"] for hit in retrieval(sys.argv[2], sys.argv[3:])])
print(json.dumps(scores))
"""
PUSH_FOLDER = """
import sys
from ieft.hub import push_folder
print(push_folder(sys.argv[1], sys.argv[2]))
"""
PUSH_MODEL = """
import sys
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.push_to_hub(sys.argv[2]).commit_url)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as `run_retrieval.py` leaves it, training state and all; an image; its scores."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=60)
    model = IeftForImageTextRetrieval(tiny_config(vocab_size=len(tokenizer))).eval()
    processor = IeftProcessor(IeftImageProcessor(32), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "test_results.json").write_text(json.dumps(RESULTS))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "config.json").write_text("{}")
    write_model_card(folder, RESULTS, repo_id="someone/ieft-rsicd", training_arguments={"learning_rate": 1e-4})
    image = folder.parent / "image.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(image)
    ranked = model.rank(str(image), CAPTIONS, processor=processor)
    return folder, image, [hit["score"] for hit in ranked]


def command_elsewhere(script, *arguments, folder, address, with_project):
    """How to run a script in its own process with an empty folder, an empty cache and this Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": "anything", "HF_HOME": str(folder / "cache")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if with_project:
        environment["PYTHONPATH"] = str(ROOT)
    args = [sys.executable, "-c", script, *map(str, arguments)]
    return {"args": args, "text": True, "cwd": folder, "env": environment}


def run_elsewhere(*arguments, **places):
    """The last line that it printed."""
    done = subprocess.run(**command_elsewhere(*arguments, **places), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_what_is_pushed_loads_elsewhere_with_the_same_scores(saved, tmp_path):
    """Pushed by `push_folder`, and by a model's own method where this project is not installed."""
    folder, image, scores = saved
    scripts = {"someone/by-folder": PUSH_FOLDER, "someone/by-model": PUSH_MODEL}
    for place in ("load", *scripts):
        (tmp_path / place).mkdir(parents=True)
    with running_hub() as (address, hub):
        for name, script in scripts.items():
            with_project = script == PUSH_FOLDER
            url = run_elsewhere(
                script, folder, name, folder=tmp_path / name, address=address, with_project=with_project
            )
            assert url.startswith(f"{address}/{name}/commit/")
            assert len(hub.commits[name]) == 2  # made, then everything at once
        printed = run_elsewhere(
            LOAD_AND_SCORE, ",".join(scripts), image, *CAPTIONS, folder=tmp_path / "load", address=address,
            with_project=False,
        )  # fmt: skip
        pushed = {name: hub.files(name) for name in scripts}
    code = {f"{part}_ieft.py" for part in ("configuration", "layers", "modeling", "pipeline", "processing", "ranking")}
    for name, loaded in zip(scripts, json.loads(printed), strict=True):
        files = pushed[name]
        assert loaded == pytest.approx(scores, abs=1e-6)
        assert code | {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= set(files)
        assert not {path for path in files if path.startswith("checkpoint-") or path.endswith(".bin")}
        card = ModelCard(files["README.md"].decode())
        assert card.data.eval_results[0].metric_value == 12.5
        assert ("test_results.json" in files) == (scripts[name] == PUSH_FOLDER)


def test_a_folder_that_is_not_whole_is_not_pushed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="lacks modeling_ieft.py, .*README.md, model.safetensors"):
        push_folder(tmp_path, "someone/ieft")


def test_a_model_from_memory_asks_for_its_processor_and_page():
    model = IeftForImageTextRetrieval(tiny_config())
    with pytest.raises(ValueError, match="pass processor="):
        model.push_to_hub("someone/ieft")
    with pytest.raises(ValueError, match="pass model_card="):
        model.push_to_hub("someone/ieft", processor=object())


# The page ----------------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_reads(saved):
    card = ModelCard.load(saved[0] / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.language) == ("apache-2.0", "transformers", "en")
    assert data.pipeline_tag and data.datasets is None and data.metrics == ["recall"]
    measured = {result.metric_name: result.metric_value for result in data.eval_results}
    assert len(data.eval_results) == 9 and {result.dataset_name for result in data.eval_results} == {"rsicd"}
    assert measured["text to image R@10 (strict)"] == 60.12
    assert measured["mean recall (duplicate-aware)"] == 41.0
    assert data.model_name == "ieft-rsicd"


def test_the_page_says_all_that_was_measured_and_nothing_else(saved):
    page = (saved[0] / "README.md").read_text()
    strict, aware = (line for line in page.splitlines() if line.startswith(("| the image it", "| every image that")))
    assert strict.split(" | ")[1:] == ["12.50", "40.00", "60.12", "11.00", "39.00", "55.50", "36.35 |"]
    assert aware.split("|")[2:5] == [" 14.25 ", "  ", "  "]
    said = ["93 images, 419 captions", "Protocol `clean`", "| `learning_rate` | `0.0001` |", "torch ", "## Limits"]
    said += ["@article{", "# ieft-rsicd", 'model="someone/ieft-rsicd"']
    assert [words for words in said if words not in page] == []
    assert "{{" not in page and "{%" not in page and "ranked.png" not in page and "starts from" not in page


@pytest.mark.parametrize("results", [None, {}, {"ir_r1": None, "mean_recall": float("nan")}])
def test_without_results_there_is_no_number(results):
    page = render_model_card(tiny_config(), results, repo_id="a/b")
    assert "## Results" not in page and "## Training" not in page and "model-index" not in page
    assert "nan" not in page and "None" not in page and "recall" not in page
    assert ModelCard(page).data.license == "apache-2.0"


def test_a_base_model_is_named_but_no_path_of_this_machine(tmp_path):
    named = render_model_card(tiny_config(), repo_id="a/b", base_model="dandelin/vilt-b32-mlm")
    assert ModelCard(named).data.base_model == "dandelin/vilt-b32-mlm" and "It starts from [dandelin" in named
    assert str(tmp_path) not in render_model_card(tiny_config(), repo_id="a/b", base_model=str(tmp_path))
    on_path = render_model_card(tiny_config(), RESULTS | {"dataset": str(tmp_path / "own")}, repo_id="a/b")
    assert str(tmp_path) not in on_path and ModelCard(on_path).data.datasets is None


@pytest.mark.parametrize(
    "given, said, listed",
    [
        ("arampacha/rsicd", "arampacha/rsicd", ["arampacha/rsicd"]),
        ("rsicd", "rsicd", None),
        ("my secret scenes.csv", "a dataset of its own", None),
        ("../own/folder", "a dataset of its own", None),
        ("C:\\Users\\me\\set", "a dataset of its own", None),
        ("setup.cfg", "a dataset of its own", None),
    ],
)
def test_a_dataset_is_named_as_the_hub_knows_it(given, said, listed):
    page = render_model_card(tiny_config(), RESULTS | {"dataset": given}, repo_id="a/b")
    assert f"on the test split of {said}:" in page and ModelCard(page).data.datasets == listed
    assert given in (said, *(listed or ())) or given not in page


def test_the_card_of_a_late_fusion_network_says_so():
    late = render_model_card(tiny_config(first_joint_layer=1), repo_id="a/b")
    early = render_model_card(tiny_config(), repo_id="a/b")
    layers = tiny_config().num_hidden_layers
    assert f"| {layers - 1} of {layers}, " in late and "whole network" not in late and "below 1" in late
    assert f"| {layers} of {layers}, " in early and "read by the whole network" in early


def test_a_card_edited_by_hand_stays(saved, tmp_path, capsys):
    shutil.copy(saved[0] / "config.json", tmp_path)
    assert write_model_card(tmp_path).name == "README.md" == write_model_card(tmp_path, RESULTS).name
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("# ", "# My ", 1))
    edited = (tmp_path / "README.md").read_text()
    assert write_model_card(tmp_path, RESULTS).name == "README.generated.md"
    assert (tmp_path / "README.md").read_text() == edited and "edited by hand" in capsys.readouterr().err


def test_a_card_half_written_by_a_killed_process_is_not_taken_for_the_users(saved, tmp_path):
    shutil.copy(saved[0] / "config.json", tmp_path)
    process = os.fork()
    if not process:  # the kernel kills it at byte 200 of the card
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        try:
            write_model_card(tmp_path, RESULTS)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert write_model_card(tmp_path, RESULTS).name == "README.md"


PUSH_AGAIN = """
import sys
from ieft.hub import push_folder
for overwrite in sys.stdin:
    try:
        print(push_folder(sys.argv[1], sys.argv[2], overwrite=overwrite == "yes\\n"), flush=True)
    except ValueError as error:
        print("refused:", " ".join(str(error).split()), flush=True)
"""


def test_a_push_replaces_its_own_commit_alone_and_holds_no_names_of_the_users(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    for name in ("bad_rows.json", "bad_batch_3.json", "notes.json", "model_of_mine.safetensors", "my_ieft.py"):
        (folder / name).write_text("[]")
    secret = "/home/somebody/secret"
    for name in ("config.json", "test_results.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"_name_or_path": secret, "dataset": f"{secret}/own.csv"}))
    name = "someone/ieft-again"

    def push(overwrite="no"):
        pusher.stdin.write(f"{overwrite}\n")
        pusher.stdin.flush()
        return pusher.stdout.readline()

    with running_hub() as (address, hub):
        command = command_elsewhere(PUSH_AGAIN, folder, name, folder=tmp_path, address=address, with_project=True)
        with subprocess.Popen(**command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pusher:
            assert push().startswith(address)
            assert push().startswith(address)  # the same run goes on
            files = hub.files(name)
            hub.commit(name, {"README.md": b"edited on the Hub"})
            refusal = push()
            assert "refused:" in refusal and "overwrite=True" in refusal
            assert hub.files(name)["README.md"] == b"edited on the Hub"
            assert push("yes").startswith(address)
            pusher.stdin.close()
    assert not {"bad_rows.json", "bad_batch_3.json", "notes.json", "model_of_mine.safetensors", "my_ieft.py"} & {
        *files
    }
    assert [path for path, content in files.items() if b"somebody" in content or b"own.csv" in content] == []
