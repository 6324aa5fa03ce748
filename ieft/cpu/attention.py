"""Attention on a CPU, two to three times as fast as PyTorch's where heads are narrow or tokens few, as IEFT's are.

In: queries, keys and values in float32 or bfloat16. Out: contexts. It does not know whose they are, and has no
gradients.

`attention.cpp` is compiled for this machine when it is first needed, which takes less than a second. Where there
is no C++ compiler, for masks, and where queries are not as many as keys, PyTorch's own attention is called.
"""

import ctypes
import logging
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

logger = logging.getLogger(__name__)

CPU_ATTENTION = "ieft_cpu"
SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")  # OpenMP's threads are then those of PyTorch


def cpu_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """(B, H, Q, E) x (B, H, S, E) -> (B, Q, H, E) and, as no probabilities are kept, None."""
    context = None
    if attention_mask is None and query.shape == key.shape == value.shape:
        context = _attend(query, key, value, scaling)
    if context is None:
        context = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling).transpose(1, 2)
    return context, None


def _attend(query, key, value, scaling):
    """The context, or None without a compiler, and where logits are too large or too small to be exponentiated."""
    batch, heads, tokens, width = query.shape
    attend = compiled_for(width)
    if attend is None:
        return None
    sides = [x.transpose(1, 2).float().contiguous() for x in (query, key, value)]  # (B, S, H, E), as projected
    context = torch.empty_like(sides[0])
    sizes = batch, heads, tokens, scaling, torch.get_num_threads()
    good = attend(*(x.data_ptr() for x in sides), *sizes, context.data_ptr())
    return context.to(query.dtype) if good else None


@cache
def compiled_for(width):
    """The function of `attention.cpp` for heads of this width, or None where it cannot be compiled."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # which may have options, or a cache before it
    try:
        with TemporaryDirectory() as folder:
            library = Path(folder, "attention.so")
            command = [*compiler, *OPTIONS, f"-DWIDTH={width}", str(SOURCE), "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            attend = ctypes.CDLL(str(library)).attend_all
    except (subprocess.CalledProcessError, OSError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.info(
            "Ranking with PyTorch's attention, as %s cannot be compiled (CXX, or c++): %s", SOURCE.name, reason
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    attend.argtypes = [pointer, pointer, pointer, size, size, size, ctypes.c_float, ctypes.c_int, pointer]
    attend.restype = ctypes.c_bool
    return attend


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
