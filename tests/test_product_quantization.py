"""Tests of product quantisation: codes against plain loops, and indexes whose features are kept as codes."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from test_index import CAPTIONS, checkpoint, joined_late, loaded  # noqa: F401
from test_modeling import tiny_config

from ieft import IeftForImageTextRetrieval
from ieft.data.images import read_image
from ieft.evaluation.ranking import score_matrix
from ieft.search import product_quantization
from ieft.search.archive_files import find_images
from ieft.search.command import build_parser
from ieft.search.feature_cache import decode_state, encode_state
from ieft.search.index import ImageIndex
from ieft.search.product_quantization import CENTROIDS, Codebooks

# ruff: noqa: F811

NUM_IMAGES, NUM_TOKENS, WIDTH, SIZE = 70, 17, 48, 6
KIND = f"pq{SIZE}"


def draw_vectors(count=600, width=WIDTH):
    """Vectors whose numbers depend on each other, as those of tokens do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator) @ torch.randn(4, width, generator=generator) + 0.1 * torch.randn(
        count, width, generator=generator
    )


@pytest.fixture(scope="module")
def joined_last(loaded):
    """A network whose last block alone reads caption and image together."""
    torch.manual_seed(1)
    config = tiny_config(vocab_size=loaded[0].config.vocab_size, first_joint_layer=2)
    return IeftForImageTextRetrieval(config).eval(), loaded[1]


@pytest.fixture(scope="module")
def codebooks():
    return Codebooks.learn(draw_vectors(), SIZE)


# Codes ---------------------------------------------------------------------------------------------------------------


def slow_codes(codebooks, vector):
    """One vector, part by part."""
    projected = [float(component @ (vector - codebooks.mean).double()) for component in codebooks.components.double()]
    codes = []
    for part, of_part in enumerate(torch.tensor(projected).chunk(SIZE)):
        distances = [float((of_part - centroid).square().sum()) for centroid in codebooks.centroids[part].double()]
        codes.append(int(np.argmin(distances)))
    return codes


def slow_vector(codebooks, codes):
    vector, component = codebooks.mean.clone(), iter(codebooks.components)
    for part, code in enumerate(codes):
        for number in codebooks.centroids[part, int(code)]:
            vector += number * next(component)
    return vector


def test_codes_are_those_of_plain_loops(codebooks):
    vectors = draw_vectors()[:20]
    codes = codebooks.encode(vectors)
    assert codes.dtype == torch.uint8 and codes.shape == (20, codebooks.bytes_per_vector)
    assert codes.tolist() == [slow_codes(codebooks, vector) for vector in vectors]
    torch.testing.assert_close(codebooks.decode(codes), torch.stack([slow_vector(codebooks, each) for each in codes]))


def slow_k_means(vectors):
    centroids = vectors[:CENTROIDS].copy()
    for _ in range(product_quantization.ITERATIONS):
        nearest = np.array([np.square(centroids - vector).sum(axis=1).argmin() for vector in vectors])
        for number in range(CENTROIDS):
            if (nearest == number).any():
                centroids[number] = vectors[nearest == number].mean(axis=0)
    return centroids


def test_centroids_are_those_of_plain_loops():
    vectors = draw_vectors(300, 16)
    learnt = Codebooks.learn(vectors, 1)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    centred = (vectors[order].double() - vectors.double().mean(dim=0)).numpy()
    components = np.linalg.svd(centred)[2][:4]  # a quarter of them
    components *= np.sign((components * learnt.components.numpy()).sum(axis=1, keepdims=True))  # either is right
    np.testing.assert_allclose(learnt.components, components, atol=1e-6)
    np.testing.assert_allclose(learnt.centroids[0], slow_k_means(centred @ components.T), atol=1e-4)


def test_components_are_dealt_out_in_turn():
    scales = torch.linspace(3, 1, WIDTH)
    learnt = Codebooks.learn(torch.randn(5000, WIDTH, generator=torch.Generator().manual_seed(0)) * scales.exp(), SIZE)
    assert learnt.components.abs().argmax(dim=1).tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


def test_more_bytes_lose_less():
    vectors = draw_vectors(2000)
    lost = []
    for size in (1, 2, 4):
        learnt = Codebooks.learn(vectors[:1000], size)
        back = learnt.decode(learnt.encode(vectors[1000:]))
        lost.append(float((back - vectors[1000:]).square().mean() / vectors.var()))
    assert 0.3 > lost[0] > 2 * lost[1] > 4 * lost[2] > 0


def test_the_same_vectors_give_the_same_codebooks_with_any_number_of_threads(codebooks):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert Codebooks.learn(draw_vectors(), SIZE).digest == codebooks.digest
    finally:
        torch.set_num_threads(threads)


def test_codebooks_come_back_from_bytes(codebooks):
    content = codebooks.to_bytes()
    back = Codebooks.from_bytes(content)
    numbers = [each.numpy().tobytes() for each in (codebooks.mean, codebooks.components, codebooks.centroids)]
    assert back.digest == codebooks.digest == hashlib.sha256(b"".join(numbers)).digest()[:8]
    codes = codebooks.encode(draw_vectors())
    assert torch.equal(back.decode(codes), codebooks.decode(codes))
    for other in (b"", content[:-1], content + b"?", b"x" * 100):
        with pytest.raises(ValueError, match="Codebooks in the format of safetensors expected"):
            Codebooks.from_bytes(other)


@pytest.mark.parametrize("size", [0, -1, 7])
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(size):
    with pytest.raises(ValueError, match=f"of 48 numbers takes from 1 to 6 bytes; got {size}"):
        Codebooks.learn(draw_vectors(), size)


def test_too_few_vectors_and_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="Finite numbers expected"):
        Codebooks.learn(draw_vectors() / 0, SIZE)
    for few in (draw_vectors(255), draw_vectors(255).repeat(3, 1)):
        with pytest.raises(ValueError, match="At least 256 different vectors expected .* got 255: learn from more"):
            Codebooks.learn(few, SIZE)


def test_repeated_vectors_as_those_of_black_tiles_take_no_centroids_from_others(codebooks):
    vectors = draw_vectors()
    assert Codebooks.learn(torch.cat([vectors, vectors[:9].repeat(2000, 1)]), SIZE).digest == codebooks.digest


# Features ------------------------------------------------------------------------------------------------------------


def test_features_are_codes_and_need_their_codebooks(codebooks):
    state = draw_vectors()[:NUM_TOKENS]
    content = encode_state(state, KIND, codebooks)
    assert len(content) == 10 + 8 + NUM_TOKENS * SIZE
    assert torch.equal(decode_state(content, codebooks), codebooks.decode(codebooks.encode(state)))
    others = Codebooks(codebooks.mean + 1, codebooks.components, codebooks.centroids)
    for wrong in (None, others):
        with pytest.raises(ValueError, match=f"with the codebooks {codebooks.digest.hex()}; got .* to decode"):
            decode_state(content, wrong)
    for broken in (content[:-1], content + b"?", content[:12]):
        with pytest.raises(ValueError, match=f"got {len(broken)} bytes"):
            decode_state(broken, codebooks)
    for kind, given, features in (
        (KIND, None, state), ("pq4", codebooks, state), (KIND, codebooks, state[:, :12]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{kind} needs codebooks of . bytes for .* numbers"):
            encode_state(features, kind, given)


# Indexes -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    noise = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = noise.integers(0, 255, (4, 4, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def create(folder, loaded, states=KIND):
    return ImageIndex(folder, loaded[0], processor=loaded[1], create=True, states=states, dtype="float32")


@torch.no_grad()
def slow_score(model, features, tokens):
    """One caption with keys and values of one image, head by head in the last block."""
    network = model.vilt
    text = network.embeddings.mark_captions(network.embed_captions(torch.tensor([tokens])))
    text = network.read_alone(text, has_image=False)[0][0]  # (L, D)
    layer = network.encoder.layer[-1]
    attention, normed = layer.attention.attention, layer.layernorm_before(text)
    keys = torch.cat([attention.key(normed), features[:, : WIDTH // 2]])
    values = torch.cat([attention.value(normed), features[:, WIDTH // 2 :]])
    query, context = attention.query(normed)[0], []
    for rows in torch.arange(WIDTH // 2).chunk(attention.num_heads):
        shares = (keys[:, rows] @ query[rows] / len(rows) ** 0.5).softmax(dim=0)
        context.append(shares @ values[:, rows])
    hidden = layer.finish(text[None, :1], torch.cat(context)[None, None])
    return float(model.rank_output(network.pooler(network.layernorm(hidden))))


@pytest.fixture(scope="module")
def index(tmp_path_factory, archive, joined_last):
    index = create(tmp_path_factory.mktemp("index"), joined_last)
    assert index.lacks_codebooks
    assert index.add(find_images(archive), batch_size=16)["added"] == NUM_IMAGES
    return index


def test_hits_are_ranked_by_plain_loops_over_decoded_features(index, joined_last):
    model, processor = joined_last
    rows = index.select(None, ["file", "state"])
    assert {len(row["state"]) for row in rows} == {10 + 8 + NUM_TOKENS * SIZE}
    states = {}
    for row in rows:
        codes = np.frombuffer(row["state"][18:], np.uint8).reshape(NUM_TOKENS, SIZE)
        states[row["file"]] = torch.stack([slow_vector(index.codebooks, token) for token in codes])
    hits = ImageIndex(index.uri, model, processor=processor).search(CAPTIONS[0], top_k=20, rerank_top_k=20)
    tokens = processor.tokenizer(CAPTIONS[0])["input_ids"]
    expected = [slow_score(model, states[index.name_of(hit["file"])], tokens) for hit in hits]
    assert [hit["stage"] for hit in hits] == ["re-ranked"] * 20 and np.std(expected) > 0.1
    np.testing.assert_allclose([hit["score"] for hit in hits], expected, atol=1e-4)


def test_scores_are_near_those_of_the_images(index, archive, joined_last):
    model, processor = joined_last
    pixels = processor(images=[read_image(file) for file in find_images(archive)])["pixel_values"]
    exact = score_matrix(model, pixels, [processor.tokenizer(CAPTIONS[0])["input_ids"]], progress=False)[:, 0]
    hits = index.search(CAPTIONS[0], top_k=NUM_IMAGES, rerank_top_k=NUM_IMAGES)
    quantised = [hit["score"] for hit in sorted(hits, key=lambda hit: hit["file"])]
    assert np.corrcoef(exact, quantised)[0, 1] > 0.9


def test_what_is_added_later_uses_the_codebooks_that_were_learnt_first(index, tmp_path, archive, joined_last):
    digest = index.codebooks.digest
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    again = create(index.uri, joined_last)
    assert again.add([tmp_path / "red.png"])["added"] == 1
    again.optimize()
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "red.png")  # a changed image replaces its row
    assert again.add([tmp_path / "red.png", *find_images(archive)])["added"] == 1
    assert {row["state"][10:18] for row in again.select(None, ["state"])} == {digest}
    assert again.delete([tmp_path / "red.png"]) == 1


def test_of_two_that_learn_at_once_both_use_the_codebooks_of_the_first(tmp_path, archive, joined_last):
    files = find_images(archive)
    some = [create(tmp_path / "index", joined_last) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda index, files: index.add(files, progress=False), some, (files[:-4], files[4:])))
    rows = some[0].select(None, ["file", "state"])
    assert len(rows) == NUM_IMAGES
    for row in rows:
        for index in some:
            decode_state(row["state"], index.codebooks)
    one, two = (Codebooks.learn(draw_vectors() + offset, SIZE) for offset in (0, 1))
    index, other = (create(tmp_path / "other", joined_last) for _ in range(2))
    index.keep_codebooks(one)
    other.keep_codebooks(two)
    assert index.codebooks.digest == other.codebooks.digest == one.digest


def test_too_few_images_are_refused_and_nothing_is_added(tmp_path, archive, joined_last):
    index, files = create(tmp_path / "index", joined_last), find_images(archive)
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:60])
    with pytest.raises(ValueError, match="pq6 learns .* at least 64 images or tiles expected; 63 can be read"):
        index.add([*files[:63], tmp_path / "cut.png"])
    assert len(index) == 0 and index.lacks_codebooks
    assert index.search(CAPTIONS[0]) == []
    assert index.add([])["added"] == 0
    assert index.add(files)["added"] == NUM_IMAGES


@pytest.mark.parametrize("instead", [None, SIZE, 4])
def test_lost_codebooks_and_those_of_another_index_are_named_and_nothing_is_added(
    index, tmp_path, archive, joined_last, instead
):
    shutil.copytree(index.uri, tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "codebooks.lance")
    if instead:
        other = create(tmp_path / "other", joined_last, f"pq{instead}")
        other.keep_codebooks(Codebooks.learn(draw_vectors(), instead))
        shutil.copytree(tmp_path / "other" / "codebooks.lance", tmp_path / "index" / "codebooks.lance")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    broken, digest = create(tmp_path / "index", joined_last), index.codebooks.digest.hex()
    for use in (lambda: broken.search(CAPTIONS[0]), lambda: broken.add([tmp_path / "red.png"])):
        with pytest.raises(ValueError, match=f"codebooks of the pq6 .* bring .* back, or .* codebooks {digest}; got"):
            use()
    assert len(broken) == NUM_IMAGES


def test_codebooks_are_learnt_from_tiles_of_a_scene(tmp_path, joined_last):
    noise = np.random.default_rng(1).integers(0, 255, (40, 80, 3), np.uint8)
    Image.fromarray(noise).resize((640, 320)).save(tmp_path / "scene.png")
    index = create(tmp_path / "index", joined_last)
    report = index.add([tmp_path / "scene.png"], tile=32, overlap=0)
    assert report == {"added": 200, "unchanged": 0, "unreadable": {}}
    assert len({row["state"] for row in index.select(None, ["state"])}) == 200


def test_what_does_not_fit_is_refused_before_anything_is_created(tmp_path, joined_late, joined_last, capsys):
    for states, message in (
        ("pq7", "of 48 numbers takes from 1 to 6 bytes; got 7"),
        ("pq", "pq with the bytes of a token"),
    ):
        with pytest.raises(ValueError, match=message):
            create(tmp_path / "index", joined_last, states)
    with pytest.raises(
        ValueError, match="pq6 keeps keys and values of the last block: .* first_joint_layer 2 expected"
    ):
        create(tmp_path / "index", joined_late)
    assert not (tmp_path / "index").exists()
    with pytest.raises(SystemExit):
        build_parser().parse_args(["index", "a", "--model", "m", "--index", "i", "--states", "int4"])
    assert "one of bf16, int8, or pq with the bytes of a token, such as pq96; got 'int4'" in capsys.readouterr().err
    create(tmp_path / "index", joined_last)
    with pytest.raises(ValueError, match="keeps pq6 states, and pq4 are asked for"):
        create(tmp_path / "index", joined_last, "pq4")
