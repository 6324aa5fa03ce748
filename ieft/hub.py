"""Model cards of saved folders, and pushing these folders to the Hub."""

import hashlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData

from configuration_ieft import IeftConfig
from ranking_ieft import refuse_to_replace

TEMPLATE = Path(__file__).parent / "model_card.md"
RECALLS = {
    "ir_r1": "text to image R@1",
    "ir_r5": "text to image R@5",
    "ir_r10": "text to image R@10",
    "tr_r1": "image to text R@1",
    "tr_r5": "image to text R@5",
    "tr_r10": "image to text R@10",
    "mean_recall": "mean recall",
}
WAYS = {
    "": ("strict", "the image it was written for"),
    "dedup_": ("duplicate-aware", "every image that carries the same sentence"),
}
PROTOCOLS = {
    "clean": "the checkpoint was chosen on the validation split; the test split was ranked once.",
    "published": "trained on the training and validation splits, the checkpoint chosen on the test split, as "
    "published; better than an unseen test split would give.",
}
CODE = ("configuration", "layers", "modeling", "pipeline", "processing", "ranking")
PUSHED = (
    "config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "README.md", "ranked.png", "training.png",
    "test_results.json", "two_stage.json", "probability.json", "reliability.png",
    *(f"{name}_ieft.py" for name in CODE),
)  # fmt: skip
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
CLEANED = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
           "test_results.json", "two_stage.json")  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
GITHUB_FILE = re.compile(r"https://github\.com(/[\w.-]+)+", re.ASCII)
KNOWN_DATASETS = ("rsicd", "rsitmd", "ucm", "sydney", "nwpu", "scenes", "twins")
LAST_PUSH = ".pushed.json"  # repository -> the commit that a folder was pushed as
MARK = re.compile(r"\n<!-- Written by ieft, (\w{64})\. Without this line the card is kept as it is\. -->\n$")


def write_model_card(
    folder: str | os.PathLike, results: Mapping[str, Any] | None = None, *, repo_id: str | None = None,
    base_model: str | None = None, training_arguments: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """`README.md` of a saved folder, from the template `model_card.md`. What was not measured does not appear.

    Args:
        folder: holds at least `config.json`.
        results: what `test_results.json` holds: recalls in percent, `num_images`, `num_captions`, `protocol`,
            `dataset`; and as `probability` what `probability.json` holds.
        repo_id: name on the Hub, for the title and the example; left out, the folder's name.
        base_model: Hub id of the checkpoint that training started from, or URL of a file on github.com; paths of this
            machine and other addresses are left out.
        training_arguments: name -> value, shown as a table.

    Returns:
        Path: of the file. A card that was edited by hand stays, and the new one is `README.generated.md`.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.resolve().name
    card = render_model_card(
        IeftConfig.from_pretrained(folder),
        results,
        repo_id=repo_id,
        base_model=base_model,
        training_arguments=training_arguments,
        has_ranking_figure=(folder / "ranked.png").is_file(),
        has_reliability_figure=(folder / "reliability.png").is_file(),
    )
    path = folder / "README.md"
    if path.exists() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        print(f"{path} was edited by hand and stays; the new card is README.generated.md.", file=sys.stderr)
        path = folder / "README.generated.md"
    digest = hashlib.sha256(card.strip().encode()).hexdigest()
    mark = f"\n<!-- Written by ieft, {digest}. Without this line the card is kept as it is. -->\n"
    _write_whole(path, card.rstrip("\n") + "\n" + mark)
    return path


def _write_whole(path, text):
    """Write a file atomically: one that a killed process left half written would be taken for the user's own."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def is_generated(card: str) -> bool:
    """Whether a card's text is as `write_model_card` wrote it."""
    found = MARK.search(card)
    return found is not None and hashlib.sha256(card[: found.start()].strip().encode()).hexdigest() == found.group(1)


def render_model_card(
    config: IeftConfig, results: Mapping[str, Any] | None = None, *, repo_id: str, base_model: str | None = None,
    training_arguments: Mapping[str, Any] | None = None, has_ranking_figure: bool = False,
    has_reliability_figure: bool = False,
) -> str:  # fmt: skip
    """The text of a model card with its metadata; arguments as `write_model_card`."""
    measured = {name: value for name, value in (results or {}).items() if _is_measured(value)}
    on_github = base_model if GITHUB_FILE.fullmatch(str(base_model)) else None
    base_model = base_model if is_hub_id(base_model) else None
    dataset = name_dataset(measured.get("dataset"))
    eval_results = _eval_results(measured, dataset)
    title = repo_id.split("/")[-1]
    card_data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",  # the Hub's nearest: sentences compete for an image
        tags=["ieft", "image-text-retrieval", "remote-sensing"],
        base_model=base_model,
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        **({"metrics": ["recall"], "model_name": title, "eval_results": eval_results} if eval_results else {}),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        repo_id=repo_id,
        base_model=base_model or (on_github and on_github.rpartition("/")[2]),
        base_address=on_github or f"https://huggingface.co/{base_model}",
        rows=_table_rows(measured),
        num_images=measured.get("num_images"),
        num_captions=measured.get("num_captions"),
        dataset=dataset,
        protocol=measured.get("protocol"),
        protocol_sentence=PROTOCOLS.get(str(measured.get("protocol"))),
        training_arguments=training_arguments,
        has_ranking_figure=has_ranking_figure,
        is_calibrated=config.calibration_scale is not None,
        probability=measured.get("probability"),
        has_reliability_figure=has_reliability_figure,
        network=_network_facts(config),
        fusion_layer=config.first_joint_layer,
        versions=_versions(),
        image_size=config.image_size,
        max_caption_tokens=config.max_position_embeddings,
    )
    return card.content


def is_hub_id(name: Any) -> bool:
    """Whether a name is "user/name", and no file or folder of this machine."""
    return bool(name and HUB_ID.fullmatch(str(name)) and not Path(name).exists())


def name_dataset(name: str | None) -> str | None:
    """What a card calls a dataset: a Hub id or a known name as it is, a user's own file or folder by no name."""
    if name is None:
        return None
    return name if name in KNOWN_DATASETS or is_hub_id(name) else "a dataset of its own"


def _is_measured(value):
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _eval_results(measured, dataset):
    """One entry for each measured recall: what the Hub shows beside the page."""
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=dataset if is_hub_id(dataset) or dataset in KNOWN_DATASETS else "unknown",
            dataset_name=dataset or "unknown",
            dataset_split="test",
            metric_type="recall",
            metric_name=f"{name} ({way})",
            metric_value=round(measured[prefix + key], 2),
        )
        for prefix, (way, _) in WAYS.items()
        for key, name in RECALLS.items()
        if prefix + key in measured
    ]


def _table_rows(measured):
    """One row of cells for each way of counting that was measured."""
    return [
        [f"{meaning} ({way})"]
        + [f"{measured[prefix + key]:.2f}" if prefix + key in measured else "" for key in RECALLS]
        for prefix, (way, meaning) in WAYS.items()
        if any(prefix + key in measured for key in RECALLS)
    ]


def _network_facts(config):
    stages = ", ".join(map(str, config.enhancement_layers)) or "none"
    return {
        "image": f"{config.image_size} x {config.image_size} pixels, {config.num_patches} patches",
        "caption": f"up to {config.max_position_embeddings} tokens of {config.vocab_size}",
        "joint blocks": f"{config.num_hidden_layers - config.first_joint_layer} of {config.num_hidden_layers}, "
        f"{config.hidden_size} wide, {config.num_attention_heads} heads",
        "visual enhancement before blocks": stages,
        "embeddings for shortlists": f"{config.contrastive_dim} wide" if config.contrastive_dim else "none",
    }


def _versions():
    versions = {"Python": platform.python_version()}
    for name in ("ieft", "torch", "transformers", "datasets"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # the project itself, run from its clone
    return versions


def push_folder(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | bool | None = None,
    revision: str | None = None, commit_message: str = "Upload IEFT", overwrite: bool = False,
) -> str:  # fmt: skip
    """Push a saved folder as one commit: weights, code, processor, model card, results. Files that do not belong to
    the checkpoint stay, and so do paths of this machine.

    Args:
        repo_id: "user/name"; made where it does not exist.
        private: whether a new repository is; None follows the account's default.
        overwrite: whether a repository may be replaced that was not pushed from this folder, or was changed since.

    Returns:
        str: the URL of the commit.

    Raises:
        FileNotFoundError: that lists what the folder lacks; nothing is pushed then.
        ValueError: for a repository that holds files of others, without `overwrite`.
    """
    folder = Path(folder)
    needed = ("config.json", "modeling_ieft.py", "processor_config.json", "README.md")
    missing = [name for name in needed if not (folder / name).is_file()]
    missing += [] if list(folder.glob("model*.safetensors")) else ["model.safetensors"]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, and was not pushed. Save the model and its processor there with "
            "save_pretrained, and write the page with write_model_card."
        )
    api = HfApi(token=token)
    if not overwrite:
        check_repository(folder, repo_id, token=token, revision=revision)
    files = sorted(file for file in folder.iterdir() if file.name in PUSHED or WEIGHTS.fullmatch(file.name))
    operations = [CommitOperationAdd(file.name, _pushed_content(file)) for file in files if file.is_file()]
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.create_commit(name, operations, revision=revision, commit_message=commit_message)
    record = _last_pushes(folder) | {repo_id: commit.oid}
    _write_whole(folder / LAST_PUSH, json.dumps(record))
    return commit.commit_url


def check_repository(
    folder: str | os.PathLike, repo_id: str, *, token: str | bool | None = None, revision: str | None = None
) -> None:
    """Check that a repository is new, empty, or as this folder was pushed to it last.

    Raises:
        ValueError: that says what the repository holds.
    """
    refuse_to_replace(HfApi(token=token), repo_id, revision=revision, pushed=_last_pushes(folder).get(repo_id))


def _last_pushes(folder):
    """Repository -> commit that a folder was pushed as last."""
    record = Path(folder, LAST_PUSH)
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def _pushed_content(file):
    """A file to push, or its text without paths of this machine."""
    if file.name not in CLEANED:
        return file
    content = json.loads(file.read_text(encoding="utf-8"))
    return (json.dumps(_without_paths(content), indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(value):
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {
        name: _without_paths(each) for name, each in value.items() if name not in ("_name_or_path", "name_or_path")
    }
    return kept | ({"dataset": name_dataset(kept["dataset"])} if isinstance(kept.get("dataset"), str) else {})
