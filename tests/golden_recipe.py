"""Weights and inputs of the golden scores in `tests/golden/`, and the published checkpoint layout.

Every parameter's value depends only on its published name and a seed, so that no full-size checkpoint has to be
stored. The scores were computed in float64 by running the published network with patches in raster order.
"""

import json
import math
import zlib
from pathlib import Path

import torch

GOLDEN_FOLDER = Path(__file__).parent / "golden"
CAPTION_LENGTHS = [5, 7, 9, 11, 13, 16, 20, 27, 34, 40]  # tokens, [CLS] and [SEP] included


def make_tensor(name, shape, seed):
    """One float32 parameter, drawn from a generator seeded with crc32(name) xor seed."""
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    noise = torch.randn(tuple(shape), generator=generator)
    if name.endswith(".bias"):
        return 0.02 * noise
    if name.endswith("temperature") or (name.endswith(".weight") and len(shape) == 1):
        return 1.0 + 0.1 * noise  # LayerNorm weights
    if name.endswith(("pos_embed", "cls_token")) or "embeddings" in name:
        return 0.5 * noise
    return 1.5 / math.sqrt(math.prod(shape[1:])) * noise


def make_published_state_dict(seed, include_unused=False):
    """A checkpoint in the published names; `include_unused` adds the tensors that the forward pass never reads."""
    state_dict = {}
    for name, shape in json.loads((GOLDEN_FOLDER / "parameter_shapes.json").read_text()):
        if name == "text_embeddings.position_ids":
            state_dict[name] = torch.arange(shape[1]).expand(1, -1).clone()
        elif include_unused or not is_unused(name):
            state_dict[name] = make_tensor(name, shape, seed)
    return state_dict


def is_unused(name):
    """Blocks 6 to 11 and half of each `local_net` are stored in a published checkpoint and never run."""
    parts = name.split(".")
    if name.startswith("transformer.blocks."):
        return int(parts[2]) >= 6
    return parts[0] == "local_net" and parts[2] in ("norm1", "attn", "gata_tra")


def make_inputs(num_images=6, seed=1234):
    """Images (6, 3, 384, 384) in [-1, 1), input_ids and attention_mask (10, 40), padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((num_images, 3, 384, 384), generator=generator) * 2 - 1
    generator = torch.Generator().manual_seed(seed + 1)
    input_ids = torch.zeros((len(CAPTION_LENGTHS), 40), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(CAPTION_LENGTHS):
        input_ids[row, 0] = 101
        input_ids[row, 1 : length - 1] = torch.randint(1000, 30000, (length - 2,), generator=generator)
        input_ids[row, length - 1] = 102
        attention_mask[row, :length] = 1
    return images, input_ids, attention_mask


def load_golden(seed):
    """Golden scores and hidden states, as stored."""
    return json.loads((GOLDEN_FOLDER / f"golden_seed{seed}.json").read_text())
