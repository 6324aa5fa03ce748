"""Tests of queries that combine sentences and images, of many queries at once, and of pages of hits."""

import csv
import json
import os
import shutil
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

from test_index import (  # noqa: E402, F401
    CAPTIONS,
    NUM_IMAGES,
    add_vectors,
    archive,
    checkpoint,
    draw_vectors,
    index,
    joined_late,
    loaded,
    scene,
)
from test_search import run  # noqa: E402, F401

from ieft.data.images import read_image  # noqa: E402
from ieft.search import index as index_module  # noqa: E402
from ieft.search.archive_files import find_images, read_hit  # noqa: E402
from ieft.search.index import ImageIndex  # noqa: E402
from ieft.search.queries import Query  # noqa: E402
from ieft.search.query_files import read_questions  # noqa: E402

OPENED = Counter()
sys.addaudithook(lambda event, args: OPENED.update([str(args[0])] if event == "open" else []))


def unit(vector):
    return vector / np.linalg.norm(vector)


def plain_search(index, parts, similarity_weight, rerank_top_k):  # noqa: F811
    """Both stages computed plainly, from pairs of a sentence or PIL image and its weight, negative if unwanted.

    Returns:
        list of (file, score) of all images, best first.
    """
    rows = index.rows(columns=["file", "vector"])
    vectors = {row["file"]: np.array(row["vector"]) for row in rows}
    total, scale = sum(abs(weight) for _, weight in parts), index.model.similarity_scale().item()
    of_parts = [index.embed_caption(p) if isinstance(p, str) else index.embed_images([p])[0] for p, _ in parts]
    wanted = unit(sum(weight * vector for (_, weight), vector in zip(parts, of_parts, strict=True)))
    nearest = sorted(vectors, key=lambda file: -vectors[file] @ wanted)
    scores = dict.fromkeys(nearest[:rerank_top_k], 0.0)
    for (part, weight), of_part in zip(parts, of_parts, strict=True):
        matching = {}
        if isinstance(part, str):
            ranked = index.model.rank(part, list(scores), processor=index.processor)
            matching = {hit["image"]: hit["score"] for hit in ranked}
        for file in scores:
            similar = scale * (vectors[file] @ of_part)
            score = matching[file] + similarity_weight * similar if matching else similar
            scores[file] += weight / total * score
    first = sorted(scores.items(), key=lambda pair: -pair[1])
    return first + [(file, vectors[file] @ wanted) for file in nearest[rerank_top_k:]]


@pytest.mark.parametrize("similarity_weight", [0, 0.5])
def test_a_combination_is_scored_as_by_a_plain_computation(index, archive, similarity_weight):  # noqa: F811
    image, other = (read_image(find_images(archive)[number]) for number in (3, 8))
    query = Query([CAPTIONS[0], image, CAPTIONS[1]], unwanted=[CAPTIONS[2], other], weights=[1, 2, 1.5, 0.5, 0.25])
    options = {"similarity_weight": similarity_weight, "rerank_top_k": 9}
    hits = index.search(query, top_k=NUM_IMAGES, **options)
    parts = [(CAPTIONS[0], 1), (image, 2), (CAPTIONS[1], 1.5), (CAPTIONS[2], -0.5), (other, -0.25)]
    expected = plain_search(index, parts, **options)
    assert [hit["file"] for hit in hits] == [file for file, _ in expected]
    np.testing.assert_allclose([hit["score"] for hit in hits], [score for _, score in expected], atol=1e-4)
    assert [hit["stage"] for hit in hits] == ["re-ranked"] * 9 + ["shortlist"] * (NUM_IMAGES - 9)
    assert "vector" not in hits[0]
    plain = [(file, score) for file, score in plain_search(index, parts[:1], 0, 9)]
    assert [file for file, _ in plain] != [file for file, _ in expected]  # the other parts change the order


def test_a_part_alone_is_a_plain_search_and_only_the_ratios_of_weights_count(index, archive):  # noqa: F811
    image = read_image(find_images(archive)[3])
    assert index.search(Query([CAPTIONS[0]], weights=[7])) == index.search(CAPTIONS[0])
    assert index.search(Query(image)) == index.search_image(image)
    query, larger = (Query([CAPTIONS[0], image], weights=weights) for weights in ([1, 2], [10, 20]))
    first, second = index.search(query), index.search(larger)
    assert [hit["file"] for hit in first] == [hit["file"] for hit in second]
    np.testing.assert_allclose([hit["score"] for hit in first], [hit["score"] for hit in second], atol=1e-5)
    least = index.search(Query([], unwanted=[CAPTIONS[0]]), top_k=NUM_IMAGES, rerank_top_k=NUM_IMAGES)
    most = index.search(CAPTIONS[0], top_k=NUM_IMAGES, rerank_top_k=NUM_IMAGES)
    assert [hit["file"] for hit in least] == [hit["file"] for hit in reversed(most)]


def test_without_a_sentence_nothing_is_re_ranked(index, archive):  # noqa: F811
    images = [read_image(file) for file in find_images(archive)[:2]]
    hits = index.search(Query(images))
    assert {hit["stage"] for hit in hits} == {"shortlist"} and set(hits.seconds) == {"embed", "shortlist"}
    wanted = unit(index.embed_images(images).sum(axis=0))
    assert [hit["file"] for hit in hits] == [hit["file"] for hit in index.search(Query([wanted]))]
    assert hits[0]["score"] == pytest.approx(float(index.embed_images([read_hit(hits[0])])[0] @ wanted), abs=1e-5)


def test_more_like_a_hit_and_not_like_it(index, scene, tmp_path):  # noqa: F811
    index.add([scene], tile=32)
    tile = next(hit for hit in index.search(CAPTIONS[0], top_k=50) if hit["tiling"])
    picture = read_hit(tile)
    scene.rename(tmp_path / "away.tif")  # the embedding is in the index: no file is read
    where = "tiling = ''"
    for by_hit, by_image in (
        (Query([CAPTIONS[1], tile]), Query([CAPTIONS[1], picture])),
        (Query([CAPTIONS[1]], unwanted=[tile]), Query([CAPTIONS[1]], unwanted=[picture])),
    ):
        hits, expected = (index.search(query, where=where, top_k=20) for query in (by_hit, by_image))
        assert [hit["file"] for hit in hits] == [hit["file"] for hit in expected]
        np.testing.assert_allclose([hit["score"] for hit in hits], [hit["score"] for hit in expected], atol=1e-4)
    index.delete([scene])
    with pytest.raises(ValueError, match="scene.tif .column .* is not in the index"):
        index.search(Query([tile]))


def test_features_that_are_stored_re_rank_a_combination_as_files_do(tmp_path, archive, joined_late):  # noqa: F811
    found = []
    for states in (None, "bf16"):
        options = {"processor": joined_late[1], "create": True, "states": states}
        index = ImageIndex(tmp_path / f"index {states}", joined_late[0], **options)  # noqa: F811
        index.add(find_images(archive))
        image = read_image(find_images(archive)[5])
        found.append(list(index.search_many([Query([CAPTIONS[0], image]), CAPTIONS[1]], top_k=NUM_IMAGES)))
    for hits, expected in zip(*found, strict=True):
        expected = {hit["file"]: hit["score"] for hit in expected}
        scores = [expected[hit["file"]] for hit in hits]
        np.testing.assert_allclose([hit["score"] for hit in hits], scores, atol=0.02)
        assert np.ptp(scores) > 0.1 and not {"state", "vector"} & hits[0].keys()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Query([]), "the query is empty"),
        (lambda: Query(["a", " "]), "got an empty one"),
        (lambda: Query(["a"], unwanted=[5]), "A sentence .* expected; got '5'"),
        (lambda: Query(["a", ["b"]]), "A sentence .* expected"),
        (lambda: Query([{"file": "a.png"}]), "file, col and row"),
        (lambda: Query(["a"], unwanted="b", weights=[1]), "wanted ones first: 2; got 1"),
        (lambda: Query(["a"], weights=[0]), "positive numbers.*got 0"),
        (lambda: Query(["a", "b"], weights=[1, float("nan")]), "positive numbers.*got nan"),
        (lambda: Query(["a"], weights=["1"]), "positive numbers.*got '1'"),
    ],
)
def test_what_no_query_can_be_made_of(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_queries_that_say_nothing_about_this_index(index):  # noqa: F811
    with pytest.raises(ValueError, match="nothing is left to look for"):
        index.search(Query(CAPTIONS[0], unwanted=CAPTIONS[0], weights=[1, 1]))
    for vector in (np.ones(3), np.zeros(8), np.full(8, np.nan)):
        with pytest.raises(ValueError, match="A vector of 8 finite numbers"):
            index.search(Query([vector]))
    with pytest.raises(ValueError, match="offset must be"):
        index.search_many([CAPTIONS[0]], offset=-1)  # at once, not at the first hit


# Many at once --------------------------------------------------------------------------------------------------------


def test_many_at_once_find_what_each_finds_alone_and_read_an_image_once(index, archive, monkeypatch):  # noqa: F811
    images = [read_image(file) for file in find_images(archive)[:3]]
    words = ["red ships", "a green beach", "many", "houses beside houses", "grey river ."]
    queries = [*CAPTIONS, *words, Query([CAPTIONS[1], images[0]]), Query(images[1:]), CAPTIONS[0]]
    queries += [Query(["red ships"], unwanted=["houses ."])]
    options = {"top_k": 10, "rerank_top_k": 8, "where": "width >= 32", "similarity_weight": 0.5}
    alone = [index.search(query, **options) for query in queries]
    OPENED.clear()
    index.search(queries[0], **options)
    of_one = max(OPENED[str(file.resolve())] for file in find_images(archive))
    OPENED.clear()
    together = list(index.search_many(queries, **options))
    assert {OPENED[str(file.resolve())] for file in find_images(archive)} <= {0, of_one}
    monkeypatch.setattr("ieft.search.queries.PAIRS_AT_ONCE", 96)  # three queries at once
    monkeypatch.setattr("ieft.search.queries.IMAGES_AT_ONCE", 5)
    for found in (together, list(index.search_many(iter(queries), **options))):
        assert [[hit["file"] for hit in hits] for hits in found] == [[hit["file"] for hit in hits] for hits in alone]
        for hits, expected in zip(found, alone, strict=True):
            np.testing.assert_allclose([h["score"] for h in hits], [h["score"] for h in expected], atol=1e-5)
    assert list(index.search_many([])) == []


def test_files_that_are_gone_or_damaged_are_skipped_for_all_queries(index, archive, caplog):  # noqa: F811
    nearest = [hit["file"] for hit in index.search(CAPTIONS[0], top_k=6, rerank_top_k=6)]
    os.unlink(nearest[0])
    with open(nearest[1], "wb") as file:
        file.write(b"no image any more")
    options = {"top_k": NUM_IMAGES, "rerank_top_k": 6}
    found = list(index.search_many([*CAPTIONS, *CAPTIONS], **options))
    assert len(caplog.records) == 1 and "2 files of the index are skipped" in caplog.text
    for caption, hits in zip([*CAPTIONS, *CAPTIONS], found, strict=True):
        assert nearest[0] not in {hit["file"] for hit in hits}
        expected = index.search(caption, **options)
        assert [hit["file"] for hit in hits] == [hit["file"] for hit in expected]
    assert not set(nearest[:2]) & {hit["file"] for hit in found[0]}


# Pages ---------------------------------------------------------------------------------------------------------------


def test_pages_are_parts_of_one_list(index, scene, archive):  # noqa: F811
    index.add([scene], tile=32)
    index.add_captions([f"{caption} {number}" for caption in CAPTIONS for number in range(20)])
    image = read_image(find_images(archive)[3])
    for search, query in (
        (index.search, CAPTIONS[0]),
        (index.search, Query([CAPTIONS[1], image])),
        (index.search_captions, image),
    ):
        whole = search(query, top_k=100, rerank_top_k=8)
        pages = [search(query, top_k=15, offset=offset, rerank_top_k=8) for offset in range(0, 75, 15)]
        parts = [hit | {"merged": None} for page in pages for hit in page]  # a page counts those it has looked at
        assert parts == [hit | {"merged": None} for hit in whole]
        assert [hit["rank"] for hit in parts] == list(range(1, len(whole) + 1)) and len(whole) > 24
    assert index.search_image(image, top_k=5, offset=5) == index.search_image(image, top_k=10)[5:]
    assert index.search(CAPTIONS[0], offset=1000) == []


def test_pages_by_a_vector_index_are_parts_of_one_list(index, monkeypatch):  # noqa: F811
    """A larger search by a vector index finds hits among the nearest that a smaller one has missed."""
    monkeypatch.setattr(index_module, "FEWEST_FOR_VECTOR_INDEX", 1000)
    monkeypatch.setattr(index_module, "REFINE", 1)  # misses more
    draw = np.random.default_rng(0)
    add_vectors(index, 0.02 * draw_vectors(3000, draw) + draw_vectors(1, draw), 0)  # closer than a byte can tell
    index.optimize()
    query = Query([draw_vectors(1, draw)[0]])
    whole = [hit["file"] for hit in index.search(query, top_k=300)]
    pages = [hit["file"] for offset in range(0, 300, 20) for hit in index.search(query, top_k=20, offset=offset)]
    assert pages == whole and len(set(whole)) == 300
    vector = query.wanted[0]
    assert [hit["file"] for hit in index.shortlist(vector, 32)] != [h["file"] for h in index.shortlist(vector, 300)][
        :32
    ]


# The command ---------------------------------------------------------------------------------------------------------


def hits_of(run, *arguments):  # noqa: F811
    return json.loads(run("query", *arguments, "--json")[1].out)


def test_a_combination_is_asked_for_by_options(run, archive, tmp_path, loaded):  # noqa: F811
    run("index", archive / "deep")
    outside, inside = archive / "it's 04.png", archive / "deep" / "it's 03.png"
    arguments = (CAPTIONS[0], "--with", CAPTIONS[1], "--like", outside, "--without", CAPTIONS[2], "--unlike", inside)
    hits = hits_of(run, *arguments, "--weights", "1,0.5,2, 0.25 0.5", "--top_k", 4)
    index = ImageIndex(tmp_path / "index", loaded[0], processor=loaded[1])  # noqa: F811
    images = [read_image(file) for file in (outside, inside)]
    query = Query([*CAPTIONS[:2], images[0]], [CAPTIONS[2], images[1]], [1, 0.5, 2, 0.25, 0.5])
    expected = index.search(query, top_k=4)
    assert [hit["file"] for hit in hits] == [hit["file"] for hit in expected]
    np.testing.assert_allclose([hit["score"] for hit in hits], [hit["score"] for hit in expected], atol=1e-4)
    second = hits_of(run, *arguments, "--weights", "1,0.5,2,0.25,0.5", "--top_k", 2, "--offset", 2)
    assert [(hit["file"], hit["rank"]) for hit in second] == [(hit["file"], hit["rank"]) for hit in hits[2:]]
    inside.rename(tmp_path / "away.png")  # its embedding is in the index
    hits = hits_of(run, "--like", inside)
    assert [hit["file"] for hit in hits] == [hit["file"] for hit in index.search(Query(images[1]))]
    shutil.copy(outside, inside)  # another image by this name, whose embedding is not in the index
    with_new, expected = hits_of(run, "--like", inside), index.search(Query(images[0]))
    np.testing.assert_allclose(
        [hit["similarity"] for hit in with_new], [hit["similarity"] for hit in expected], atol=1e-4
    )
    pages = [json.loads(run("query", "--image", outside, "--json", "--offset", first)[1].out) for first in (0, 3)]
    assert [hit["file"] for hit in pages[0]["images"][3:]] == [hit["file"] for hit in pages[1]["images"]][:7]


def test_a_tile_is_named_as_the_table_names_it(run, scene):  # noqa: F811
    run("index", scene, "--tile", 32)
    line = run("query", CAPTIONS[0], "--top_k", 2)[1].out.splitlines()[2]
    name = line[line.index(str(scene)) :]
    assert "[" in name and hits_of(run, "--like", name)[0]["similarity"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(SystemExit, match=r"as 12 tiles: name one of them, such as '.*scene.tif \[0 0 32 32\]'"):
        run("query", "--like", scene)
    with pytest.raises(SystemExit, match="as 12 tiles: name one"):
        run("query", "--like", f"{scene} [1 0 32 32]")
    with pytest.raises(SystemExit, match="not in the index, of which a tile is named"):
        run("query", "--like", "other.tif [0 0 32 32]")
    os.utime(scene, (0, 0))  # the same content
    assert hits_of(run, "--like", name)[0]["similarity"] == pytest.approx(1, abs=1e-5)
    scene.write_bytes(scene.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="scene.tif has changed since it was indexed: index it again"):
        run("query", "--like", name)


def read_output(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_queries_gives_a_file_of_hits(run, archive, tmp_path):  # noqa: F811
    run("index", archive)
    expected = [hits_of(run, caption, "--top_k", 3, "--offset", 1) for caption in CAPTIONS]
    expected.append(hits_of(run, CAPTIONS[0], "--like", archive / "it's 02.png", "--without", "river", "--top_k", 3,
                            "--offset", 1, "--weights", "1,2,0.5"))  # fmt: skip
    texts = tmp_path / "questions.txt"
    texts.write_text("\r\n".join([CAPTIONS[0], "", *CAPTIONS[1:]]), encoding="utf-16")
    combined = {"text": [CAPTIONS[0]], "like": "archive/it's 02.png", "without": "river", "weights": [1, 2, 0.5]}
    lines = [*({"id": number, "text": caption} for number, caption in enumerate(CAPTIONS)), combined]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    rows = [
        ["ID", "text", "like", "without", "weights"],
        *([name, text] for name, text in zip("xyz", CAPTIONS, strict=True)),
    ]
    with open(tmp_path / "questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([*rows, ["", CAPTIONS[0], '["archive/it\'s 02.png"]', "river", "1,2,0.5"]])
    for kind, ids, output in (("txt", "134", "csv"), ("csv", "xyz5", "jsonl"), ("jsonl", "0124", "parquet")):
        output = tmp_path / f"hits.{output}"
        arguments = ("query", "--queries", tmp_path / f"questions.{kind}", "--output", output)
        code, printed = run(*arguments, "--top_k", 3, "--offset", 1)
        assert code == 0 and printed.out.startswith(f"{len(ids)} queries, {3 * len(ids)} hits in ")
        hits = read_output(output)
        assert [hit["id"] for hit in hits] == [name for name in ids for _ in range(3)]
        wanted = [hit for of_query in expected[: len(ids)] for hit in of_query]
        assert [hit["file"] for hit in hits] == [hit["file"] for hit in wanted]
        assert [int(hit["rank"]) for hit in hits] == [hit["rank"] for hit in wanted]
        np.testing.assert_allclose([float(h["score"]) for h in hits], [h["score"] for h in wanted], atol=1e-4)
    assert hits[-1]["query"] == f"{CAPTIONS[0]}; like {archive}/it's 02.png; without river"
    assert sorted(path.name for path in tmp_path.glob("*hits*")) == ["hits.csv", "hits.jsonl", "hits.parquet"]
    run("query", CAPTIONS[0], "--output", output, "--overwrite", "--top_k", 3, "--offset", 1)
    assert [hit["file"] for hit in read_output(output)] == [hit["file"] for hit in expected[0]]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "\n \n", "holds no queries"),
        ("a.csv", "text\n", "holds no queries"),
        ("a.json", '[{"text": "a river"}]', r"is \.txt, .*\.csv, \.tsv or \.jsonl; got"),
        ("a.tsv", "text\tweights\na river\t-1\n", "line 2: weights must be positive"),
        ("a.csv", "a river\na beach\n", r"the columns id, text, .*got a river.*named \.txt"),
        ("a.csv", "text,weights\na river,1\na,x\n", "1 of 2 queries .*\n  line 3: weights must be numbers.*'x'"),
        ("a.csv", 'text,without\n"a\nriver",\na,b\n,\n"[""b"" x]",c\n', "line 6: a list that cannot be read"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n{"text": 5}', "2 of 3 .*\n  line 3: an object .*\n  line 4: text must be"),
        ("a.jsonl", '{"txt": "a"}', "line 1: the names id, text, .*got txt"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "line 2: the id '1' stands in line 1 too"),
        ("a.jsonl", '{"id": 1}', "line 1: A sentence or an image .*empty"),
        ("a.jsonl", '{"text": "a", "weights": [1, 2]}', "line 1: As many weights .*: 1; got 2"),
        ("a.jsonl", '{"text": "a", "weights": -1}', "line 1: weights must be positive"),
        ("a.jsonl", '{"text": "a", "weights": [true]}', "line 1: weights must be numbers"),
    ],
)
def test_lines_that_are_no_queries_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_questions(tmp_path / name)


def test_weights_in_a_cell_are_a_list_too(tmp_path):
    (tmp_path / "a.csv").write_text('text,without,weights\na river,trees,"[1, 0.5]"\n"[""a"", ""b""]",,"2,1"\n')
    assert [question.weights for question in read_questions(tmp_path / "a.csv")] == [[1, 0.5], [2, 1]]


def test_what_the_command_cannot_do_is_said_and_no_file_is_lost(run, archive, tmp_path):  # noqa: F811
    run("index", archive)
    queries, output = tmp_path / "queries.jsonl", tmp_path / "hits.csv"
    queries.write_text('{"text": "a river"}\n{"like": "none.png"}\n{"unlike": "none.png", "text": "a"}')
    output.write_text("mine")
    (tmp_path / "few.txt").write_text("a river")
    for arguments, message in (
        (("--queries", queries, "--output", output), "hits.csv exists already: pass --overwrite"),
        (("--queries", queries, "--output", output, "--overwrite"), r"(?s)2 of 3 .*line 2: .*none.png.*line 3: "),
        (("--queries", queries), "needs --output FILE"),
        (("--queries", queries, "--output", queries, "--overwrite"), "would replace the queries"),
        (("a", "--queries", queries, "--output", tmp_path / "new.csv"), "takes all queries from its file"),
        (("a", "--output", tmp_path / "hits.xls"), r"\.csv, \.jsonl, \.parquet.*got .*hits.xls"),
        (("a", "--image", archive / "it's 00.png"), "use --like instead of --image"),
        (("a", "--weights", "1,2"), "As many weights"),
        (("a", "--with", "b", "--explain", tmp_path / "why"), "explains one sentence"),
        (("--like", tmp_path / "none.png"), "none.png"),
        (("a", "--offset", "-1"), "offset must be"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("query", *arguments)
    assert output.read_text() == "mine" and not list(tmp_path.glob(".hits*"))
    code, printed = run(
        "query", "--queries", tmp_path / "few.txt", "--output", tmp_path / "b.csv", "--where", "width < 0"
    )
    assert code == 0 and "1 without a hit: 1\n" in printed.err and read_output(tmp_path / "b.csv") == []
