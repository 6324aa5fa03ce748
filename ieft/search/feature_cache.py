"""Serialization of an image's features for re-ranking, to be stored beside its embedding.

The features, from `IeftForImageTextRetrieval.read_images`, are T tokens of D numbers. As `bf16` each number takes two
bytes; as `int8` one, with a float32 scale per token (its largest magnitude divided by 127). As `pq96`, or another
number, a token takes that many bytes, by product quantisation (`ieft.search.product_quantization`), and an image eight
more, the digest of the codebooks; features are then keys and values, 2D numbers from `read_keys_and_values`. A header
of ten bytes holds the format, T, and D or 2D.
"""

import re
import struct

import torch

KINDS = ("bf16", "int8")  # and pqN
PRODUCT = "pq"  # in the header of all pqN
HEADER = struct.Struct("<4sHI")  # kind, T, D
DIGEST = 8  # bytes of the digest of codebooks


def bytes_per_token(kind):
    """N of the kind pqN; None for kinds that need no codebooks.

    Raises:
        ValueError: for a name that is no kind.
    """
    if kind in KINDS:
        return None
    match = re.fullmatch(rf"{PRODUCT}([1-9]\d{{0,4}})", str(kind))
    if match is None:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}, or {PRODUCT} with the bytes of a token, such as {PRODUCT}96; "
            f"got {kind!r}."
        )
    return int(match[1])


def encode_state(state, kind="int8", codebooks=None):
    """Encode the features of one image.

    Args:
        state: (T, D) finite numbers; (T, 2D) of keys and values.
        kind: "bf16" (relative error up to 0.4%), "int8" (error up to 0.4% of the token's largest magnitude), or such
            as "pq96" for 96 bytes per token.
        codebooks: for "pq96" and the like, the `Codebooks` of as many bytes, learnt from tokens of other images.

    Raises:
        ValueError: for another kind, another shape, numbers that are not finite, or codebooks of another size.
    """
    size = bytes_per_token(kind)
    if state.dim() != 2 or not torch.isfinite(state).all():
        raise ValueError(
            f"Features of one image expected, (T, D) finite numbers; got {tuple(state.shape)}"
            + ("." if state.dim() != 2 else ", some of them not finite.")
        )
    state = state.detach().float().cpu()
    if size is not None:
        if codebooks is None or codebooks.bytes_per_vector != size or codebooks.width != state.shape[1]:
            raise ValueError(f"{kind} needs codebooks of {size} bytes for {state.shape[1]} numbers; got {codebooks}.")
        return HEADER.pack(PRODUCT.encode(), *state.shape) + codebooks.digest + _bytes(codebooks.encode(state))
    header = HEADER.pack(kind.encode(), *state.shape)
    if kind == "bf16":
        return header + _bytes(state.bfloat16())
    scale = state.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (T, 1)
    return header + _bytes(scale) + _bytes((state / scale).round().to(torch.int8))


def decode_state(content, codebooks=None):
    """Decode the features of one image: (T, D) float32, or (T, 2D) as they were encoded.

    Args:
        codebooks: those that the features were encoded with, if with any.

    Raises:
        ValueError: if the bytes were not written by `encode_state`, are truncated, or need other codebooks.
    """
    kind, num_tokens, width = HEADER.unpack(content[: HEADER.size].ljust(HEADER.size, b"\0"))
    kind, numbers = kind.rstrip(b"\0").decode("ascii", "replace"), num_tokens * width
    body = bytearray(content[HEADER.size :])  # writable, as torch requires
    if kind == PRODUCT and len(body) >= DIGEST:
        if codebooks is None or codebooks.digest != body[:DIGEST]:
            raise ValueError(
                f"Features were encoded with the codebooks {body[:DIGEST].hex()}; got {codebooks} to decode them."
            )
        size = DIGEST + num_tokens * codebooks.bytes_per_vector
    else:
        size = {"bf16": 2 * numbers, "int8": 4 * num_tokens + numbers}.get(kind, -1)
    if len(content) != HEADER.size + size:
        raise ValueError(
            f"Features encoded by `encode_state` expected; got {len(content)} bytes that begin with {content[:4]!r}."
        )
    if kind == PRODUCT:
        return codebooks.decode(torch.frombuffer(body, dtype=torch.uint8, offset=DIGEST).view(num_tokens, -1))
    if kind == "bf16":
        return torch.frombuffer(body, dtype=torch.bfloat16).view(num_tokens, width).float()
    scale = torch.frombuffer(body, dtype=torch.float32, count=num_tokens)[:, None]
    values = torch.frombuffer(body, dtype=torch.int8, offset=4 * num_tokens).view(num_tokens, width)
    return values.float() * scale


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
