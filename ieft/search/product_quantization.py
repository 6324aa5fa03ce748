"""Product quantisation: a vector in a few bytes.

A vector is projected on principal components, which are dealt out to as many parts as there are bytes. A byte tells
the nearest of 256 centroids of a part, which are learnt by k-means. Mean, components and centroids are the codebooks.

Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011; on principal components: Ge, He,
Ke, Sun, "Optimized Product Quantization", TPAMI 2014.
"""

import hashlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

CENTROIDS = 256  # of which a byte tells one
MOST_IN_PART = 8  # components; more are of no use to a byte
ITERATIONS = 12  # of k-means
MOST_VECTORS = 2**14  # from which is learnt: 64 for each centroid


class Codebooks:
    """What vectors of W numbers are encoded with, in a byte for each of M parts of K/M components.

    Attributes:
        mean: (W,) float32.
        components: (K, W) float32, orthonormal, those of a part one after the other.
        centroids: (M, CENTROIDS, K/M) float32.
        digest: eight bytes that tell these codebooks from others.
    """

    def __init__(self, mean, components, centroids):
        self.mean, self.components, self.centroids = mean, components, centroids
        self.width, self.bytes_per_vector = len(mean), len(centroids)
        numbers = b"".join(each.contiguous().numpy().tobytes() for each in (mean, components, centroids))
        self.digest = hashlib.sha256(numbers).digest()[:8]  # of no file format, whose details may change

    def __repr__(self):
        return f"Codebooks({self.width} numbers in {self.bytes_per_vector} bytes, {self.digest.hex()})"

    @classmethod
    @torch.no_grad()
    def learn(cls, vectors, bytes_per_vector):
        """Learn codebooks; the same vectors give the same codebooks.

        Equal vectors count once: those of black tiles would take many centroids, and leave few for the others.

        Args:
            vectors: (N, W), of which up to 2^14 are drawn.
            bytes_per_vector: M, from 1 to W/8.

        Raises:
            ValueError: for another size, fewer different vectors than centroids, and numbers that are not finite.
        """
        check_size(vectors.shape[1], bytes_per_vector)
        if not torch.isfinite(vectors).all():
            raise ValueError("Finite numbers expected to learn codebooks from; some are not.")
        vectors = _different(vectors)
        if len(vectors) < CENTROIDS:
            raise ValueError(
                f"At least {CENTROIDS} different vectors expected to learn as many centroids; got {len(vectors)}: "
                "learn from more images, or from some that are not alike."
            )
        drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:MOST_VECTORS]
        vectors = vectors[drawn].double().cpu()
        mean, components = vectors.mean(dim=0), _principal_components(vectors, bytes_per_vector)
        parts = ((vectors - mean) @ components.T).float().chunk(bytes_per_vector, dim=1)  # each (N, K/M)
        return cls(mean.float(), components.float(), torch.stack([_k_means(part.contiguous()) for part in parts]))

    @torch.no_grad()
    def encode(self, vectors):
        """(N, W) -> uint8 (N, M): the number of the centroid of each part."""
        projected = (vectors.float().cpu() - self.mean) @ self.components.T  # (N, K)
        parts = projected.unflatten(1, (self.bytes_per_vector, -1)).transpose(0, 1)  # (M, N, K/M)
        return _nearest(parts, self.centroids).T.to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes):
        """uint8 (N, M) -> the vectors that the centroids stand for, (N, W) float32."""
        rows = codes + torch.arange(self.bytes_per_vector) * CENTROIDS  # (N, M)
        projected = self.centroids.flatten(0, 1).index_select(0, rows.flatten()).view(len(codes), -1)  # (N, K)
        return torch.addmm(self.mean, projected, self.components)

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
    if not 0 < bytes_per_vector <= width // 8:
        raise ValueError(
            f"Product quantisation of {width} numbers takes from 1 to {width // 8} bytes; got {bytes_per_vector}."
        )


def _different(vectors):
    """The rows of (N, W) without repetitions, in their order."""
    rows = vectors.detach().float().cpu().numpy()
    first = {}
    for place, row in enumerate(rows):
        first.setdefault(hashlib.blake2b(row, digest_size=16).digest(), place)
    return vectors[list(first.values())]


def _principal_components(vectors, num_parts):
    """Up to a quarter of those of (N, W), (K, W), of the largest variance, dealt out to the parts in turn.

    The others would add little, and decoding takes longer the more there are.
    """
    in_part = min(MOST_IN_PART, vectors.shape[1] // 4 // num_parts)
    directions = torch.linalg.eigh(torch.cov(vectors.T))[1].T.flip(0)[: num_parts * in_part]  # (K, W)
    return directions.view(in_part, num_parts, -1).transpose(0, 1).flatten(0, 1)


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
    """The numbers (..., N) of the centroids (..., CENTROIDS, K/M) nearest to vectors (..., N, K/M)."""
    lengths = centroids.square().sum(dim=-1)[..., None, :]
    return (lengths - 2 * vectors @ centroids.mT).argmin(dim=-1)
