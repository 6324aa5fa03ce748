"""Serialization of an image's features for re-ranking, to be stored beside its embedding.

The features, from `IeftForImageTextRetrieval.read_images`, are T tokens of D numbers. As `bf16` each number takes two
bytes; as `int8` one, with a float32 scale per token (its largest magnitude divided by 127). A header of ten bytes
holds the format, T and D.
"""

import struct

import torch

KINDS = ("bf16", "int8")
HEADER = struct.Struct("<4sHI")  # kind, T, D


def encode_state(state, kind="int8"):
    """Encode the features of one image.

    Args:
        state: (T, D) finite numbers.
        kind: "bf16" (relative error up to 0.4%) or "int8" (error up to 0.4% of the token's largest magnitude).

    Raises:
        ValueError: for another kind, another shape, or numbers that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    if state.dim() != 2 or not torch.isfinite(state).all():
        raise ValueError(
            f"Features of one image expected, (T, D) finite numbers; got {tuple(state.shape)}"
            + ("." if state.dim() != 2 else ", some of them not finite.")
        )
    state = state.detach().float().cpu()
    header = HEADER.pack(kind.encode(), *state.shape)
    if kind == "bf16":
        return header + _bytes(state.bfloat16())
    scale = state.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (T, 1)
    return header + _bytes(scale) + _bytes((state / scale).round().to(torch.int8))


def decode_state(content):
    """Decode the features of one image: (T, D) float32.

    Raises:
        ValueError: if the bytes were not written by `encode_state`, or are truncated.
    """
    kind, num_tokens, width = HEADER.unpack(content[: HEADER.size].ljust(HEADER.size, b"\0"))
    kind, numbers = kind.decode("ascii", "replace"), num_tokens * width
    size = {"bf16": 2 * numbers, "int8": 4 * num_tokens + numbers}.get(kind, -1)
    if len(content) != HEADER.size + size:
        raise ValueError(
            f"Features encoded by `encode_state` expected; got {len(content)} bytes that begin with {content[:4]!r}."
        )
    body = bytearray(content[HEADER.size :])  # writable, as torch requires
    if kind == "bf16":
        return torch.frombuffer(body, dtype=torch.bfloat16).view(num_tokens, width).float()
    scale = torch.frombuffer(body, dtype=torch.float32, count=num_tokens)[:, None]
    values = torch.frombuffer(body, dtype=torch.int8, offset=4 * num_tokens).view(num_tokens, width)
    return values.float() * scale


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
