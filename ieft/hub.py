"""Model cards of saved folders, and pushing these folders to the Hub."""

import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from configuration_ieft import IeftConfig

TEMPLATE = Path(__file__).parent.parent / "model_card.md"
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
PUSHED = ["*.json", "model*.safetensors", "*_ieft.py", "vocab.txt", "README.md", "ranked.png", "training.png"]
NEVER_PUSHED = ["checkpoint-*", "runs/*", "trainer_state.json", "_*", ".*"]


def write_model_card(folder, results=None, *, repo_id=None, base_model=None, training_arguments=None):
    """`README.md` of a saved folder, from the template `model_card.md`. What was not measured does not appear.

    Args:
        folder: holds at least `config.json`.
        results: what `test_results.json` holds: recalls in percent, `num_images`, `num_captions`, `protocol`,
            `dataset`.
        repo_id: name on the Hub, for the title and the example; left out, the folder's name.
        base_model: Hub id of the checkpoint that training started from; a path of this machine is left out.
        training_arguments: name -> value, shown as a table.

    Returns:
        Path: of the file.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.resolve().name
    card = render_model_card(
        IeftConfig.from_pretrained(folder),
        results,
        repo_id=repo_id,
        base_model=base_model,
        training_arguments=training_arguments,
        has_ranking_picture=(folder / "ranked.png").is_file(),
    )
    path = folder / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def render_model_card(
    config, results=None, *, repo_id, base_model=None, training_arguments=None, has_ranking_picture=False
):
    """The text of a model card with its metadata; arguments as `write_model_card`."""
    measured = {name: value for name, value in (results or {}).items() if _is_measured(value)}
    base_model = base_model if base_model and not Path(base_model).exists() else None
    dataset = Path(measured["dataset"]).name if "dataset" in measured else None
    eval_results = _eval_results(measured, dataset)
    title = repo_id.split("/")[-1]
    card_data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",  # the Hub's nearest: sentences compete for an image
        tags=["ieft", "image-text-retrieval", "remote-sensing"],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        **({"metrics": ["recall"], "model_name": title, "eval_results": eval_results} if eval_results else {}),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        repo_id=repo_id,
        rows=_table_rows(measured),
        num_images=measured.get("num_images"),
        num_captions=measured.get("num_captions"),
        dataset=dataset,
        protocol=measured.get("protocol"),
        protocol_sentence=PROTOCOLS.get(measured.get("protocol")),
        training_arguments=training_arguments,
        has_ranking_picture=has_ranking_picture,
        network=_network_facts(config),
        versions=_versions(),
        image_size=config.image_size,
        max_caption_tokens=config.max_position_embeddings,
    )
    return card.content


def _is_measured(value):
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _eval_results(measured, dataset):
    """One entry for each measured recall: what the Hub shows beside the page."""
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=dataset or "unknown",
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
        "joint blocks": f"{config.num_hidden_layers}, {config.hidden_size} wide, {config.num_attention_heads} heads",
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


def push_folder(folder, repo_id, *, private=None, token=None, revision=None, commit_message="Upload IEFT"):
    """A saved folder as one commit: weights, code, processor, model card, results; no training state.

    Args:
        repo_id: "user/name"; made where it does not exist.
        private: whether a new repository is; None follows the account's default.

    Returns:
        str: the URL of the commit.

    Raises:
        FileNotFoundError: that lists what the folder lacks; nothing is pushed then.
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
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        allow_patterns=PUSHED,
        ignore_patterns=NEVER_PUSHED,
    )
    return commit.commit_url
