"""Queries that combine sentences and images, wanted and not wanted, and the search for one or many of them.

A query is a weighted sum of its parts in both stages. First stage: the unit vector of the sum of the parts' embeddings
with their weights, unwanted ones negative, finds the nearest images. Second stage: the weighted mean of the parts'
scores, unwanted ones negative. A sentence's score is the network's; the network reads no two images together, so that
an image's score is the similarity of the embeddings as the contrastive loss scales it, which is about as wide.
"""

import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ieft.evaluation.ranking import score_pairs
from ieft.search.archive_files import HitImages, UnreadableHit, read_hit
from ieft.search.feature_cache import decode_state
from ieft.search.filters import is_not_text, write_where
from ieft.search.probability import check_min_probability, is_likely
from ieft.search.tables import KEY, quote

UNWANTED_WEIGHT = 0.25  # by default: with 1, what is wanted goes with it; measured in docs/search.md
FIRST_BLOCK = 32  # hits that are asked for at first; see `in_blocks`
PAIRS_AT_ONCE = 4096  # hits of all queries that are searched together: bounds the memory of features
IMAGES_AT_ONCE = 1024  # of them whose pixels are in memory
EMBEDDED_AT_ONCE = 64
ROWS_AT_ONCE = 100  # rows of the index that one condition names


class Hits(list):
    """Hits as dicts, best first.

    Attributes:
        seconds: the time of each stage: "embed", "shortlist", and "re-rank" if there was one; for queries that were
            searched together, their time divided by their number.
        best_probability: the highest probability that was found, also if `min_probability` keeps no hit; None if no
            hit has one.
    """

    def __init__(self, hits=(), seconds=None, best_probability=None):
        super().__init__(hits)
        self.seconds = {} if seconds is None else seconds
        self.best_probability = best_probability


@dataclass(eq=False)
class Query:
    """Sentences and images that are wanted and not wanted, to be searched by `ImageIndex.search`.

        Query(["storage tanks", image], unwanted=["clouds"], weights=[1, 2, 0.5])
        Query(["storage tanks", hits[3]])  # more like this hit

    Attributes:
        wanted, unwanted: lists of sentences, PIL images, hits (of whose embeddings the index holds, as it was indexed)
            and vectors (E,) as `ImageIndex.embed_images` returns them; or one of these alone.
        weights: a positive number for each of them, wanted ones first; only their ratios count. By default 1 for those
            that are wanted and 0.25 for the others.

    Raises:
        ValueError: for an empty query, parts of another kind, empty sentences and other weights.
    """

    wanted: Any
    unwanted: Any = ()
    weights: Any = None

    def __post_init__(self):
        self.wanted, self.unwanted = _as_list(self.wanted), _as_list(self.unwanted)
        parts = [*self.wanted, *self.unwanted]
        if not parts:
            raise ValueError("A sentence or an image to look for expected; the query is empty.")
        for part in parts:
            _check_part(part)
        if self.weights is None:
            self.weights = [1.0] * len(self.wanted) + [UNWANTED_WEIGHT] * len(self.unwanted)
        self.weights = list(self.weights)
        if len(self.weights) != len(parts):
            raise ValueError(
                f"As many weights as sentences and images expected, wanted ones first: {len(parts)}; got "
                f"{len(self.weights)}."
            )
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
                raise ValueError(f"weights must be positive numbers, also for what is not wanted; got {weight!r}.")

    @property
    def parts(self):
        """Pairs of a part and its share in the score: the weights divided by their sum, negative if unwanted."""
        total = math.fsum(self.weights)
        signs = [1] * len(self.wanted) + [-1] * len(self.unwanted)
        shares = [sign * weight / total for sign, weight in zip(signs, self.weights, strict=True)]
        return list(zip([*self.wanted, *self.unwanted], shares, strict=True))

    @property
    def sentences(self):
        """The sentences that are wanted."""
        return [part for part in self.wanted if isinstance(part, str)]

    @property
    def is_sentence(self):
        """Whether it is one sentence alone, so that a score is the network's own."""
        return len(self.weights) == len(self.sentences) == 1


def _as_list(parts):
    return list(parts) if isinstance(parts, list | tuple) else [parts]


def _check_part(part):
    if isinstance(part, str) and not part.strip():
        raise ValueError("A caption to look for expected; got an empty one.")
    is_vector = isinstance(part, np.ndarray) and part.ndim == 1 and part.dtype.kind == "f"
    is_hit = isinstance(part, Mapping) and set(KEY) <= part.keys() and isinstance(part["file"], str)
    if not (isinstance(part, str | Image) or is_vector or is_hit):
        raise ValueError(
            "A sentence (a caption), a PIL image, a hit (a dict with file, col and row) or a vector of numbers (E,) "
            f"expected; got {str(part)[:100]!r} ({type(part).__name__})."
        )


def search_many(
    index, queries, *, top_k=10, rerank_top_k=32, offset=0, where=None, bbox=None, datetime=None,
    similarity_weight=0.0, min_probability=None,
):  # fmt: skip
    """The hits of each query, in their order: see `ImageIndex.search_many`."""
    check_options(top_k, rerank_top_k, similarity_weight, offset)
    check_min_probability(index, min_probability, rerank_top_k, similarity_weight)
    where = write_where(where, bbox, datetime)
    at_once = max(1, PAIRS_AT_ONCE // max(rerank_top_k, FIRST_BLOCK))
    return _search_in_turn(
        index, queries, at_once, top_k, offset, (rerank_top_k, where, similarity_weight, min_probability)
    )


def _search_in_turn(index, queries, at_once, top_k, offset, options):
    damaged, warned = {}, set()
    for some in cut(queries, at_once):
        pages, skipped = _search_together(index, some, top_k, offset, options, damaged)
        index.warn_of({file: why for file, why in skipped.items() if file not in warned})
        warned.update(skipped)
        yield from pages


def _search_together(index, queries, top_k, offset, options, damaged):
    """A page of hits of each query; the network reads each sentence, and each image for all its sentences, once.

    Args:
        damaged: file that cannot be read -> reason; others are added.

    Returns:
        tuple: a list of `Hits`; the files that were skipped, with reasons.
    """
    seconds, scores, states = {}, {}, {}
    with clock(seconds, "embed"):
        queries = [query if isinstance(query, Query) else Query([query]) for query in queries]
        tokens, vectors = _embed_parts(index, queries)
        searches = [_Search(index, *pair, *options, states) for pair in zip(queries, vectors, strict=True)]
    is_scored = False
    while not is_scored:
        with clock(seconds, "shortlist"):
            for search in searches:
                search.start(damaged)
        with clock(seconds, "re-rank"):
            is_scored = _score(index, searches, tokens, states, scores, damaged)
    with clock(seconds, "re-rank"):
        for search in searches:
            search.re_rank(scores)
    with clock(seconds, "shortlist"):
        pages = [search.page(top_k, offset) for search in searches]
    for search, page in zip(searches, pages, strict=True):
        page.seconds = {name: spent / len(queries) for name, spent in seconds.items()}
        if not search.rerank_top_k:
            del page.seconds["re-rank"]
    return pages, {file: why for search in searches for file, why in search.unusable.items()}


def _embed_parts(index, queries):
    """The token ids of each sentence, {sentence: list}, and the unit vectors of each query's parts, (parts, E)."""
    parts = [part for query in queries for part, _ in query.parts]
    sentences = sorted({part for part in parts if isinstance(part, str)}, key=len)  # little padding
    tokens, of_sentences = {}, {}
    for some in cut(sentences, EMBEDDED_AT_ONCE):
        encoded = index.processor(text=some)
        ids = [row[row_mask.bool()].tolist() for row, row_mask in zip(*_ids_and_mask(encoded), strict=True)]
        tokens |= zip(some, ids, strict=True)
        vectors = index.embed_captions(some) if index.embedder else index.embed_tokens(encoded)
        of_sentences |= zip(some, vectors, strict=True)
    images = [part for part in parts if isinstance(part, Image)]
    hits = [part for part in parts if isinstance(part, Mapping)]
    of_others = dict(zip(map(id, hits), read_vectors(index, hits), strict=True))
    for some in cut({id(image): image for image in images}.values(), EMBEDDED_AT_ONCE):
        of_others |= zip(map(id, some), index.embed_images(some), strict=True)

    def vector_of(part):
        if isinstance(part, np.ndarray):
            return _unit(part, index.dim)
        return of_sentences[part] if isinstance(part, str) else of_others[id(part)]

    return tokens, [np.stack([vector_of(part) for part, _ in query.parts]) for query in queries]


def _ids_and_mask(encoded):
    return encoded["input_ids"], encoded["attention_mask"]


def _unit(vector, size):
    """A vector of a query, scaled to length 1.

    Raises:
        ValueError: for another size, numbers that are not finite, and zeros.
    """
    length = np.linalg.norm(vector)
    if vector.shape != (size,) or not 0 < length < math.inf:
        raise ValueError(
            f"A vector of {size} finite numbers expected, not all 0; got {vector.shape} of length {length}."
        )
    return vector / length


def read_vectors(index, hits):
    """The embeddings of hits as they were indexed, a list of (E,).

    Raises:
        ValueError: for a hit that is not in the index.
    """
    names = [(index.name_of(hit["file"]), int(hit["col"]), int(hit["row"])) for hit in hits]
    found = {}
    for some in cut(dict.fromkeys(name for name in names if not is_not_text(name[0])), ROWS_AT_ONCE):
        condition = " OR ".join(f"(file = {quote(file)} AND col = {col} AND row = {row})" for file, col, row in some)
        rows = index.select(condition, [*KEY, "vector"])
        found |= {place_of(row): np.array(row["vector"], np.float32) for row in rows}
    for hit, (name, col, row) in zip(hits, names, strict=True):
        if (name, col, row) not in found:
            raise ValueError(
                f"{hit['file']} (column {col}, row {row}) is not in the index, or no longer: search again for hits."
            )
    return [found[name] for name in names]


class _Search:
    """One query among those that are searched together.

    Attributes:
        vector: (E,) that the shortlist is near to.
        sentences: pairs of a sentence and its share in the score.
        direction: (E,) whose product with a hit's embedding is added to the sentences' scores; None adds nothing.
        rerank_top_k: hits that are re-ranked; none without a sentence.
        hits: the first ones, best first; those of `rerank_top_k` are re-ranked.
        unusable: file -> why it is skipped; not what other queries found of it, so that the hits are those of a
            search for this query alone.
        states: place -> stored features, of all queries that are searched together.
    """

    def __init__(self, index, query, vectors, rerank_top_k, where, similarity_weight, min_probability, states):
        shares = np.array([share for _, share in query.parts])
        self.index, self.where, self.min_probability = index, where, min_probability
        self.unusable, self.states = {}, states
        if min_probability is not None and not query.is_sentence:
            raise ValueError("min_probability needs one sentence alone: scores of combinations and images have none.")
        self.sentences = [(part, share) for part, share in query.parts if isinstance(part, str)]
        self.rerank_top_k = rerank_top_k if self.sentences else 0
        self.vector = shares @ vectors  # (E,)
        if len(shares) > 1:  # one alone stays as it is, bit for bit
            length = np.linalg.norm(self.vector)
            if length < 1e-6:
                raise ValueError("What is wanted and what is not are the same: nothing is left to look for.")
            self.vector = self.vector / length
        factors = np.array([similarity_weight if isinstance(part, str) else 1.0 for part, _ in query.parts])
        direction = index.similarity_scale() * (factors * shares) @ vectors
        self.direction = direction if self.rerank_top_k and direction.any() else None
        self.has_probability = index.has_probability and query.is_sentence and self.direction is None

    def start(self, damaged):
        """Find the first hits, of which those to re-rank are not among the `damaged` files."""
        first_size = max(self.rerank_top_k, FIRST_BLOCK)
        columns = self.index.columns
        of_first = ["state"] if self.rerank_top_k and self.index.states else []
        of_first += ["vector"] if self.direction is not None else []

        def fetch(size):
            kept = [*columns, *of_first] if size == first_size else columns
            return self.index.find_nearest(self.vector, size, kept, self.where, self.unusable)

        known = True
        while known:
            self.blocks = in_blocks(fetch, first_size, place_of)
            self.hits = next(self.blocks)
            known = {hit["file"] for hit in self.hits[: self.rerank_top_k]} & damaged.keys()
            self.unusable |= {file: damaged[file] for file in known}
        self.states |= {place_of(hit): hit.pop("state") for hit in self.hits if "state" in hit}
        self.vectors = [hit.pop("vector") for hit in self.hits if "vector" in hit]

    def re_rank(self, scores):
        """Order the first hits by their scores.

        Args:
            scores: (place, sentence) -> score of the network.
        """
        first = self.hits[: self.rerank_top_k]
        of_hits = [sum(share * scores[place_of(hit), each] for each, share in self.sentences) for hit in first]
        if self.direction is not None:
            of_hits = np.array(of_hits) + np.array(self.vectors[: len(first)]).reshape(len(first), -1) @ self.direction
        probabilities = self.index.model.probability(torch.tensor(of_hits)) if self.has_probability else None
        self.hits = order(of_hits, self.hits, probabilities)

    def page(self, top_k, offset):
        """`top_k` hits after the first `offset`, without overlaps."""
        best_probability = self.hits[0].get("probability") if self.hits else None
        if self.min_probability is not None:
            self.hits = [hit for hit in self.hits if is_likely(hit, self.min_probability)]
            self.blocks = iter(())  # hits that are not re-ranked have no probability
        found = merge_overlaps(self.hits)
        while len(found) < offset + top_k and (more := next(self.blocks, None)) is not None:
            self.hits += more
            found = merge_overlaps(self.hits)
        return Hits(number(found)[offset : offset + top_k], best_probability=best_probability)


def _score(index, searches, tokens, states, scores, damaged):
    """Score the pairs of hits and sentences that are not in `scores`.

    Returns:
        bool: False if some images cannot be read, which are then added to `damaged`.
    """
    missing = {}  # place -> (hit, sentences)
    for search in searches:
        for hit in search.hits[: search.rerank_top_k]:
            place = place_of(hit)
            for sentence, _ in search.sentences:
                if (place, sentence) not in scores:
                    missing.setdefault(place, (hit, {}))[1][sentence] = True
    columns = {sentence: column for column, sentence in enumerate(tokens)}
    for places in cut(missing, IMAGES_AT_ONCE):
        hits = [missing[place][0] for place in places]
        keys = [(place, sentence) for place in places for sentence in missing[place][1]]
        rows = {place: row for row, place in enumerate(places)}
        pairs = [(rows[place], columns[sentence]) for place, sentence in keys]
        images = (
            _States([states[place] for place in places], index.codebooks)
            if states
            else HitImages(hits, index.processor)
        )
        captions = list(tokens.values())
        try:
            of_pairs = score_pairs(index.model, images, captions, pairs, dtype=index.dtype, progress=False)
        except UnreadableHit as error:
            if isinstance(error.__cause__, ConnectionError):  # others cannot be read either
                raise error.__cause__ from error
            damaged[error.file] = str(error)
            _find_damaged(hits, damaged)
            return False
        scores |= zip(keys, map(float, of_pairs), strict=True)
    return True


class _States:
    """Stored features of hits by row, decoded when they are read."""

    def __init__(self, contents, codebooks):
        self.contents, self.codebooks = contents, codebooks

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, row):
        return decode_state(self.contents[row], self.codebooks)


def _find_damaged(hits, damaged):
    for hit in hits:
        try:
            read_hit(hit)
        except (OSError, ValueError) as error:
            damaged[hit["file"]] = str(error)


def in_blocks(fetch, size, place):
    """Yield hits in blocks, best first, that are the same however many of them are taken, for pages of one list.

    A search by a vector index can find a hit among the nearest 64 that it misses among the nearest 32: what a larger
    search adds follows what a smaller one has found.

    Args:
        fetch: number -> that many hits, or fewer if there are no more.
        size: of the first block; each has twice as many hits as all before.
        place: hit -> what distinguishes it from others.
    """
    seen = set()
    while True:
        found = fetch(size)
        yield [hit for hit in found if place(hit) not in seen]
        if len(found) < size:
            return
        seen.update(map(place, found))
        size *= 2


def cut(items, size):
    """Yield lists of up to `size` items."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def merge_overlaps(hits):
    """Keep only the best of overlapping tiles of a scene: greedy non-maximum suppression.

    Args:
        hits: best first.

    Returns:
        list: the hits that are kept, each with `merged`, the number of hits that it represents, including itself.
    """
    kept, of_files = [], {}
    for hit in hits:
        others = of_files.setdefault(hit["file"], [])
        better = next((other for other in others if _overlap(other, hit)), None)
        if better is None:
            others.append(hit | {"merged": 1})
            kept.append(others[-1])
        else:
            better["merged"] += 1
    return kept


def _overlap(hit, other):
    """Whether two hits of a file show pixels in common."""
    return all(
        hit[start] < other[start] + other[size] and other[start] < hit[start] + hit[size]
        for start, size in (("col", "tile_width"), ("row", "tile_height"))
    )


def check_options(top_k, rerank_top_k=0, similarity_weight=0.0, offset=0):
    for name, value, least in (("top_k", top_k, 1), ("rerank_top_k", rerank_top_k, 0), ("offset", offset, 0)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}; got {value!r}.")
    if not math.isfinite(similarity_weight):
        raise ValueError(f"similarity_weight must be a finite number; got {similarity_weight!r}.")


def place_of(hit):
    """What distinguishes a row of the index from others: its file and the start of its window."""
    return tuple(hit[name] for name in KEY)


def order(scores, nearest, probabilities=None):
    """The hits that have scores, best first, then the others as they stood."""
    first, rest = nearest[: len(scores)], nearest[len(scores) :]
    probabilities = [None] * len(first) if probabilities is None else probabilities.tolist()
    for hit, score, probability in zip(first, scores, probabilities, strict=True):
        hit.update(score=float(score), probability=probability, stage="re-ranked")
    return [*sorted(first, key=lambda hit: -hit["score"]), *rest]


def number(hits):
    """The hits with their `rank` from 1; those of the shortlist with their `stage` and `score`."""
    return [
        {"stage": "shortlist", "score": hit["similarity"], "probability": None, **hit, "rank": rank}
        for rank, hit in enumerate(hits, 1)
    ]


@contextmanager
def clock(seconds, stage):
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
