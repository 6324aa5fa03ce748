"""Tests of the image index: equal to exact search, idempotent, consistent after a kill, bound to its checkpoint."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling import tiny_config
from transformers import BertTokenizer

from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

from lancedb.index import IvfPq  # noqa: E402

from ieft.data.images import read_image  # noqa: E402
from ieft.search import index as index_module  # noqa: E402
from ieft.search.archive_files import find_images, read_hit  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402
from ieft.search.queries import merge_overlaps  # noqa: E402
from ieft.search.tables import any_of

CAPTIONS = ["two red houses .", "a green river .", "many grey ships beside a beach ."]
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tokenizer = BertTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=60)
    IeftForImageTextRetrieval(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    IeftProcessor(IeftImageProcessor(32), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model = IeftForImageTextRetrieval.from_pretrained(checkpoint)
    return model.eval(), IeftProcessor.from_pretrained(checkpoint)


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "archive"
    (folder / "deep").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        place = folder / "deep" if number % 2 else folder
        pixels = noise.integers(0, 255, (40, 30 + number, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"it's {number:02}.png")
    return folder


@pytest.fixture
def index(tmp_path, loaded, archive):
    index = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], create=True)
    index.add(find_images(archive), batch_size=7)
    return index


def slow_similarities(index, caption):
    vectors = {row["file"]: row["vector"] for row in index.rows(columns=["file", "vector"])}
    wanted = index.embed_caption(caption)
    return {file: float(np.dot(vector, wanted)) for file, vector in vectors.items()}


def test_the_shortlist_is_a_comparison_with_every_vector(index):
    for caption in CAPTIONS:
        expected = slow_similarities(index, caption)
        hits = index.shortlist(index.embed_caption(caption), 9)
        assert [hit["file"] for hit in hits] == sorted(expected, key=expected.get, reverse=True)[:9]
        for hit in hits:
            assert hit["similarity"] == pytest.approx(expected[hit["file"]], abs=1e-5)


def test_vectors_are_those_of_each_image_alone(index):
    for row in index.rows(columns=["file", "vector"])[::5]:
        alone = index.embed_images([read_image(row["file"])])[0]
        np.testing.assert_allclose(row["vector"], alone, atol=1e-5)


def test_search_re_ranks_the_shortlist_as_the_plain_model_does(index, loaded):
    model, processor = loaded
    hits = index.search(CAPTIONS[0], top_k=10, rerank_top_k=6)
    assert [hit["rank"] for hit in hits] == list(range(1, 11))
    assert [hit["stage"] for hit in hits] == ["re-ranked"] * 6 + ["shortlist"] * 4
    shortlist = [hit["file"] for hit in index.shortlist(index.embed_caption(CAPTIONS[0]), 10)]
    ranked = model.rank(CAPTIONS[0], shortlist[:6], processor=processor)
    assert [hit["file"] for hit in hits] == [hit["image"] for hit in ranked] + shortlist[6:]
    np.testing.assert_allclose([hit["score"] for hit in hits[:6]], [hit["score"] for hit in ranked], atol=1e-5)


def test_an_image_finds_itself(index, archive):
    file = find_images(archive)[3]
    best = index.search_image(read_image(file), top_k=1)[0]
    assert best["file"] == str(file.resolve())
    assert best["score"] == pytest.approx(1, abs=1e-5)


def test_adding_again_changes_nothing_and_a_changed_file_takes_its_row(index, archive, loaded):
    files = find_images(archive)
    assert index.add(files) == {"added": 0, "unchanged": NUM_IMAGES, "unreadable": {}}
    before = {row["file"]: row["content"] for row in index.rows()}
    Image.new("RGB", (50, 40), "red").save(files[0])
    shutil.copy(files[1], archive / "copy.png")
    assert index.add(find_images(archive)) == {"added": 2, "unchanged": NUM_IMAGES - 1, "unreadable": {}}
    after = {row["file"]: row["content"] for row in index.rows()}
    assert len(index) == len(after) == NUM_IMAGES + 1
    assert [file for file in before if before[file] != after[file]] == [str(files[0].resolve())]


def test_deleted_images_are_not_found(index, archive):
    files = find_images(archive)
    assert index.delete([files[0], files[5], archive / "never.png"]) == 2
    left = {hit["file"] for hit in index.shortlist(index.embed_caption(CAPTIONS[0]), NUM_IMAGES)}
    assert left == {str(file.resolve()) for file in files} - {str(files[0].resolve()), str(files[5].resolve())}


def test_filters_hold_before_the_search(index):
    hits = index.search(CAPTIONS[1], top_k=NUM_IMAGES, rerank_top_k=2, where="width >= 50 AND file LIKE '%deep%'")
    assert sorted(hit["width"] for hit in hits) == [51, 53]
    assert index.search(CAPTIONS[1], where="width > 5000") == []


def test_metadata_of_a_georeferenced_image(index, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 60), np.uint8)
    transform = rasterio.transform.from_origin(500000, 5400000, 10, 10)
    file = tmp_path / "scene.tif"
    with rasterio.open(
        file, "w", driver="GTiff", width=60, height=40, count=3, dtype="uint8", crs="EPSG:32631", transform=transform
    ) as scene:
        scene.write(pixels)
    index.add([file])
    row = index.rows("crs IS NOT NULL")[0]
    assert [row[side] for side in ("left", "bottom", "right", "top")] == [500000, 5399600, 500600, 5400000]
    degrees = [row[side] for side in ("west", "south", "east", "north")]
    np.testing.assert_allclose(degrees, [3.0, 48.7494, 3.00816, 48.75301], atol=1e-5)
    assert [hit["file"] for hit in index.search(CAPTIONS[0], where="north > 48")] == [str(file)]
    assert (row["crs"], row["width"], row["height"]) == ("EPSG:32631", 60, 40)
    assert (row["bytes"], row["time"].timestamp()) == (file.stat().st_size, pytest.approx(file.stat().st_mtime, abs=1))


def test_what_cannot_be_read_is_named_and_the_rest_is_kept(index, archive):
    (archive / "broken.png").write_bytes(b"no image")
    (archive / "cut.png").write_bytes(find_images(archive)[0].read_bytes()[:600])
    report = index.add([*find_images(archive), archive / "gone.png"])
    assert sorted(os.path.basename(file) for file in report["unreadable"]) == ["broken.png", "cut.png", "gone.png"]
    assert report["added"] + report["unchanged"] == len(index) == NUM_IMAGES


def test_another_checkpoint_is_refused(index, tmp_path, loaded):
    model, processor = loaded
    torch.manual_seed(1)
    other = IeftForImageTextRetrieval(model.config)
    with pytest.raises(ValueError, match="cannot be compared"):
        ImageIndex(tmp_path / "index", other, processor=processor)
    squashing = IeftProcessor(IeftImageProcessor(32, fit="squash"), processor.tokenizer)
    with pytest.raises(ValueError, match="cannot be compared"):
        ImageIndex(tmp_path / "index", model, processor=squashing)
    assert len(ImageIndex(tmp_path / "index", model, processor=processor)) == NUM_IMAGES


def test_errors_say_what_to_do(index, tmp_path, loaded, archive):
    model, processor = loaded
    with pytest.raises(FileNotFoundError, match="ieft-search index"):
        ImageIndex(tmp_path / "none", model, processor=processor)
    with pytest.raises(ValueError, match="contrastive_weight"):
        ImageIndex(tmp_path / "x", IeftForImageTextRetrieval(tiny_config(contrastive_dim=0)), processor=processor)
    with pytest.raises(ValueError, match="empty"):
        index.search("  ")
    with pytest.raises(ValueError, match="top_k"):
        index.shortlist(np.zeros(8), 0)
    with pytest.raises(FileNotFoundError, match="there is no "):
        find_images(tmp_path / "index" / "nothing")


def add_vectors(index, vectors, first):
    index.needs_files = False  # there are none
    row = index.table.to_arrow().slice(0, 1).to_pylist()[0]
    index.table.add([row | {"file": str(first + number), "vector": vector} for number, vector in enumerate(vectors)])


def draw_vectors(count, draw):
    vectors = draw.normal(size=(count, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def part_found(index, queries):
    """The recall of the ten exact nearest by the vector index."""
    found = [[hit["file"] for hit in index.shortlist(query, 10)] for query in queries]
    vectors = {row["file"]: row["vector"] for row in index.rows(columns=["file", "vector"])}
    files, products = list(vectors), queries @ np.array(list(vectors.values())).T
    exact = [[files[place] for place in np.argsort(-row)[:10]] for row in products]
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])


def test_the_vector_index_finds_what_the_comparison_does(index, monkeypatch):
    draw = np.random.default_rng(0)
    add_vectors(index, draw_vectors(3000, draw), 0)
    queries = draw_vectors(100, draw)
    assert part_found(index, queries) == 1
    monkeypatch.setattr(index_module, "FEWEST_FOR_VECTOR_INDEX", 1000)
    index.table.create_index("vector", config=IvfPq(distance_type="dot", num_sub_vectors=1))  # as it was: replaced
    index.optimize()
    assert sorted(found.index_type for found in index.table.list_indices()) == ["BTree", "IvfSq"]
    name = index.table.search().limit(1).to_list()[0]["file"]
    where = any_of([name, "none"])
    assert "ScalarIndexQuery" in index.table.search().where(where).explain_plan(verbose=True)
    assert {row["file"] for row in index.select(where, ["file"])} == {name}
    assert part_found(index, queries) > 0.98


def test_the_vector_index_keeps_its_partitions_when_rows_are_added(index, monkeypatch):
    """If partitions were merged into a few large ones, all would be searched, five times slower for a million rows."""
    monkeypatch.setattr(index_module, "FEWEST_FOR_VECTOR_INDEX", 1000)
    monkeypatch.setattr(index_module, "PARTITION_ROWS", 64)
    monkeypatch.setattr(index_module, "PROBES", 1)
    draw = np.random.default_rng(0)
    add_vectors(index, draw_vectors(3000, draw), 0)
    index.optimize()
    add_vectors(index, draw_vectors(300, draw), 3000)
    index.optimize()
    assert part_found(index, draw_vectors(100, draw)) < 0.9  # 0.49; of all rows, 1


# States kept beside the vectors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined_late(loaded):
    """A network whose second block is the first to read caption and image together."""
    torch.manual_seed(1)
    config = tiny_config(vocab_size=loaded[0].config.vocab_size, first_joint_layer=1, initializer_range=0.2)
    return IeftForImageTextRetrieval(config).eval(), loaded[1]


@pytest.mark.parametrize("states, tolerance", [("bf16", 0.02), ("int8", 0.05)])
def test_states_re_rank_as_the_files_do_and_no_file_is_read(tmp_path, archive, joined_late, states, tolerance):
    model, processor = joined_late
    plain = ImageIndex(tmp_path / "plain", model, processor=processor, create=True)
    kept = ImageIndex(tmp_path / "kept", model, processor=processor, create=True, states=states)
    for index in (plain, kept):
        assert index.add(find_images(archive), batch_size=7)["added"] == NUM_IMAGES
    vectors = [
        {row["file"]: row["vector"] for row in index.rows(columns=["file", "vector"])} for index in (plain, kept)
    ]
    for file, vector in vectors[0].items():
        np.testing.assert_allclose(vectors[1][file], vector, atol=1e-5)
    options = {"top_k": NUM_IMAGES, "rerank_top_k": 20}
    expected = {hit["file"]: hit for hit in plain.search(CAPTIONS[0], **options)}
    scores = [hit["score"] for hit in expected.values() if hit["stage"] == "re-ranked"]
    assert np.std(scores) > 0.1  # so that the tolerance tells something
    shutil.rmtree(archive)
    again = ImageIndex(tmp_path / "kept", model, processor=processor)
    assert again.states == states
    hits = again.search(CAPTIONS[0], **options)
    assert {hit["file"] for hit in hits} == set(expected) and "state" not in hits[0]
    for hit in hits:
        assert hit["stage"] == expected[hit["file"]]["stage"]
        assert hit["score"] == pytest.approx(expected[hit["file"]]["score"], abs=tolerance)


def test_states_are_refused_where_they_help_nothing_or_are_not_what_is_there(tmp_path, loaded, joined_late):
    model, processor = loaded
    with pytest.raises(ValueError, match="first_joint_layer above 0"):
        ImageIndex(tmp_path / "index", model, processor=processor, create=True, states="int8")
    model, processor = joined_late
    ImageIndex(tmp_path / "index", model, processor=processor, create=True)
    with pytest.raises(ValueError, match="keeps no states, and int8 are asked for"):
        ImageIndex(tmp_path / "index", model, processor=processor, create=True, states="int8")


# Large scenes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path):
    """A scene of 4 x 3 tiles of 32 pixels that share a quarter, and its file."""
    pytest.importorskip("rasterio", reason="GeoTIFF, extra `geo`, is not installed")
    from test_tiles import write_scene

    pixels = np.random.default_rng(3).integers(0, 4000, (3, 80, 104), np.uint16)
    return write_scene(tmp_path / "scene.tif", pixels)


def windows_of(rows):
    return sorted((row["col"], row["row"], row["tile_width"], row["tile_height"]) for row in rows)


def test_a_scene_is_indexed_by_tiles_and_they_are_one_unit(index, scene, archive):
    first, again = {"added": 12, "unchanged": 0, "unreadable": {}}, {"added": 0, "unchanged": 12, "unreadable": {}}
    assert index.add([scene], tile=32) == first and index.add([scene], tile=32) == again
    of_scene = f"file = '{scene}'"
    expected = [(col, row, 32, 32) for col in (0, 24, 48, 72) for row in (0, 24, 48)]
    assert windows_of(index.rows(of_scene)) == expected
    assert index.add(find_images(archive)[:2], tile=64)["unchanged"] == 2  # smaller than a tile: whole, as they were
    assert index.add([scene], tile=64, overlap=0)["added"] == 4  # cut otherwise: the old tiles go
    assert windows_of(index.rows(of_scene)) == [(col, row, 64, 64) for col in (0, 40) for row in (0, 16)]
    shutil.copy(scene, scene.with_name("copy.tif"))
    scene.write_bytes(scene.read_bytes() + b"\0")  # another content
    assert index.add([scene], tile=64, overlap=0)["added"] == 4 and len(index.rows(of_scene)) == 4
    index.add([scene.with_name("copy.tif")], tile=32)
    assert index.delete([scene]) == 4 and len(index) == NUM_IMAGES + 12
    with pytest.raises(ValueError, match="overlap from 0"):
        index.add([scene], tile=32, overlap=1)


def test_a_tile_is_embedded_and_re_ranked_as_its_own_picture(index, loaded, scene):
    """The reference implementation reads the whole scene and cuts it."""
    from ieft.search.tiles import Scene, Window

    index.add([scene], tile=32)
    with Scene(scene) as opened:
        whole = opened.read(Window(0, 0, 104, 80))
    for row in index.rows("tiling != ''", columns=["file", "col", "row", "vector"])[::4]:
        crop = whole.crop((row["col"], row["row"], row["col"] + 32, row["row"] + 32))
        np.testing.assert_allclose(row["vector"], index.embed_images([crop])[0], atol=1e-5)
    hit = index.search(CAPTIONS[0], top_k=1, rerank_top_k=12, where="tiling != ''")[0]
    crop = whole.crop((hit["col"], hit["row"], hit["col"] + 32, hit["row"] + 32))
    assert np.array_equal(np.asarray(read_hit(hit)), np.asarray(crop))
    assert hit["score"] == pytest.approx(
        loaded[0].rank(CAPTIONS[0], [crop], processor=loaded[1])[0]["score"], abs=1e-5
    )
    assert (hit["right"] - hit["left"], hit["top"] - hit["bottom"]) == (320, 320)
    assert (hit["left"], hit["top"]) == (500000 + 10 * hit["col"], 5400000 - 10 * hit["row"])


def test_tiles_that_overlap_a_better_one_are_merged_into_it(index, scene):
    index.add([scene], tile=32)
    hits = index.search(CAPTIONS[0], top_k=NUM_IMAGES + 12, rerank_top_k=8)
    tiles = [hit for hit in hits if hit["tiling"]]
    boxes = [(hit["col"], hit["row"]) for hit in tiles]
    assert all(max(abs(a - c), abs(b - d)) >= 32 for n, (a, b) in enumerate(boxes) for c, d in boxes[:n])
    assert sum(hit["merged"] for hit in tiles) == 12 and len(hits) == len(tiles) + NUM_IMAGES
    assert [hit["rank"] for hit in hits] == list(range(1, len(hits) + 1))
    few = index.search(CAPTIONS[0], top_k=len(tiles), rerank_top_k=1, where="tiling != ''")
    assert len(few) >= 2  # the shortlist was asked for more than the first, which all overlap
    near, far = (
        {"file": "a", "col": 0, "row": 0, "tile_width": 9, "tile_height": 9},
        {"tile_width": 9, "tile_height": 9},
    )
    kept = merge_overlaps([near, far | {"file": "a", "col": 8, "row": 8}, far | {"file": "a", "col": 9, "row": 0},
                           far | {"file": "b", "col": 0, "row": 0}])  # fmt: skip
    assert [(hit["file"], hit["col"], hit["merged"]) for hit in kept] == [("a", 0, 2), ("a", 9, 1), ("b", 0, 1)]


def test_a_scene_that_breaks_off_is_named(index, scene):
    scene.write_bytes(scene.read_bytes()[:30_000])
    report = index.add([scene], tile=32)
    assert list(report["unreadable"]) == [str(scene)] and report["added"] == len(index) - NUM_IMAGES < 12


# Captions, scores, times ---------------------------------------------------------------------------------------------


def test_captions_for_an_image_are_re_ranked_as_the_plain_model_does(index, archive, loaded):
    model, processor = loaded
    assert index.add_captions([*CAPTIONS, " ", CAPTIONS[0] + " "]) == {"added": 3, "unchanged": 0}
    assert index.add_captions(["it's a beach .", CAPTIONS[1]]) == {"added": 1, "unchanged": 1}
    image = read_image(find_images(archive)[2])
    captions = [*CAPTIONS, "it's a beach ."]
    hits = index.search_captions(image, rerank_top_k=4)
    ranked = model.rank(image, captions, processor=processor)
    assert [hit["caption"] for hit in hits] == [hit["caption"] for hit in ranked]
    np.testing.assert_allclose([hit["score"] for hit in hits], [hit["score"] for hit in ranked], atol=1e-5)
    wanted = index.embed_images([image])[0]
    for hit in hits:
        assert hit["similarity"] == pytest.approx(float(index.embed_caption(hit["caption"]) @ wanted), abs=1e-5)
    assert index.delete_captions(["it's a beach ."]) == 1
    assert len(index.search_captions(image, rerank_top_k=0)) == 3
    index.delete_captions(CAPTIONS)
    assert index.search_captions(image) == []


def test_the_fused_score_adds_the_similarity(index):
    plain = {hit["file"]: hit for hit in index.search(CAPTIONS[0], top_k=6, rerank_top_k=6)}
    fused = index.search(CAPTIONS[0], top_k=6, rerank_top_k=6, similarity_weight=50)
    assert [hit["file"] for hit in fused] != list(plain)  # so much of it decides the order
    scale = index.model.similarity_scale().item()
    for hit in fused:
        expected = plain[hit["file"]]["score"] + 50 * scale * hit["similarity"]
        assert hit["score"] == pytest.approx(expected, abs=1e-3)


def test_a_search_tells_what_each_stage_took(index):
    start = time.perf_counter()
    hits = index.search(CAPTIONS[0])
    assert set(hits.seconds) == {"embed", "shortlist", "re-rank"} and min(hits.seconds.values()) > 0
    assert 0.5 * (time.perf_counter() - start) < sum(hits.seconds.values()) < time.perf_counter() - start


def test_filters_on_time_and_what_is_added_again(index, archive):
    file = find_images(archive)[0]
    os.utime(file, (0, 10**9))  # September 2001
    index.delete([file])
    assert index.add([file])["added"] == 1 and len(index) == NUM_IMAGES
    hits = index.search(CAPTIONS[0], where="time < TIMESTAMP '2010-01-01 00:00:00'")
    assert [hit["file"] for hit in hits] == [str(file.resolve())]


ADD = """
import sys
from ieft import IeftForImageTextRetrieval, IeftProcessor
from ieft.search.index import ImageIndex
from ieft.search.archive_files import find_images
model, processor = (kind.from_pretrained(sys.argv[1]) for kind in (IeftForImageTextRetrieval, IeftProcessor))
index = ImageIndex(sys.argv[2], model, processor=processor, create=True)
print("ready", flush=True)
index.add(find_images(sys.argv[3]), tile=int(sys.argv[4]) or None, batch_size=1)
"""


def test_killed_while_adding_nothing_is_lost_or_doubled(tmp_path, checkpoint, loaded, archive):
    files = find_images(archive)
    kill_and_go_on(tmp_path, checkpoint, loaded, archive, 0, NUM_IMAGES)
    rows = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1]).rows()
    assert sorted(row["file"] for row in rows) == sorted(str(file.resolve()) for file in files)


def test_killed_while_adding_the_tiles_of_a_scene(tmp_path, checkpoint, loaded, scene):
    index = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1], create=True)
    assert index.add([scene])["added"] == 1  # whole before
    kill_and_go_on(tmp_path, checkpoint, loaded, scene, 16, 63)
    index.table.checkout_latest()
    cols, rows = [*range(0, 88, 12), 88], [*range(0, 64, 12), 64]
    assert windows_of(index.rows()) == [(col, row, 16, 16) for col in cols for row in rows]


def kill_and_go_on(tmp_path, checkpoint, loaded, archive, tile, expected):
    adding = subprocess.Popen(
        [sys.executable, "-c", ADD, checkpoint, tmp_path / "index", archive, str(tile)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert adding.stdout.readline() == "ready\n"
    index = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1])
    new = f"tiling {'!=' if tile else '='} ''"
    while not index.table.count_rows(new) and adding.poll() is None:
        index.table.checkout_latest()
        time.sleep(0.005)
    adding.send_signal(signal.SIGKILL)
    adding.communicate()
    index = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1])
    kept = index.table.count_rows(new)
    assert 0 < kept < expected, "the kill came too early or too late to show anything"
    report = index.add(find_images(archive), tile=tile or None)
    assert report == {"added": expected - kept, "unchanged": kept, "unreadable": {}}
