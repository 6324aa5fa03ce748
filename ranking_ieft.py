"""Ranking with a loaded network (captions for an image, images for a caption), and the files beside its weights.

`RankingMixin` gives a network `rank` and `push_to_hub`, as transformers' `GenerationMixin` gives `generate`.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import cached_file

try:
    from .processing_ieft import IeftProcessor
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from processing_ieft import IeftProcessor

logger = logging.getLogger(__name__)

CANDIDATES_AT_ONCE = 32
PIPELINE_FILE = "pipeline_ieft.py"
# Read as Hub code, this file is a module inside a package; the user has then agreed to run the checkpoint's own code.
IS_HUB_CODE = "." in __name__


class RankingMixin:
    """`rank` and `push_to_hub` for a network with `prepare_images`, `prepare_captions` and `score_prepared`."""

    save_pretrained: Any  # the network's
    config: Any

    def rank(
        self, image_or_caption: Any, candidates: Sequence, top_k: int | None = None, *,
        processor: IeftProcessor | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Rank captions for an image, or images for a caption, best first.

        Args:
            image_or_caption: a PIL image, array, path or URL; or a sentence.
            candidates: a list of captions, or of images. A string is an image where it is a URL or names a file.
            top_k: how many to return; None returns all.
            processor: the processor to use; None loads the one saved beside this checkpoint.

        Returns:
            list: as `rank_candidates` returns it.

        Raises:
            ValueError: as `rank_candidates`.
        """
        processor = find_processor(self) if processor is None else processor
        return rank_candidates(self, processor, image_or_caption, candidates, top_k=top_k)

    def probability(self, scores: torch.Tensor) -> torch.Tensor | None:
        """The probability that a sentence is an annotation of an image, from their matching score.

        It was fitted on the pairs that searches of validation data show (`ieft.evaluation.calibration`), and is true
        of an archive like that data: where fewer images fit, it is too high.

        Args:
            scores: of any shape.

        Returns:
            Tensor | None: in 0..1, of the shape of `scores`; None for a checkpoint that was not calibrated.
        """
        scale, offset = self.config.calibration_scale, self.config.calibration_offset
        return None if scale is None else torch.sigmoid(scale * scores.double() + offset)

    def push_to_hub(
        self, repo_id: str, *, processor: IeftProcessor | None = None, model_card: str | None = None,
        private: bool | None = None, token: str | bool | None = None, overwrite: bool = False, **kwargs: Any,
    ) -> CommitInfo:  # fmt: skip
        """Push weights, code, processor and model card in one commit.

        Args:
            repo_id: "user/name"; created where it does not exist.
            processor: None pushes the one saved beside this checkpoint.
            model_card: text of the model card; None pushes the one saved beside this checkpoint.
            overwrite: whether a repository that holds files already may be replaced.
            kwargs: as `huggingface_hub.HfApi.upload_folder`, such as `commit_message` and `revision`.

        Returns:
            CommitInfo: with the URL of the commit.

        Raises:
            ValueError: for a model without a processor or a model card beside it, where none is given; for a
                repository that holds files, without `overwrite`.
        """
        processor = find_processor(self) if processor is None else processor
        model_card = find_model_card(self) if model_card is None else model_card
        api = HfApi(token=token)
        if not overwrite:
            refuse_to_replace(api, repo_id, revision=kwargs.get("revision"))
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            processor.save_pretrained(folder)
            Path(folder, "README.md").write_text(model_card, encoding="utf-8")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


def refuse_to_replace(api: HfApi, repo_id: str, *, revision: str | None = None, pushed: str | None = None) -> None:
    """Leave a repository alone that holds files, other than those of the commit that was pushed here last.

    Args:
        api: a `huggingface_hub.HfApi`.
        pushed: the commit that the same folder was pushed as before, if it was.

    Raises:
        ValueError: that says what the repository holds.
    """
    try:
        found = api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return
    files = [each.rfilename for each in found.siblings or () if each.rfilename != ".gitattributes"]
    if files and found.sha != pushed:
        raise ValueError(
            f"{repo_id} on the Hub holds {len(files)} files already ({', '.join(sorted(files)[:5])}), which were not "
            "pushed from here or were changed since: nothing was pushed. Choose another repository, or pass "
            "overwrite=True to replace them."
        )


def find_processor(model: Any) -> IeftProcessor:
    """Load the processor saved beside a model's weights, from the folder or Hub repository the model came from.

    Raises:
        ValueError: for a model that was made in memory.
    """
    origin = model.config._name_or_path
    if not origin:
        raise ValueError(
            "The processor of a model that was not loaded from a checkpoint is not known: pass processor=."
        )
    return IeftProcessor.from_pretrained(origin, trust_remote_code=IS_HUB_CODE)


def find_model_card(model: Any) -> str:
    """The text of the model card saved beside a model's weights.

    Raises:
        ValueError: for a model without one.
    """
    origin = model.config._name_or_path
    page = origin and cached_file(origin, "README.md", _raise_exceptions_for_missing_entries=False)
    if not page:
        raise ValueError(
            "This model has no README.md beside it to be its model card: pass model_card=, such as the text that "
            "ieft.hub.render_model_card gives."
        )
    return Path(page).read_text(encoding="utf-8")


def save_pipeline_code(model: Any, folder: str | os.PathLike) -> None:
    """Copy the pipeline's file into a saved folder, whose `config.json` names it.

    Nothing that the network imports needs this file, so transformers does not copy it by itself, and fetches it from
    the Hub only where a pipeline is made.
    """
    beside = Path(__file__).with_name(PIPELINE_FILE)
    source: str | Path | None = beside
    if not beside.is_file():
        try:
            source = cached_file(model.config._name_or_path, PIPELINE_FILE)
        except OSError:  # the model was made in memory, its folder is gone, or the Hub cannot be reached
            source = None
    if source is None:
        logger.warning(
            "%s was not found beside the checkpoint this model came from (%r), so %s was saved without it: models "
            "load from there, pipelines need that file.", PIPELINE_FILE, model.config._name_or_path, folder,
        )  # fmt: skip
        return
    shutil.copyfile(source, Path(folder, PIPELINE_FILE))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode is restored afterwards, also after an error."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def rank_candidates(
    model: Any, processor: IeftProcessor, query: Any, candidates: Sequence, *, top_k: int | None = None,
    candidates_at_once: int = CANDIDATES_AT_ONCE,
) -> list[dict[str, Any]]:  # fmt: skip
    """Candidates by their matching score with the query, best first; equal scores keep their order.

    Args:
        query: an image (PIL, array, tensor, path or URL) or a caption.
        candidates: captions for an image, images for a caption. A string counts as an image where it is a URL or
            names a file.
        top_k: how many to return; None returns all.
        candidates_at_once: how many are encoded in one batch.

    Returns:
        list: `{"image" or "caption": as given, "score": any real number, "rank": from 1}`, and of a calibrated
        checkpoint "probability", see `RankingMixin.probability`.

    Raises:
        ValueError: without candidates, for several queries, for `top_k` below 1, where captions meet captions or
            images meet images, or for scores that are not finite.
    """
    if isinstance(query, list | tuple | dict | set):
        raise ValueError(f"One image or caption expected as the query; got a {type(query).__name__} of {len(query)}.")
    if isinstance(candidates, Iterator):
        candidates = list(candidates)
    if isinstance(candidates, str | os.PathLike) or not len(candidates):
        raise ValueError(f"A list of at least one candidate expected; got {candidates!r}.")
    if any(isinstance(candidate, list | tuple | dict | set) for candidate in candidates):
        raise ValueError("Each candidate must be one caption or one image; got a list among them.")
    if candidates_at_once < 1:
        raise ValueError(f"batch_size must be 1 or more; got {candidates_at_once}.")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k must be 1 or more, or None for all candidates; got {top_k!r}.")
    kind = _kind_of(query, candidates)
    score = _score_captions if kind == "caption" else _score_images
    with evaluation_mode(model), torch.no_grad():
        scores = score(model, processor, query, list(candidates), candidates_at_once).float()
    check_finite(scores, "matching scores")
    best = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    ranked = [{kind: candidates[row], "score": scores[row].item(), "rank": rank} for rank, row in enumerate(best, 1)]
    probability = model.probability(scores)
    if probability is not None:
        for each, row in zip(ranked, best, strict=True):
            each["probability"] = probability[row].item()
    return ranked


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise a ValueError if a network gave a number that is not finite, which no order can be made of."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"The {name} of the network are not all finite numbers: its weights contain NaN or infinity, or "
            "half precision overflows. Load a checkpoint that is whole, or compute in float32."
        )


def _kind_of(query, candidates):
    """The kind of the candidates, "image" or "caption"."""
    are_images = [_is_image(candidate) for candidate in candidates]
    if all(are_images) and isinstance(query, str):
        return "image"
    if not any(are_images) and _is_image(query):
        return "caption"
    shown = [repr(candidate) for candidate, is_image in zip(candidates, are_images, strict=True) if not is_image][:3]
    raise ValueError(
        f"Captions expected for an image, or images for a caption; got {_name_kind(query)} {query!r} with "
        f"{sum(are_images)} images and {len(are_images) - sum(are_images)} captions ({', '.join(shown)}). A string is "
        "an image where it is a URL or names an existing file: is each path right?"
    )


def _is_image(value):
    return not isinstance(value, str) or value.startswith(("http://", "https://")) or os.path.isfile(value)


def _name_kind(query):
    return "the image" if _is_image(query) else "the caption"


def _score_captions(model, processor, image, captions, at_once):
    """One image with each caption, the image read once: (C,) scores."""
    prepared = model.prepare_images(_pixels(model, processor, [image]))
    scores = []
    for first in range(0, len(captions), at_once):
        tokens = processor(text=captions[first : first + at_once]).to(model.device)
        prepared_captions = model.prepare_captions(tokens["input_ids"], tokens["attention_mask"])
        scores.append(model.score_prepared(prepared_captions, prepared))
    return torch.cat(scores)


def _score_images(model, processor, caption, images, at_once):
    """One caption with each image, the caption read once: (I,) scores."""
    prepared = model.prepare_captions(processor(text=[caption])["input_ids"].to(model.device))
    scores = []
    for first in range(0, len(images), at_once):
        pixels = _pixels(model, processor, images[first : first + at_once])
        scores.append(model.score_prepared(prepared, model.prepare_images(pixels)))
    return torch.cat(scores)


def _pixels(model, processor, images):
    images = [str(image) if isinstance(image, os.PathLike) else image for image in images]
    return processor(images=images)["pixel_values"].to(model.device)  # (I, 3, image_size, image_size)


__all__ = ["RankingMixin", "check_finite", "evaluation_mode", "find_model_card", "find_processor", "rank_candidates"]
