"""Product quantisation of vectors: each part of a vector is replaced by the numbers of two centroids near to it.

A vector is cut into equal parts. In each part the nearest of 256 centroids is subtracted, and of what remains again
the nearest of 256 others, so that a part takes two bytes. The centroids are learnt by k-means.

Product quantisation: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011. In rounds,
each of what the one before leaves: Chen, Guan, Wang, "Approximate Nearest Neighbor Search by Residual Vector
Quantization", Sensors 2010.
"""

import hashlib
import struct

import torch

ROUNDS, CENTROIDS = 2, 256  # a byte tells one of the centroids
ITERATIONS = 12  # of k-means
MOST_VECTORS = 2**14  # from which centroids are learnt: 64 for each of them
SHAPE = struct.Struct("<2I")  # parts, numbers in a part


class Codebooks:
    """The centroids of a product quantisation.

    Attributes:
        centroids: (ROUNDS, M, CENTROIDS, D/M) float32, for M parts of vectors of D numbers.
        digest: eight bytes that tell these centroids from others.
    """

    def __init__(self, centroids):
        self.centroids = centroids
        self.digest = hashlib.sha256(self.to_bytes()).digest()[:8]

        self.bytes_per_vector = centroids.shape[0] * centroids.shape[1]
        self.width = centroids.shape[1] * centroids.shape[3]  # D

    def __repr__(self):
        return f"Codebooks({self.width} numbers in {self.bytes_per_vector} bytes, {self.digest.hex()})"

    @classmethod
    @torch.no_grad()
    def learn(cls, vectors, bytes_per_vector):
        """Learn centroids by k-means; the same vectors give the same centroids.

        Args:
            vectors: (N, D), of which up to 2^14 are drawn.
            bytes_per_vector: two for each of M parts, into which D can be divided.

        Raises:
            ValueError: for a size that does not divide D, and fewer vectors than centroids.
        """
        num_parts = parts_of(vectors.shape[1], bytes_per_vector)
        if len(vectors) < CENTROIDS:
            raise ValueError(f"At least {CENTROIDS} vectors expected to learn as many centroids; got {len(vectors)}.")
        drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:MOST_VECTORS]
        parts = vectors[drawn].float().cpu().chunk(num_parts, dim=1)  # each (N, D/M)
        learnt = zip(*map(_learn_part, parts), strict=True)
        return cls(torch.stack([torch.stack(of_round) for of_round in learnt]))

    @torch.no_grad()
    def encode(self, vectors):
        """(N, D) -> uint8 (N, 2M): the numbers of the centroids, those of the first round first."""
        num_parts, codes = self.centroids.shape[1], []
        rest = vectors.float().cpu().unflatten(1, (num_parts, -1)).transpose(0, 1)  # (M, N, D/M)
        for centroids in self.centroids:
            nearest = _nearest(rest, centroids)  # (M, N)
            rest = rest - centroids.take_along_dim(nearest[:, :, None], dim=1)
            codes.append(nearest.T)
        return torch.cat(codes, dim=1).to(torch.uint8)

    def decode(self, codes):
        """uint8 (N, 2M) -> the sums of the centroids, (N, D) float32."""
        rows = codes.long() + torch.arange(self.bytes_per_vector) * CENTROIDS  # (N, 2M)
        found = self.centroids.flatten(0, 2).index_select(0, rows.flatten())  # (N * 2M, D/M)
        return found.view(len(codes), ROUNDS, self.width).sum(dim=1)

    def to_bytes(self):
        """The centroids as `from_bytes` reads them."""
        shape = self.centroids.shape
        return SHAPE.pack(shape[1], shape[3]) + self.centroids.contiguous().numpy().astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, content):
        """The codebooks that `to_bytes` gave.

        Raises:
            ValueError: for other bytes.
        """
        num_parts, size = SHAPE.unpack(content[: SHAPE.size].ljust(SHAPE.size, b"\0"))
        if len(content) != SHAPE.size + 4 * ROUNDS * num_parts * CENTROIDS * size:
            raise ValueError(f"Codebooks expected as `Codebooks.to_bytes` gives them; got {len(content)} other bytes.")
        numbers = torch.frombuffer(bytearray(content), dtype=torch.float32, offset=SHAPE.size)
        return cls(numbers.view(ROUNDS, num_parts, CENTROIDS, size))


def parts_of(width, bytes_per_vector):
    """Into how many parts vectors of `width` numbers are cut.

    Raises:
        ValueError: if that cannot be.
    """
    num_parts = bytes_per_vector // ROUNDS
    if bytes_per_vector <= 0 or bytes_per_vector % ROUNDS or width % num_parts:
        possible = [ROUNDS * parts for parts in range(1, width + 1) if width % parts == 0]
        raise ValueError(
            f"Vectors of {width} numbers can be quantised to {', '.join(map(str, possible))} bytes; got "
            f"{bytes_per_vector}."
        )
    return num_parts


def _learn_part(vectors):
    """The centroids of each round, (CENTROIDS, D/M), of one part (N, D/M) of the vectors."""
    rounds = []
    for _ in range(ROUNDS):
        centroids = _k_means(vectors)
        vectors = vectors - centroids[_nearest(vectors, centroids)]
        rounds.append(centroids)
    return rounds


def _k_means(vectors):
    """Centroids of (N, D), that begin as the first vectors; those that no vector is near to stay where they are."""
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
