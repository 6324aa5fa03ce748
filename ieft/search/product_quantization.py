"""Product quantisation: a vector in a few bytes.

Vectors are projected on their principal components, which are dealt out to M parts. In each part the nearest of 256
centroids is subtracted, and of what remains again the nearest of 256 others, so that a part takes two bytes. Mean,
components and centroids, which are learnt by k-means, are the codebooks.

Product quantisation: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011. On
principal components, dealt out evenly: Ge, He, Ke, Sun, "Optimized Product Quantization", TPAMI 2014. In two rounds:
Chen, Guan, Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization", Sensors 2010.
"""

import hashlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.functional import embedding_bag

ROUNDS, CENTROIDS = 2, 256  # a byte tells one of the centroids
MOST_IN_PART = 16  # components; more are of no use to two bytes
ITERATIONS = 12  # of k-means
MOST_VECTORS = 2**14  # from which is learnt: 64 for each centroid


class Codebooks:
    """What vectors of D numbers are encoded with, in two bytes for each of M parts of K/M components.

    Attributes:
        mean: (D,) float32.
        components: (K, D) float32, orthonormal, those of a part one after the other.
        centroids: (ROUNDS, M, CENTROIDS, K/M) float32.
        digest: eight bytes that tell these codebooks from others.
    """

    def __init__(self, mean, components, centroids):
        self.mean, self.components, self.centroids = mean, components, centroids
        self.width = len(mean)  # D
        self.bytes_per_vector = ROUNDS * centroids.shape[1]
        self.digest = hashlib.sha256(self.to_bytes()).digest()[:8]

    def __repr__(self):
        return f"Codebooks({self.width} numbers in {self.bytes_per_vector} bytes, {self.digest.hex()})"

    @classmethod
    @torch.no_grad()
    def learn(cls, vectors, bytes_per_vector):
        """Learn codebooks; the same vectors give the same codebooks.

        Args:
            vectors: (N, D), of which up to 2^14 are drawn.
            bytes_per_vector: an even number up to D/4.

        Raises:
            ValueError: for another size, and fewer vectors than centroids.
        """
        check_size(vectors.shape[1], bytes_per_vector)
        if len(vectors) < CENTROIDS:
            raise ValueError(f"At least {CENTROIDS} vectors expected to learn as many centroids; got {len(vectors)}.")
        drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:MOST_VECTORS]
        vectors = vectors[drawn].double().cpu()
        mean, components = vectors.mean(dim=0), _principal_components(vectors, bytes_per_vector // ROUNDS)
        parts = ((vectors - mean) @ components.T).float().chunk(bytes_per_vector // ROUNDS, dim=1)  # each (N, K/M)
        learnt = zip(*map(_learn_part, parts), strict=True)
        return cls(mean.float(), components.float(), torch.stack([torch.stack(of_round) for of_round in learnt]))

    @torch.no_grad()
    def encode(self, vectors):
        """(N, D) -> uint8 (N, 2M): the numbers of a part's two centroids, part after part."""
        rest = (vectors.float().cpu() - self.mean) @ self.components.T  # (N, K)
        rest = rest.unflatten(1, (self.centroids.shape[1], -1)).transpose(0, 1)  # (M, N, K/M)
        codes = []
        for centroids in self.centroids:
            nearest = _nearest(rest, centroids)  # (M, N)
            rest = rest - centroids.take_along_dim(nearest[:, :, None], dim=1)
            codes.append(nearest.T)
        return torch.stack(codes, dim=2).flatten(1).to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes):
        """uint8 (N, 2M) -> the vectors that the centroids stand for, (N, D) float32."""
        rows = torch.arange(self.bytes_per_vector).view(ROUNDS, -1).T.flatten() * CENTROIDS + codes  # (N, 2M)
        sums = embedding_bag(rows.view(-1, ROUNDS), self.centroids.flatten(0, 2), mode="sum")  # (N * M, K/M)
        return torch.addmm(self.mean, sums.view(len(codes), -1), self.components)

    def to_bytes(self):
        """The codebooks in the format of safetensors."""
        return save({"mean": self.mean, "components": self.components, "centroids": self.centroids})

    @classmethod
    def from_bytes(cls, content):
        """The codebooks that `to_bytes` gave.

        Raises:
            ValueError: for other bytes.
        """
        try:
            return cls(**load(content))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"Codebooks in the format of safetensors expected: {error}") from error


def check_size(width, bytes_per_vector):
    """Check that vectors of `width` numbers can be encoded in so many bytes.

    Raises:
        ValueError: if not.
    """
    if not 0 < bytes_per_vector <= width // 4 or bytes_per_vector % ROUNDS:
        raise ValueError(
            f"Product quantisation takes an even number of bytes for a token, up to {width // 4}, a quarter of its "
            f"{width} numbers; got {bytes_per_vector}."
        )


def _principal_components(vectors, num_parts):
    """Up to half of those of (N, D), (K, D), of the largest variance, dealt out to the parts in turn.

    The other half would add little, and decoding takes longer the more there are.
    """
    in_part = min(MOST_IN_PART, vectors.shape[1] // 2 // num_parts)
    directions = torch.linalg.eigh(torch.cov(vectors.T))[1].T.flip(0)[: num_parts * in_part]  # (K, D)
    return directions.view(in_part, num_parts, -1).transpose(0, 1).flatten(0, 1)


def _learn_part(vectors):
    """The centroids of each round, (CENTROIDS, K/M), of one part (N, K/M) of the vectors."""
    rounds = []
    for _ in range(ROUNDS):
        centroids = _k_means(vectors)
        vectors = vectors - centroids[_nearest(vectors, centroids)]
        rounds.append(centroids)
    return rounds


def _k_means(vectors):
    """Centroids of (N, K/M), at first the first vectors; those that no vector is near to stay where they are."""
    centroids = vectors[:CENTROIDS].clone()
    for _ in range(ITERATIONS):
        nearest = _nearest(vectors, centroids)
        counts = torch.bincount(nearest, minlength=CENTROIDS)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def _nearest(vectors, centroids):
    """The numbers (..., N) of the centroids (..., CENTROIDS, D) nearest to vectors (..., N, D)."""
    lengths = centroids.square().sum(dim=-1)[..., None, :]
    return (lengths - 2 * vectors @ centroids.mT).argmin(dim=-1)
