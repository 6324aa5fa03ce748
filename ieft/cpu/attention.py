"""Attention on a CPU, two to three times as fast as PyTorch's where heads are narrow or tokens few, as IEFT's are.

`attention.cpp` is compiled for this machine at first use, which takes about a second, and kept in `cache_folder()`
for later processes. Without a C++ compiler, for masks, and where there are not as many queries as keys, PyTorch's
attention is called. For inference only: there are no gradients.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logger = logging.getLogger(__name__)

CPU_ATTENTION = "ieft_cpu"
SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")  # OpenMP's threads are then those of PyTorch
_failures: list[Exception] = []  # the first error, of which the user is warned once a process


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
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")  # which may have options, or a compiler cache before it
        command = [*compiler, *OPTIONS, f"-DWIDTH={width}"]
        attend = _load_cached(command).attend_all
    except (subprocess.CalledProcessError, OSError, AttributeError, ValueError) as error:
        _warn_once(error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    attend.argtypes = [pointer, pointer, pointer, size, size, size, ctypes.c_float, ctypes.c_int, pointer]
    attend.restype = ctypes.c_bool
    return attend


def cache_folder():
    """Where compiled attention is kept: `ieft` in `$XDG_CACHE_HOME`, or in `~/.cache` where that is not set."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    if not caches.is_absolute():
        raise OSError(f"XDG_CACHE_HOME must be an absolute path, as the XDG specification says; got {caches}")
    return caches / "ieft"


def _load_cached(command):
    """The compiled library: from the cache, compiled into it, or where it cannot be used from a temporary folder."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        if not _only_we_write(folder):
            raise OSError(f"{folder} belongs to or may be written by another user")
        library = folder / f"attention-{_digest(command)}.so"
        loaded = _load(library) if _only_we_write(library) else None
        if loaded is None:
            _compile(command, library)
            loaded = ctypes.CDLL(str(library))
        return loaded
    except (OSError, RuntimeError, AttributeError) as error:  # no home folder; Windows, which has no user ids
        logger.info("Compiled attention cannot be kept for other processes: %s", error)
    with TemporaryDirectory() as folder:
        library = Path(folder, "attention.so")
        _compile(command, library)
        return ctypes.CDLL(str(library))


def _load(library):
    """A library that was compiled before, or None where it is damaged."""
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        logger.info("%s cannot be loaded (%s) and is compiled again.", library, error)
        return None
    return loaded if hasattr(loaded, "attend_all") else None


def _compile(command, library):
    """Compile beside `library` and rename, so that other processes find a whole file or none."""
    with TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        command = [*command, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(made, library)


def _only_we_write(path):
    """Whether a file or folder exists, belongs to this user, and nobody else may write to it."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(command):
    """A name for what the compiled library depends on: its source, the compiler with its options, and this CPU."""
    parts = [SOURCE.read_text(encoding="utf-8"), *command, platform.machine(), _cpu_model()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu_model():
    """Name and instruction sets of this CPU; where the system does not tell them, the name of the machine."""
    telling = ("model", "cpu family", "flags", "Features", "CPU ", "isa")  # and not the clock or number of a core
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        first = ""
    return "\n".join(line for line in first.splitlines() if line.startswith(telling)) or platform.node()


def _warn_once(error):
    if _failures:
        return
    _failures.append(error)
    logger.warning(
        "Ranking with PyTorch's attention, which takes about a fifth more time, since %s could not be compiled. "
        "Install a C++ compiler with OpenMP, such as g++, or name one in CXX. The reason: %s",
        SOURCE.name,
        (getattr(error, "stderr", None) or str(error)).strip(),
    )


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
# Without this, transformers would leave out the mask of padded captions.
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
