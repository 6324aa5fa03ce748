"""A copy of a network for ranking on a CPU: its matrices laid out beforehand as oneDNN multiplies them.

In: a network in float32, in any make of linear maps, layer norms and depthwise convolutions. Out: a copy that gives
the same, or with bfloat16 nearly the same; it shares what it does not change, and cannot be trained. It does not know
what the network computes.

In bfloat16 the matrices, and what is multiplied with them, are rounded; sums over the blocks and layer norms stay in
float32.
"""

import copy
import ctypes
import math
import platform
import sys
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.activations import GELUActivation

GELUS = (nn.GELU, GELUActivation)
TOKENS_EXPECTED = 2048  # the size of batch that the layout is chosen for; others work too
LOGITS_AT_ONCE = 2**20  # of attention, per thread: what is computed of them stays in its cache
LOGITS_WORTH_SPLITTING = 2**17  # of one head, per thread, for all threads to work on it together
LARGEST_SUM = 2.0**60  # of exponentials: it, and one over it, are far from the ends of float32 and bfloat16
BLOCKWISE = "blockwise_without_maximum"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
PLAIN = ("none", [], "")  # no function after a linear map


def can_prepack(model, dtype):
    """Whether this model on this machine, in this type, has something to gain."""
    on_cpu_in_float32 = {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}
    if not on_cpu_in_float32 or not torch.backends.mkldnn.is_available():
        return False
    return dtype in (None, torch.float32) or (dtype == torch.bfloat16 and multiplies_bfloat16())


def multiplies_bfloat16():
    """Whether this CPU has instructions for it; where it has none, oneDNN imitates them, far slower than float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack(model, dtype=None):
    """A copy of `model` for inference, in float32 or with matrix products in torch.bfloat16."""
    dtype = dtype or torch.float32
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    fast = copy.deepcopy(model, shared).eval()
    fast.config._attn_implementation = BLOCKWISE
    for parent in list(fast.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                fuse = isinstance(getattr(parent, "activation", None), GELUS)
                setattr(parent, name, PrepackedLinear(child, dtype, fuse_gelu=fuse))
                if fuse:
                    parent.activation = nn.Identity()
            elif isinstance(child, nn.LayerNorm) and dtype != torch.float32:
                setattr(parent, name, RoundedLayerNorm(child, dtype))
            elif isinstance(child, nn.Conv2d) and child.groups > 1:
                setattr(parent, name, copy.deepcopy(child).to(dtype))
    return fast


@contextmanager
def memory_kept():
    """Meanwhile, memory that is freed stays with the process, where the C library is glibc.

    It would else be given back after every few layers and taken anew, and the system clears each page before it gives
    it: about 4% of the time. Afterwards it goes back.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, 65536)  # as it was, and the thresholds as large as glibc lets them grow by itself
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
        library.mallopt(M_TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)


class PrepackedLinear(nn.Module):
    """A linear map, with the GELU that follows it where asked."""

    def __init__(self, linear, dtype, fuse_gelu=False):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), TOKENS_EXPECTED)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.after = ("gelu", [], "none") if fuse_gelu else PLAIN

    @torch.no_grad()
    def forward(self, inputs):
        return torch.ops.mkldnn._linear_pointwise(inputs.to(self.dtype), self.weight, self.bias, *self.after)


class RoundedLayerNorm(nn.Module):
    """Normalises in float32, gives a smaller type."""

    def __init__(self, norm, dtype):
        super().__init__()
        self.norm = norm
        self.dtype = dtype

    def forward(self, inputs):
        return self.norm(inputs).to(self.dtype)


def blockwise_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention in blocks of heads that stay in cache: (B, H, Q, E) x (B, H, S, E) -> (B, Q, H, E), None.

    It takes fewer steps than a softmax, which tells where heads are narrow and exponentials cost more than products:
    no maximum is looked for, and sums are divided by at the end. Where a sum shows that logits were too large for
    that, a softmax follows. Exponentials are powers of two, which are computed faster than those of e.
    """
    weigh = _way_to_weigh(query.dtype, query.shape[2] * key.shape[2])
    if weigh and attention_mask is None:
        query_in_bits = query * (scaling / math.log(2))
        heads = (x.contiguous().flatten(0, 1) for x in (query_in_bits, key, value))  # (B*H, Q or S, E) each
        contexts, sums = weigh(*heads)
        smallest, largest = sums.aminmax()
        if smallest > 1 / LARGEST_SUM and largest < LARGEST_SUM:
            return (contexts / sums).unflatten(0, query.shape[:2]).transpose(1, 2), None
    context = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return context.transpose(1, 2), None


def _way_to_weigh(dtype, logits_of_head):
    """A function that gives values weighted by powers of two, and the sums of these, or None where it would not pay.

    Queries (N, Q, E), keys and values (N, S, E) -> (N, Q, E), (N, Q, 1).
    """
    threads = torch.get_num_threads()
    if dtype == torch.bfloat16:
        return partial(_weigh_by_blocks, max(1, threads * LOGITS_AT_ONCE // logits_of_head))
    return _weigh_head_by_head if logits_of_head >= threads * LOGITS_WORTH_SPLITTING else None


def _weigh_by_blocks(at_once, queries, keys, values):
    contexts, sums = torch.empty_like(queries), queries.new_empty(*queries.shape[:2], 1)
    blocks = zip(*(x.split(at_once) for x in (queries, keys, values, contexts, sums)), strict=True)
    for query, key, value, context, sums_of_block in blocks:
        weights = torch.bmm(query, key.transpose(1, 2)).exp2_()  # (N, Q, S)
        torch.sum(weights, -1, keepdim=True, out=sums_of_block)
        torch.bmm(weights, value, out=context)
    return contexts, sums


def _weigh_head_by_head(queries, keys, values):
    """A large head is as good as a linear map, and in float32 oneDNN's are up to twice as fast as batched products."""
    multiply = torch.ops.mkldnn._linear_pointwise.default
    values = F.pad(values.transpose(1, 2), (0, 0, 0, 1), value=1.0)  # (N, E+1, S): the sums come from a row of ones
    weighted = queries.new_empty(*queries.shape[:2], values.shape[1])
    for query, key, value, of_head in zip(queries, keys, values, weighted, strict=True):
        weights = multiply(query, key, None, *PLAIN).exp2_()  # (Q, S)
        of_head.copy_(multiply(weights, value, None, *PLAIN))
    return weighted.split([values.shape[1] - 1, 1], dim=-1)


AttentionInterface.register(BLOCKWISE, blockwise_attention)
