"""A sampler that orders training captions so that lexically similar ones share a batch as hard negatives.

Similarity is lexical, so that it need not be recomputed as the network learns and a resumed run has the same order.
Hard-negative batches: Yuksekgonul et al., "When and Why Vision-Language Models Behave like Bags-of-Words", ICLR 2023.
"""

import numpy as np
from torch.utils.data import Sampler

GROUP = 8  # similar captions in a row; a batch holds several groups


class HardNegativeSampler(Sampler):
    """Samples row numbers of `items` (`ieft.training.items.TrainingItems`) by its seed and current epoch."""

    def __init__(self, items, *, group=GROUP):
        self.items = items
        self.group = group
        self.postings, self.idf, self.norms = weigh_words(items.caption_tokens)

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
        similarity = np.zeros(len(self.items), dtype=np.float32)
        for token in set(self.items.caption_tokens[anchor]):
            rows = self.postings[token]
            similarity[rows] += self.idf[token] ** 2 / self.norms[rows]
        image = self.items.caption_image[anchor]
        right = np.isin(self.items.caption_text_id, self.items.image_text_ids[image])
        similarity[~free | right] = -1.0
        nearest = np.argpartition(-similarity, min(self.group, len(similarity)) - 1)[: self.group - 1]
        nearest = nearest[similarity[nearest] >= 0]
        return nearest[np.argsort(-similarity[nearest], kind="stable")]


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
