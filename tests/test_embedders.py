"""Tests of embedders of other libraries in both stages, against plain loops of those libraries and of IEFT."""

import json
import os
import pickle
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import running_hub
from PIL import Image
from small_embedders import save_clip, save_open_clip, save_raw, save_siglip
from test_modeling import tiny_config
from test_two_stage import TOP_K, slow_recalls
from transformers import AutoProcessor, BertTokenizer, CLIPModel, SiglipModel

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")
open_clip = pytest.importorskip("open_clip", reason="open_clip, extra `openclip`, is not installed")
pytest.importorskip("sentencepiece", reason="SigLIP's tokenizer, extra `siglip`, is not installed")

import run_retrieval  # noqa: E402
from ieft.data.images import read_image  # noqa: E402
from ieft.data.scenes import draw_scene  # noqa: E402
from ieft.evaluation.embedders import MOST_ELONGATED, load_embedder  # noqa: E402
from ieft.evaluation.two_stage import make_shortlists, two_stage_recalls  # noqa: E402
from ieft.search import read_ahead  # noqa: E402
from ieft.search.archive_files import find_images  # noqa: E402
from ieft.search.command import main  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402
from ieft.training.hard_negatives import EmbeddedSimilarity, HardNegativeSampler  # noqa: E402
from ieft.training.items import EvaluationSet, TrainingItems  # noqa: E402
from modeling_ieft import IeftForImageTextRetrieval  # noqa: E402
from processing_ieft import IeftImageProcessor, IeftProcessor  # noqa: E402

KINDS = ("clip", "siglip", "local-dir", "raw")
CAPTIONS = ["A red HOUSE beside a river.", "two grey ships in a harbour .", "many green fields " * 30, "fields."]
NUM_IMAGES, SHORTLIST = 14, 5


def plain(name):
    """An image or a sentence -> its embedding by plain calls of the library, one at a time; and the scale."""
    if ":" in name:
        architecture, _, file = name.partition(":")
        wanted = (name, None) if architecture == "local-dir" else (architecture, file)
        model, _, preprocess = open_clip.create_model_and_transforms(wanted[0], pretrained=wanted[1])
        tokenizer = open_clip.get_tokenizer(wanted[0])
        model.eval()
        embed = {
            "image": lambda image: model.encode_image(preprocess(image)[None], normalize=True)[0],
            "text": lambda text: model.encode_text(tokenizer([text]), normalize=True)[0],
        }
    else:
        is_siglip = "siglip" in name
        model = (SiglipModel if is_siglip else CLIPModel).from_pretrained(name).eval()
        processor = AutoProcessor.from_pretrained(name)
        options = {"return_tensors": "pt", "truncation": True, "max_length": 64 if is_siglip else 16}
        options |= {"padding": "max_length"} if is_siglip else {}

        def embed_image(image):
            return model(**processor(images=image, text=["a"], **options)).image_embeds[0]

        def embed_text(text):
            black = Image.new("RGB", (32, 32))
            return model(**processor(images=black, text=[text], **options)).text_embeds[0]

        embed = {"image": embed_image, "text": embed_text}
    with torch.no_grad():
        return {kind: torch.no_grad()(function) for kind, function in embed.items()}, model.logit_scale.exp().item()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Kind -> the name of a saved embedder."""
    folder = tmp_path_factory.mktemp("embedders")
    return {
        "clip": str(save_clip(folder / "clip")),
        "siglip": str(save_siglip(folder / "siglip")),
        "local-dir": f"local-dir:{save_open_clip(folder / 'open_clip')}",
        "raw": save_raw(folder / "raw"),
    }


@pytest.fixture(scope="module", params=KINDS)
def name(request, names):
    return names[request.param]


@pytest.fixture(scope="module")
def embedder(name):
    return load_embedder(name, device="cpu")


@pytest.fixture(scope="module")
def library(name):
    return plain(name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint without contrastive heads, as the published one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=60)
    IeftForImageTextRetrieval(tiny_config(vocab_size=len(tokenizer), contrastive_dim=0)).save_pretrained(folder)
    IeftProcessor(IeftImageProcessor(32), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return IeftForImageTextRetrieval.from_pretrained(checkpoint).eval(), IeftProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Scenes of many shapes, as JPEG and PNG, and narrow ones."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(NUM_IMAGES - 3):
        scene = draw_scene(3, number, size=120).image
        scene = scene.crop((0, 0, 120, 50 + 6 * number)) if number % 3 else scene.resize((64 + 9 * number, 64))
        scene.save(folder / f"{number:02}.{'jpg' if number % 2 else 'png'}")
    for number, size in enumerate([(3, 40), (90, 1), (32, 32)]):
        draw_scene(4, number, size=120).image.resize(size).save(folder / f"narrow{number}.png")
    return folder


def create(folder, loaded, name=None, **options):
    return ImageIndex(folder, loaded[0], processor=loaded[1], create=True, dtype="float32", embedder=name, **options)


@pytest.fixture
def index(tmp_path, loaded, archive, embedder):
    index = create(tmp_path / "index", loaded, embedder)
    index.add(find_images(archive), batch_size=4, progress=False)
    return index


def test_inputs_are_those_of_the_library(name, embedder, archive):
    images = [read_image(file) for file in find_images(archive)]
    if ":" in name:
        wanted = name.partition(":")[::2]
        wanted = (name, None) if wanted[0] == "local-dir" else wanted
        preprocess = open_clip.create_model_and_transforms(wanted[0], pretrained=wanted[1])[2]
        pixels, tokens = map(preprocess, images), open_clip.get_tokenizer(wanted[0])(CAPTIONS)
    else:
        processor, is_siglip = AutoProcessor.from_pretrained(name), "siglip" in name
        options = {"max_length": 64, "padding": "max_length"} if is_siglip else {"max_length": 16, "padding": True}
        tokens = processor(text=CAPTIONS, truncation=True, return_tensors="pt", **options)["input_ids"]
        pixels = (processor(images=image, return_tensors="pt")["pixel_values"][0] for image in images)
    sent = pickle.loads(pickle.dumps(embedder.preprocess))  # as to a worker process
    for image, expected in zip(images, pixels, strict=True):
        np.testing.assert_array_equal(sent(image), expected.numpy())
    assert torch.equal(embedder._tokenize(CAPTIONS)["input_ids"], tokens)
    assert len({tuple(row) for row in tokens.tolist()}) == len(CAPTIONS)


def test_embeddings_are_those_of_each_input_alone(embedder, library, archive):
    embed, scale = library
    images = [read_image(file) for file in find_images(archive)]
    expected = torch.stack([embed["image"](image) for image in images]).numpy()
    np.testing.assert_allclose(embedder.embed_images(images), expected, atol=1e-5)
    repeated = [*CAPTIONS, CAPTIONS[0]]
    vectors = embedder.embed_captions(repeated)
    np.testing.assert_allclose(vectors, [embed["text"](caption).numpy() for caption in repeated], atol=1e-5)
    assert (vectors[0] == vectors[-1]).all() and vectors.dtype == np.float32
    assert embedder.similarity_scale() == pytest.approx(scale)
    assert embedder.embed_images([]).shape == embedder.embed_captions([]).shape == (0, embedder.dim)
    try:
        embedder._dtype = torch.bfloat16  # also where it is slow
        reduced = embedder.embed_images(images)
    finally:
        embedder.to("cpu", "float32")
    np.testing.assert_allclose(reduced @ vectors.T, expected @ vectors.T, atol=0.02)
    assert not np.array_equal(reduced, expected)


@torch.no_grad()
def slow_search(index, images, embedded, wanted, caption, weight):
    """Files by a plain loop: the shortlist sorted, its first re-ranked by IEFT's forward; and their scores."""
    scores = {file: float(embedded[file] @ wanted) for file in images}
    order = sorted(images, key=scores.get, reverse=True)
    for file in order[:SHORTLIST]:
        inputs = index.processor(images=images[file], text=[caption])
        scores[file] = index.model(**inputs).logits.item() + weight * scores[file]
    return sorted(order[:SHORTLIST], key=scores.get, reverse=True) + order[SHORTLIST:], scores


def test_search_is_a_plain_double_loop_of_that_library_and_ieft(index, library, archive, monkeypatch):
    embed, scale = library
    images = {str(file): read_image(file) for file in find_images(archive)}
    embedded = {file: embed["image"](image) for file, image in images.items()}
    texts = {caption: embed["text"](caption) for caption in CAPTIONS}
    for number, (caption, wanted) in enumerate(texts.items()):
        for weight in (0.0, 0.5) if not number else (0.25,):
            hits = index.search(caption, top_k=NUM_IMAGES, rerank_top_k=SHORTLIST, similarity_weight=weight)
            order, scores = slow_search(index, images, embedded, wanted, caption, weight * scale)
            assert [hit["file"] for hit in hits] == order
            np.testing.assert_allclose([hit["score"] for hit in hits], [scores[file] for file in order], atol=1e-4)
    for name in ("calibration_scale", "calibration_offset"):  # fitted to shortlists of the checkpoint's own heads
        monkeypatch.setattr(index.model.config, name, 1.0)
    assert not index.has_probability and {hit["probability"] for hit in index.search(CAPTIONS[0])} == {None}
    with pytest.raises(ValueError, match="made with the embedder"):
        index.search(CAPTIONS[0], min_probability=0.5)
    file = list(images)[4]
    assert index.search_image(images[file], top_k=1)[0]["file"] == file
    index.add_captions(CAPTIONS)
    found = index.search_captions(images[file], rerank_top_k=0)
    expected = sorted(texts, key=lambda caption: float(embedded[file] @ texts[caption]), reverse=True)
    assert [hit["caption"] for hit in found] == [caption.strip() for caption in expected]


@pytest.fixture(scope="module")
def split(archive):
    """Nine images with one to three captions each, all of them different for every tokenizer."""
    words = "red house river ships fields".split()
    orders = [" ".join(np.random.default_rng(row).permutation(words)[: 3 + row % 3]) for row in range(60)]
    captions = iter(dict.fromkeys(orders))
    images = [read_image(file) for file in find_images(archive)[:9]]
    return datasets.Dataset.from_dict(
        {"image": images, "captions": [[next(captions) for _ in range(1 + row % 3)] for row in range(9)]},
        features=datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}),
    )


@pytest.fixture(scope="module")
def slow_scores(loaded, split):
    """(I, C) matching scores by IEFT's forward, one pair at a time."""
    model, processor = loaded
    captions = [caption for of_image in split["captions"] for caption in of_image]
    with torch.no_grad():
        return np.array([[model(**processor(images=image, text=[caption])).logits.item() for caption in captions]
                         for image in split["image"]], np.float32)  # fmt: skip


def test_two_stage_results_are_a_plain_double_loop_of_that_library_and_ieft(
    embedder, library, loaded, split, slow_scores
):
    model, processor = loaded
    embed, scale = library
    images = [embed["image"](image) for image in split["image"]]
    texts = [embed["text"](caption) for of_image in split["captions"] for caption in of_image]
    similarity = np.array([[scale * float(image @ text) for text in texts] for image in images], np.float32)
    evaluation_set = EvaluationSet.from_split(split, processor)
    shortlists = make_shortlists(model, evaluation_set, TOP_K, embedder=embedder, progress=False)
    np.testing.assert_allclose(shortlists.similarity, similarity, atol=1e-3)
    asked = shortlists.of_captions | shortlists.of_images
    assert asked.sum() == shortlists.pairs < slow_scores.size
    np.testing.assert_allclose(shortlists.scores[asked], slow_scores[asked], atol=1e-4)
    for weight in (0.0, 0.25):
        recalls = two_stage_recalls(shortlists, evaluation_set, similarity_weight=weight)
        expected = slow_recalls(similarity, slow_scores, evaluation_set.caption_image, weight)
        assert [recalls[f"{way}_r{k}"] for way in ("ir", "tr") for k in (1, 5, 10)] == pytest.approx(expected)


# What an index remembers ---------------------------------------------------------------------------------------------


def test_an_index_finds_its_embedder_and_refuses_others(tmp_path, loaded, archive, names):
    files, kept = find_images(archive)[:3], Path(shutil.copytree(names["clip"], tmp_path / "kept"))
    index = create(tmp_path / "index", loaded, kept)
    index.add(files, progress=False)
    hits = index.search(CAPTIONS[0])

    def open_with(embedder=None, model=loaded[0], uri=tmp_path / "index"):
        return ImageIndex(uri, model, processor=loaded[1], embedder=embedder, dtype="float32")

    again = open_with()
    assert again.embedder.name == str(kept) and again.search(CAPTIONS[0]) == hits
    assert again.add(files, progress=False) == {"added": 0, "unchanged": 3, "unreadable": {}}
    open_with(model=IeftForImageTextRetrieval(loaded[0].config))  # what re-ranks may be another network
    with pytest.raises(
        ValueError, match=f"made with the embedder {kept}.*siglip.*is another one.*leave --embedder out"
    ):
        open_with(names["siglip"])
    moved = kept.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"embedder {kept}, which cannot be loaded.*\nIf it was moved"):
        open_with()
    assert open_with(moved).search(CAPTIONS[0]) == hits
    assert open_with().embedder.name == str(moved)  # remembered
    save_clip(moved, seed=1)
    with pytest.raises(ValueError, match="moved .* has changed since the index"):
        open_with()

    torch.manual_seed(0)
    with_heads = IeftForImageTextRetrieval(tiny_config(vocab_size=len(loaded[1].tokenizer)))
    own = ImageIndex(tmp_path / "own", with_heads, processor=loaded[1], create=True)
    own.add(files, progress=False)
    with pytest.raises(ValueError, match="made by the contrastive heads.*leave --embedder out"):
        open_with(names["clip"], with_heads, tmp_path / "own")
    with pytest.raises(ValueError, match="contrastive heads expected.*--embedder"):
        open_with(uri=tmp_path / "own")
    with pytest.raises(ValueError, match="--states or --embedder"):
        late = IeftForImageTextRetrieval(tiny_config(first_joint_layer=1))
        ImageIndex(tmp_path / "new", late, processor=loaded[1], create=True, embedder=names["clip"], states="bf16")
    assert not (tmp_path / "new").exists()


def swap_two_words(tokenizer):
    words = tokenizer["model"]["vocab"]
    words["x"], words["y"] = words["y"], words["x"]


def test_the_fingerprint_is_of_weights_preprocessing_and_tokenizer(tmp_path, names):
    def changed(file, change):
        folder = Path(shutil.copytree(names["clip"], tmp_path / str(len(list(tmp_path.iterdir())))))
        settings = json.loads((folder / file).read_text())
        change(settings)
        (folder / file).write_text(json.dumps(settings))
        return load_embedder(folder, device="cpu").fingerprint

    ours = load_embedder(names["clip"], device="cpu").fingerprint
    assert ours == load_embedder(names["clip"], device="cpu").fingerprint
    assert ours == changed("config.json", lambda settings: settings.update(transformers_version="9"))
    changes = {
        "processor_config.json": lambda settings: settings["image_processor"].update(image_mean=[0.5] * 3),
        "tokenizer.json": swap_two_words,
        "config.json": lambda settings: settings["vision_config"].update(hidden_act="gelu"),
    }
    others = [changed(file, change) for file, change in changes.items()]
    others.append(load_embedder(save_clip(tmp_path / "other", seed=1), device="cpu").fingerprint)
    half = tmp_path / "half"
    shutil.copytree(names["clip"], half)
    CLIPModel.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    assert len({ours, *others}) == 5, (ours, others)
    # The same folder in 16 bits, and the files of open_clip by another name.
    assert load_embedder(half, device="cpu").fingerprint == ours
    folder = Path(names["local-dir"].partition(":")[2])
    torch.save({"state_dict": open_clip_weights(folder)}, tmp_path / "epoch_1.pt")
    raw = load_embedder(f"Tiny-8:{tmp_path / 'epoch_1.pt'}", device="cpu")
    assert raw.fingerprint == load_embedder(names["raw"], device="cpu").fingerprint


def test_the_layout_of_earlier_years_is_the_same_embedder(tmp_path, names):
    """Like `flax-community/clip-rsicd-v2`: a pickle, settings of a feature extractor, a vocabulary in two files."""
    folder = Path(names["clip"])
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in words["merges"]]
    text = "<|startoftext|>", "<|endoftext|>"
    settings = {
        "vocab.json": words["vocab"],
        "preprocessor_config.json": {
            "feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3,
            "do_resize": True, "do_center_crop": True, "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "tokenizer_config.json": {
            "bos_token": text[0], "eos_token": text[1], "pad_token": text[1], "unk_token": text[1],
            "do_lower_case": True, "tokenizer_class": "CLIPTokenizer",
        },
    }  # fmt: skip
    for file, content in settings.items():
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    found = [load_embedder(each, device="cpu").fingerprint for each in (tmp_path, folder)]
    assert found[0] == found[1]


def open_clip_weights(folder):
    from safetensors.torch import load_file

    return {f"module.{name}": weight for name, weight in load_file(folder / "open_clip_model.safetensors").items()}


# In commands ---------------------------------------------------------------------------------------------------------


def test_the_command_and_the_page_take_an_embedder(tmp_path, checkpoint, archive, names, capsys, monkeypatch):
    monkeypatch.setattr(read_ahead, "_can_fork", lambda: True)  # worker processes in no time
    monkeypatch.chdir(Path(names["clip"]).parent)

    def run(command, *arguments, embedder=None):
        given = ["--embedder", embedder] if embedder else []
        place = ["--model", str(checkpoint), "--index", str(tmp_path / "index"), "--dtype", "float32"]
        code = main([command, *map(str, arguments), *place, *given])
        return code, capsys.readouterr()

    sentence = ("query", CAPTIONS[1], "--json")
    code, printed = run("index", archive, "--num_workers", 1, embedder="clip")
    assert code == 0 and printed.out.startswith(f"{NUM_IMAGES} added"), printed
    assert f"embedder {names['clip']} 2-" in run("info")[1].out
    hits = json.loads(run(*sentence)[1].out)
    assert hits == json.loads(run(*sentence, embedder=names["clip"])[1].out) and hits[0]["stage"] == "re-ranked"
    assert run("delete", hits[0]["file"])[1].out == "1 deleted\n"
    with pytest.raises(SystemExit, match="is another one"):
        run("info", embedder=names["siglip"])
    extra = archive / "long.png"
    Image.new("RGB", (MOST_ELONGATED * 8 + 1, 8)).save(extra)
    try:
        code, printed = run("index", archive)
    finally:
        extra.unlink()
    assert code == 1 and printed.out.startswith("1 added") and "cut it into tiles" in printed.err

    pytest.importorskip("gradio", reason="the page, extra `app`, is not installed")
    from ieft.page import command as page

    args = page.build_parser().parse_args(
        [
            "--model",
            str(checkpoint),
            "--index",
            str(tmp_path / "page"),
            "--archive",
            str(archive),
            "--embedder",
            "clip",
        ]
    )
    page_index = page.open_index(args)
    assert page_index.embedder.name == names["clip"] and len(page_index) == NUM_IMAGES


def test_models_of_the_hub(tmp_path, names, monkeypatch):
    folders = {"someone/clip-rsicd": names["clip"], "someone/open": names["local-dir"].partition(":")[2]}
    with running_hub() as (address, hub):
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                    "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True}  # fmt: skip
        for setting, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, setting, value)
        for repository, folder in folders.items():
            hub.put(repository, {file.name: file.read_bytes() for file in Path(folder).iterdir()})
        for name, kind in (("someone/clip-rsicd", "clip"), ("hf-hub:someone/open", "local-dir")):
            found = load_embedder(name, device="cpu")
            assert found.name == name and found.fingerprint == load_embedder(names[kind], device="cpu").fingerprint
        assert {path.split("/")[2] for _, path in hub.requests if "/resolve/" in path} == {"clip-rsicd", "open"}
        with pytest.raises(OSError):
            load_embedder("someone/none")
        with pytest.raises(OSError, match="Repository Not Found"):
            load_embedder("hf-hub:someone/none")


def test_training_and_evaluation_take_an_embedder(tmp_path, names, capsys):
    options = ["--dataset_name", "scenes", "--use_cpu", "--disable_tqdm", "true", "--max_predict_samples", "3"]
    options += ["--max_train_samples", "12", "--max_eval_samples", "2", "--train_batch_size", "4", "--max_steps", "2"]
    options += ["--eval_strategy", "no", "--save_strategy", "no", "--rerank_top_k", "2", "--output_dir", str(tmp_path)]
    mined = ["--do_train", "--do_predict", *options, "--batches", "embedder"]
    results = run_retrieval.main([*mined, "--embedder", names["clip"]])
    judged = results["two_stage"]
    assert judged["embedder"] == names["clip"] and judged["embedder_fingerprint"].startswith("2-")
    assert names["clip"] in capsys.readouterr().out
    record = json.loads((tmp_path / ".run.json").read_text())
    assert record["training"]["embedder"] == record["evaluation"]["embedder"] == names["clip"]
    with pytest.raises(ValueError, match="embedder was"):
        run_retrieval.main(["--do_predict", *options, "--embedder", names["siglip"]])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--embedder", "a"], "no effect without --rerank_top_k"),
        (["--embedder", "a", "--batches", "embedder", "--do_predict"], "no effect without --rerank_top_k"),
        (["--batches", "embedder"], "needs --embedder"),
        (["--embedder", "CLIP", "--batches", "embedder", "--contrastive_weight", "0"], "need the contrastive loss"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, names, options, message):
    options = [names["clip"] if option == "CLIP" else option for option in options]
    few = ["--max_train_samples", "20", "--max_eval_samples", "2", "--max_predict_samples", "2", "--use_cpu"]
    with pytest.raises((OSError, ValueError), match=message):
        run_retrieval.main([*few, *options, "--output_dir", str(tmp_path)])
    assert {file.name for file in tmp_path.glob("*.json")} <= {"bad_rows.json"}


# Hard negatives ------------------------------------------------------------------------------------------------------


def test_hard_negatives_are_what_the_embedder_confuses(names, loaded, split):
    embed, _ = plain(names["clip"])
    items = TrainingItems(split, loaded[1], num_negatives=0, augmentation="none", seed=5)
    similarity = EmbeddedSimilarity(items, load_embedder(names["clip"], device="cpu"))
    images, texts = (
        [embed["image"](image) for image in split["image"]],
        [embed["text"](text) for text in items.captions],
    )
    for anchor in (0, 9, 15):
        image = items.caption_image[anchor]
        expected = [float(images[image] @ texts[other] + images[items.caption_image[other]] @ texts[anchor])
                    for other in range(len(items))]  # fmt: skip
        found = similarity(anchor)
        np.testing.assert_allclose(found / 2048**2, expected, atol=2e-3)
        free = np.ones(len(items), bool)
        free[[anchor, 3]] = False
        allowed = [other for other in range(len(items)) if free[other] and items.caption_image[other] != image]
        neighbours = HardNegativeSampler(items, similarity=similarity).find_neighbours(anchor, free)
        assert neighbours.tolist() == sorted(allowed, key=lambda other: (-found[other], other))[:7]
        # Sums of whole numbers, which no order of adding them changes: every processor makes the same batches.
        image, text = (
            whole[row].astype(int) for whole, row in ((similarity.images, image), (similarity.captions, anchor))
        )
        exact = similarity.captions.astype(int) @ image + (similarity.images.astype(int) @ text)[items.caption_image]
        assert (found == exact).all() and found.dtype == np.float32
    assert sorted(HardNegativeSampler(items, similarity=similarity)) == list(range(len(items)))


# Wrong and hostile ---------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def test_no_code_of_an_embedder_is_run(tmp_path, names):
    marker = tmp_path / "ran"
    malicious = tmp_path / "RemoteCLIP.pt"
    torch.save({"state_dict": {"logit_scale": torch.ones(()), "x": Payload(marker)}}, malicious)
    with pytest.raises(ValueError, match="cannot be loaded.*[Ww]eights"):
        load_embedder(f"Tiny-8:{malicious}")
    malicious.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_embedder(f"Tiny-8:{malicious}")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), malicious)
    with pytest.raises(ValueError, match="cannot be loaded.*TorchScript"):
        load_embedder(f"Tiny-8:{malicious}")

    folder = Path(shutil.copytree(names["clip"], tmp_path / "clip"))
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": torch.ones(()), "x": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError)):
        load_embedder(folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    for file, entry in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        folder = Path(shutil.copytree(names["clip"], tmp_path / file))
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
        settings = json.loads((folder / file).read_text())
        settings["auto_map"] = {entry: "evil.Evil" if entry == "AutoModel" else ["evil.Evil", None]}
        (folder / file).write_text(json.dumps(settings))
        load_embedder(folder, device="cpu")  # by transformers' own classes

    folder = Path(shutil.copytree(names["local-dir"].partition(":")[2], tmp_path / "open"))
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": str(folder),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ValueError, match="asks for code to be run"):
        load_embedder(f"local-dir:{folder}")
    assert not marker.exists()


def test_what_is_no_embedder_is_said(tmp_path, names, checkpoint):
    raw = names["raw"].partition(":")[2]
    cut = Path(shutil.copytree(names["clip"], tmp_path / "cut"))
    text_only = CLIPModel.from_pretrained(cut)
    weights = {name: weight for name, weight in text_only.state_dict().items() if "vision" not in name}
    text_only.save_pretrained(cut, state_dict=weights)
    damaged = Path(shutil.copytree(names["siglip"], tmp_path / "damaged"))
    os.truncate(damaged / "model.safetensors", 5000)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (raw, "name its architecture too, such as ViT-B-32:"),
        (names["local-dir"].partition(":")[2], "pass local-dir:"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "none", "There is no embedder"),
        (f"local-dir:{names['clip']}", "has no open_clip_config.json. Expected"),
        (checkpoint, "of the kind 'ieft'"),
        (f"NoSuch-3:{raw}", "'NoSuch-3' is no architecture"),
        (f"Tiny-8:{tmp_path / 'none.pt'}", "A file of weights"),
        (f"Tiny-16:{raw}", "(?s)cannot be loaded: RuntimeError.*size mismatch"),
        (f"ViT-B-16-SigLIP:{raw}", "another mean, std, resize_mode than CLIP.*pass local-dir:FOLDER"),
        (f"Tiny-8-48:{raw}", "another architecture than Tiny-8-48: visual.positional_embedding is of shape .17, 32."),
        (cut, "lacks .* weights of a CLIPModel"),
        (damaged, "cannot be loaded"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            load_embedder(name, device="cpu")
