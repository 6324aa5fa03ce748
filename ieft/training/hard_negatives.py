"""A sampler that orders training captions so that similar ones share a batch as hard negatives.

Similarity is lexical, or that of an embedder, whose shortlists the network is to re-rank. Neither is recomputed as the
network learns, so that a resumed run has the same order. Hard-negative batches: Yuksekgonul et al., "When and Why
Vision-Language Models Behave like Bags-of-Words", ICLR 2023.
"""

import numpy as np
import torch
from torch.utils.data import Sampler

from ieft.training.distributed import process_count, process_rank, sum_over_processes

GROUP = 8  # similar captions in a row; a batch holds several groups
WHOLE = 2048  # of a length of 1: the sum of two products of such vectors stays below 2^24


class HardNegativeSampler(Sampler):
    """Samples row numbers of `items` (`ieft.training.items.TrainingItems`) by its seed and current epoch.

    Args:
        similarity: row -> (C,) its similarity to all captions; None takes that of their words.
    """

    def __init__(self, items, *, group=GROUP, similarity=None):
        self.items = items
        self.group = group
        self.similarity = similarity or LexicalSimilarity(items)

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        items = self.items
        generator = np.random.default_rng([items.seed, items.epoch, 1])
        free = np.ones(len(items), dtype=bool)
        for anchor in generator.permutation(len(items)):
            if free[anchor]:
                free[anchor] = False
                neighbours = self.find_neighbours(anchor, free)
                free[neighbours] = False
                yield from [int(anchor), *neighbours.tolist()]

    def find_neighbours(self, anchor, free):
        """Up to `group` - 1 of the free captions that are most similar to one, the most similar first.

        Captions of the same image, and sentences that the image also carries, are excluded: they are no negatives.
        """
        similarity = self.similarity(anchor)
        image = self.items.caption_image[anchor]
        right = np.isin(self.items.caption_text_id, self.items.image_text_ids[image])
        similarity[~free | right] = -np.inf
        nearest = np.argpartition(-similarity, min(self.group, len(similarity)) - 1)[: self.group - 1]
        nearest = nearest[np.isfinite(similarity[nearest])]
        return nearest[np.argsort(-similarity[nearest], kind="stable")]


class LexicalSimilarity:
    """Cosine similarity of captions by their words with binary TF-IDF weights, but for the norm of the first one."""

    def __init__(self, items):
        self.caption_tokens = items.caption_tokens
        self.postings, self.idf, self.norms = weigh_words(items.caption_tokens)

    def __call__(self, anchor):
        similarity = np.zeros(len(self.caption_tokens), dtype=np.float32)
        for token in set(self.caption_tokens[anchor]):
            rows = self.postings[token]
            similarity[rows] += self.idf[token] ** 2 / self.norms[rows]
        return similarity


class EmbeddedSimilarity:
    """How much an embedder confuses two items: the similarity of the image of each to the caption of the other, added.

    Embeddings are rounded to whole numbers, so that every sum of their products is exact in float32: the order of a
    run is the same on every processor and for any number of processes.
    """

    def __init__(self, items, embedder):
        rows = range(process_rank(), len(items.images), process_count())
        images = embedder.embed_images(map(items.images.image, rows), count=len(rows), progress=not process_rank())
        captions = range(process_rank(), len(items.captions), process_count())
        texts = embedder.embed_captions([items.captions[row] for row in captions])
        self.images = _share(images, rows, len(items.images), embedder.device)
        self.captions = _share(texts, captions, len(items.captions), embedder.device)
        self.caption_image = items.caption_image

    def __call__(self, anchor):
        of_captions = self.captions @ self.images[self.caption_image[anchor]]  # (C,)
        of_images = self.images @ self.captions[anchor]  # (I,)
        return of_captions + of_images[self.caption_image]


def _share(vectors, rows, count, device):
    """The rounded unit vectors of all processes, each of which has some rows: (count, E) float32."""
    everyones = torch.zeros(count, vectors.shape[1])
    everyones[list(rows)] = torch.from_numpy(vectors * WHOLE).round()
    return sum_over_processes(everyones.to(device)).cpu().numpy()


def weigh_words(captions):
    """Binary TF-IDF weights for the cosine similarity of captions.

    Returns:
        token -> (N,) rows of the captions that contain it; token -> log(captions / captions that contain it); (C,)
        norms.
    """
    postings = {}
    for row, tokens in enumerate(captions):
        for token in set(tokens):
            postings.setdefault(token, []).append(row)
    postings = {token: np.array(rows) for token, rows in postings.items()}
    idf = {token: float(np.log(len(captions) / len(rows))) for token, rows in postings.items()}
    squares = np.zeros(len(captions), dtype=np.float32)
    for token, rows in postings.items():
        squares[rows] += idf[token] ** 2
    return postings, idf, np.sqrt(squares).clip(min=1e-6)
