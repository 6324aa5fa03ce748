"""Attention on a CPU, several times as fast as PyTorch's where heads are narrow or tokens few, as those of IEFT are.

In: queries, keys and values in float32 or bfloat16. Out: contexts. It does not know whose they are, and has no
gradients.

`cpu_attention.cpp` is compiled for this machine when it is first needed, which takes less than a second. Where there
is no C++ compiler, for masks, and where queries are not as many as keys, PyTorch's own attention is called.
"""

import ctypes
import logging
import os
import shutil
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
    attend = None
    if attention_mask is None and query.shape == key.shape == value.shape:
        attend = compiled_for(query.shape[-1])
    context = attend and _attend(attend, query, key, value, scaling)
    if context is None:
        context = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling).transpose(1, 2)
    return context, None


def _attend(attend, query, key, value, scaling):
    """The context, or None where logits were too large or too small to be exponentiated as they are."""
    batch, heads, tokens, _ = query.shape
    sides = [x.transpose(1, 2).float().contiguous() for x in (query, key, value)]  # (B, S, H, E), as projected
    context = torch.empty_like(sides[0])
    sizes = batch, heads, tokens, scaling, torch.get_num_threads()
    good = attend(*(x.data_ptr() for x in sides), *sizes, context.data_ptr())
    return context.to(query.dtype) if good else None


@cache
def compiled_for(width):
    """The function of `cpu_attention.cpp` for heads of this width, or None where it cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        logger.info("No C++ compiler found (c++, or what CXX names): ranking with PyTorch's attention.")
        return None
    with TemporaryDirectory() as folder:
        library = Path(folder, "attention.so")
        command = [compiler, *OPTIONS, f"-DWIDTH={width}", str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            attend = ctypes.CDLL(str(library)).attend_all
        except (subprocess.CalledProcessError, OSError) as error:
            logger.info("Ranking with PyTorch's attention: %s. %s", error, getattr(error, "stderr", ""))
            return None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    attend.argtypes = [pointer, pointer, pointer, size, size, size, ctypes.c_float, ctypes.c_int, pointer]
    attend.restype = ctypes.c_bool
    return attend


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
