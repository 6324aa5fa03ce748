"""Tests of `model.rank` and the pipeline against one plain forward pass per pair."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling import tiny_config
from transformers import BertTokenizer, pipeline

from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

WORDS = ["red", "green", "grey", "two", "many", "houses", "ships", "tanks", "river", "beach"]
CAPTIONS = [f"{first} {second} ." for first in WORDS for second in WORDS]  # more than are scored at once


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model with its processor, and a folder of images."""
    folder, images = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=60)
    IeftForImageTextRetrieval(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    IeftProcessor(IeftImageProcessor(32), tokenizer).save_pretrained(folder)
    noise = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(noise.integers(0, 255, (40, 30 + number, 3), np.uint8)).save(images / f"{number}.png")
    return folder, sorted(images.iterdir())


@pytest.fixture(scope="module")
def model(saved):
    return IeftForImageTextRetrieval.from_pretrained(saved[0])


def score_slowly(model, folder, path, caption):
    inputs = IeftProcessor.from_pretrained(folder)(images=[Image.open(path)], text=[caption])
    with torch.no_grad():
        return model(**inputs).logits.item()


def test_captions_of_an_image_are_ranked_by_the_plain_forward_pass(saved, model):
    folder, images = saved
    ranked = model.rank(images[0], CAPTIONS)
    assert sorted(hit["caption"] for hit in ranked) == sorted(CAPTIONS)
    assert [hit["rank"] for hit in ranked] == list(range(1, len(CAPTIONS) + 1))
    scores = [hit["score"] for hit in ranked]
    assert scores == sorted(scores, reverse=True)
    for hit in ranked[::9]:
        assert hit["score"] == pytest.approx(score_slowly(model, folder, images[0], hit["caption"]), abs=1e-5)


def test_images_of_a_caption_are_ranked_by_the_plain_forward_pass(saved, model):
    folder, images = saved
    paths = [str(path) for path in images]
    ranked = model.rank(CAPTIONS[7], paths)
    slow = {path: score_slowly(model, folder, path, CAPTIONS[7]) for path in paths}
    assert [hit["image"] for hit in ranked] == sorted(slow, key=slow.get, reverse=True)
    assert [hit["score"] for hit in ranked] == pytest.approx(sorted(slow.values(), reverse=True), abs=1e-5)
    assert model.rank(CAPTIONS[7], paths, top_k=2) == ranked[:2]


def test_the_pipeline_ranks_as_the_model(saved, model):
    folder, images = saved
    retrieval = pipeline("image-text-retrieval", model=str(folder), trust_remote_code=True)
    paths = [str(path) for path in images]
    for query, candidates in ((paths[0], CAPTIONS), (CAPTIONS[0], paths)):
        for ours, theirs in zip(
            retrieval(query, candidates, top_k=3), model.rank(query, candidates, top_k=3), strict=True
        ):
            assert ours == theirs | {"score": pytest.approx(theirs["score"], abs=1e-5)}


def test_an_image_by_path_url_picture_or_array_is_the_same_image(saved, model):
    images = saved[1]
    handler = partial(SimpleHTTPRequestHandler, directory=images[0].parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{images[0].name}"
    picture = Image.open(images[0])
    try:
        ranked = [
            model.rank(image, CAPTIONS[:4]) for image in (images[0], str(images[0]), url, picture, np.array(picture))
        ]
    finally:
        server.shutdown()
    assert ranked == [ranked[0]] * 5


def test_a_model_in_training_ranks_without_dropout_and_trains_on(saved, model):
    paths = [str(path) for path in saved[1]]
    expected = model.rank(CAPTIONS[0], paths)
    model.train()
    assert model.rank(CAPTIONS[0], paths) == expected and model.training
    model.eval()


@pytest.mark.parametrize(
    "query, candidates, options, message",
    [
        (CAPTIONS[0], [], {}, "at least one candidate"),
        (CAPTIONS[0], "red houses", {}, "A list of at least one candidate"),
        (CAPTIONS[0], CAPTIONS, {"top_k": 0}, "top_k must be 1 or more"),
        (CAPTIONS[0], CAPTIONS[:2], {}, "0 images and 2 captions"),
        (CAPTIONS[0], ["nowhere.png"], {}, "is each path right"),
    ],
)
def test_what_cannot_be_ranked_says_why(model, query, candidates, options, message):
    with pytest.raises(ValueError, match=message):
        model.rank(query, candidates, **options)


def test_weights_that_are_no_numbers_rank_nothing(saved):
    folder, images = saved
    broken = IeftForImageTextRetrieval.from_pretrained(folder)
    broken.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not all finite numbers: its weights contain NaN"):
        broken.rank(images[0], CAPTIONS[:4])


def test_several_queries_give_a_ranking_each(saved, model):
    retrieval = pipeline("image-text-retrieval", model=str(saved[0]), trust_remote_code=True)
    paths = [str(path) for path in saved[1]]
    expected = [model.rank(path, CAPTIONS[:5], top_k=3) for path in paths[:2]]
    expected = [[hit | {"score": pytest.approx(hit["score"], abs=1e-5)} for hit in hits] for hits in expected]
    assert retrieval(paths[:2], CAPTIONS[:5], top_k=3) == expected
    assert retrieval((path for path in paths[:2]), CAPTIONS[:5], top_k=3, batch_size=2) == expected
    assert retrieval([Image.open(path) for path in paths[:2]], CAPTIONS[:5], top_k=3) == expected
    by_caption = retrieval(CAPTIONS[:2], paths)
    assert [hit["image"] for hit in by_caption[1]] == [hit["image"] for hit in model.rank(CAPTIONS[1], paths)]
    with pytest.raises(TypeError, match="topk"):
        retrieval(paths[0], CAPTIONS, topk=3)


def test_lists_are_no_query_and_no_candidate_of_the_model(saved, model):
    paths = [str(path) for path in saved[1]]
    with pytest.raises(ValueError, match="One image or caption expected"):
        model.rank(paths[:2], CAPTIONS[:2])
    with pytest.raises(ValueError, match="Each candidate must be one"):
        model.rank(CAPTIONS[0], [paths[:2], paths[2:]])
