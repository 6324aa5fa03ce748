"""A copy of a network for ranking on a CPU: its matrices laid out beforehand as oneDNN multiplies them.

In: a network in float32, in any make of linear maps, layer norms and depthwise convolutions. Out: a copy that gives
the same, or with bfloat16 nearly the same; it shares what it does not change, and cannot be trained. It does not know
what the network computes.

In bfloat16 the matrices, and what is multiplied with them, are rounded; sums over the blocks and layer norms stay in
float32.
"""

import copy
import platform

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.activations import GELUActivation

GELUS = (nn.GELU, GELUActivation)
TOKENS_EXPECTED = 2048  # the size of batch that the layout is chosen for; others work too
LOGITS_AT_ONCE = 2**20  # of attention, per thread: what is computed of them stays in its cache
LARGEST_LOGIT = 60.0  # whose exponentials, and sums of them, are far from the end of float32 and bfloat16
BLOCKWISE = "blockwise_without_maximum"


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
    if dtype != torch.float32:
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


class PrepackedLinear(nn.Module):
    """A linear map, with the GELU that follows it where asked."""

    def __init__(self, linear, dtype, fuse_gelu=False):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), TOKENS_EXPECTED)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.after = ("gelu", [], "none") if fuse_gelu else ("none", [], "")

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

    For narrow heads, where exponentials cost more than products, it takes fewer steps than a softmax: as long as no
    logit can be large, no maximum is looked for, and the sum of each row comes with the product, from a column of ones
    beside the values.
    """
    largest = scaling * (query.square().sum(-1).max() * key.square().sum(-1).max()).sqrt()  # by Cauchy and Schwarz
    if attention_mask is not None or largest > LARGEST_LOGIT:
        context = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return context.transpose(1, 2), None
    width = value.shape[-1]
    padding = (0, -(width + 1) % 16 + 1)  # at least one column; products like multiples of 16
    shape = query.shape[:2]
    query, keys = (query * scaling).flatten(0, 1), key.flatten(0, 1).transpose(1, 2)  # (B*H, Q, E), (B*H, E, S)
    values = F.pad(value, padding, value=1.0).flatten(0, 1)  # (B*H, S, E+)
    sums = values.new_empty(len(query), query.shape[1], values.shape[2])
    at_once = max(1, torch.get_num_threads() * LOGITS_AT_ONCE // (query.shape[1] * keys.shape[2]))
    for heads in torch.arange(len(query)).split(at_once):
        block = slice(int(heads[0]), int(heads[-1]) + 1)
        torch.bmm(torch.bmm(query[block], keys[block]).exp_(), values[block], out=sums[block])
    context = sums[..., :width] / sums[..., width : width + 1]
    return context.unflatten(0, shape).transpose(1, 2), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
