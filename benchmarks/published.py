"""Baseline of both speed benchmarks: a copy of the network that computes the same scores as the published code does.

In the published code (Tang et al., IEEE TGRS 2023), attention is written out, gated convolutions are 1x1 convolutions
on an image, captions are padded to 40 tokens, and every token of the last block is computed. Captions have the lengths
of RSICD's.
"""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu

PADDED_LENGTH = 40  # of every caption
# RSICD's test split: 3,619 captions without repeats on one image, of which 3,331 are distinct.
CAPTIONS, DISTINCT_CAPTIONS = 3619, 3331
# Tokens per distinct caption -> number of captions; words and punctuation marks, with [CLS] and [SEP].
LENGTHS = {
    8: 3, 9: 27, 10: 236, 11: 361, 12: 419, 13: 382, 14: 357, 15: 329, 16: 297, 17: 233, 18: 171, 19: 150, 20: 111,
    21: 83, 22: 45, 23: 33, 24: 19, 25: 23, 26: 19, 27: 11, 28: 9, 29: 4, 30: 4, 31: 2, 32: 1, 34: 1, 35: 1,
}  # fmt: skip


def as_published(model):
    """A copy that shares the weights, with eager attention and 1x1 convolutions."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    published = copy.deepcopy(model, shared)
    published.set_attn_implementation("eager")
    for stage in published.vilt.encoder.enhancement:
        stage.gated_convolution = PublishedGatedConvolution(stage.gated_convolution)
    return published


class PublishedGatedConvolution(nn.Module):
    """`layers_ieft.IeftGatedConvolution` with convolutions instead of linear layers."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, patches):
        size = (self.linear.grid_size, self.linear.grid_size)
        grid = self.linear.layernorm(patches).transpose(1, 2).unflatten(2, size)  # (B, D, G, G)
        grid = self.linear.depthwise(conv2d(grid, self.linear.project_in.weight[:, :, None, None]))  # (B, 2W, G, G)
        gate, content = grid.chunk(2, dim=1)  # each (B, W, G, G)
        grid = conv2d(gelu(gate) * content, self.linear.project_out.weight[:, :, None, None])  # (B, D, G, G)
        return patches + grid.flatten(2).transpose(1, 2)  # (B, P, D)


def draw_captions(count, vocab_size):
    """`count` lists of token ids, with the lengths and share of repeats of RSICD, in random order."""
    draw = np.random.default_rng(0)
    of_rsicd = np.repeat(list(LENGTHS), list(LENGTHS.values()))  # rising
    num_distinct = round(count * DISTINCT_CAPTIONS / CAPTIONS)
    lengths = of_rsicd[((np.arange(num_distinct) + 0.5) / num_distinct * len(of_rsicd)).astype(int)]
    distinct = [draw.integers(1000, vocab_size, length).tolist() for length in lengths]
    repeats = [distinct[row] for row in draw.integers(0, num_distinct, count - num_distinct)]
    captions = distinct + repeats
    return [captions[row] for row in draw.permutation(count)]


def pad(captions, length):
    """Token ids and attention mask, each (C, length)."""
    ids = torch.zeros(len(captions), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        ids[row, : len(caption)] = torch.tensor(caption)
        mask[row, : len(caption)] = 1
    return ids, mask
