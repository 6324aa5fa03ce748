"""An inference-only copy of a network for ranking on a CPU, with oneDNN-prepacked weights.

The copy gives the results of the float32 original, approximately so in bfloat16, and shares the modules that it does
not change. In bfloat16, weights and their inputs are rounded; residual sums and layer norms stay in float32.
"""

import copy
import ctypes
import platform
import sys
import weakref
from contextlib import contextmanager

import torch
from torch import nn
from transformers.activations import GELUActivation

from ieft.cpu.attention import CPU_ATTENTION

GELUS = (nn.GELU, GELUActivation)
TOKENS_EXPECTED = 2048  # the size of batch that the layout is chosen for; others work too
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
ENTRIES_COMPARED = 16  # of each weight
_kept: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # model -> its state, its copy, and the weights it was made from


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
    fast.config._attn_implementation = CPU_ATTENTION
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


def prepack_once(model, dtype=None):
    """`prepack`, kept while the model lives and neither its weights, its configuration nor `dtype` change.

    For a model in training mode the copy is made each time and not kept, since its weights are about to change.
    """
    if model.training:
        forget(model)
        return prepack(model, dtype)
    state = _state(model, dtype)
    kept = _kept.get(model)
    if kept is None or kept[0] != state:
        kept = None
        forget(model)  # before the next copy is made
        # Weights that are replaced are held until then: new ones at their address would look unchanged.
        weights = [tensor.detach() for tensor in [*model.parameters(), *model.buffers()]]
        kept = _kept[model] = state, prepack(model, dtype), weights
    return kept[1]


def forget(model):
    """Free the copy that is kept of a model, if any."""
    _kept.pop(model, None)


def _state(model, dtype):
    """What the copy depends on, to be compared: a changed weight has another address, version or entries.

    Versions do not count changes through `Tensor.data`, so that some entries of each weight are compared too.
    """
    modules = [(name, type(module)) for name, module in model.named_modules()]
    weights = [
        (
            name,
            tensor.data_ptr(),
            None if tensor.is_inference() else tensor._version,
            (tensor.dtype, tensor.device, tensor.shape, tensor.stride()),
            tensor.detach().reshape(-1)[:: max(1, tensor.numel() // ENTRIES_COMPARED)].tolist(),
        )
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    return dtype, repr(vars(model.config)), modules, weights


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
