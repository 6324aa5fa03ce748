"""The device and the number type to compute with."""

import torch

from ieft.cpu.prepacked import multiplies_bfloat16
from ieft.evaluation.ranking import supported_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name="auto"):
    """The device of a name such as "cuda", "cuda:1", "mps" or "cpu"; of "auto" the best there is.

    Raises:
        ValueError: for another name, and for a device that is not there.
    """
    if name in (None, "auto"):
        found = ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())
        return torch.device(next((kind for kind, is_there in found if is_there), "cpu"))
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which also fails on "meta", where nothing is computed
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"A device such as cuda, cuda:1, mps or cpu expected, or auto; got {name!r}: {reason}"
        ) from error
    return device


def choose_dtype(model, name="auto"):
    """The type of the network's matrix products, of a name or a torch.dtype.

    "auto" takes bfloat16 or float16 where that is faster: on CUDA devices, and on a CPU that has instructions for
    bfloat16. Sums and layer norms stay in float32. A CPU without such instructions computes in float32.

    Args:
        model: on the device that is to compute.

    Returns:
        torch.dtype, or None for the model's own type.

    Raises:
        ValueError: for another name, and for float16 on a CPU.
    """
    kind = model.device.type
    if name in (None, "auto"):
        if model.dtype != torch.float32:
            return None
        if kind == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if kind == "cpu" and multiplies_bfloat16() else None
    dtype = DTYPES.get(name, name)
    if dtype not in DTYPES.values():
        raise ValueError(f"A type expected, one of auto, {', '.join(DTYPES)}; got {name!r}.")
    if dtype == torch.float16 and kind == "cpu":
        raise ValueError("float16 is slower than float32 on a CPU: choose bfloat16, float32 or auto.")
    dtype = supported_dtype(model, dtype)
    return None if dtype == model.dtype else dtype
