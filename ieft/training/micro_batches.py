"""What computing a batch by micro-batches needs: random states to compute a part again, and memory errors."""

import torch
from accelerate.utils.memory import should_reduce_batch_size

# Also what oneDNN says where its own allocations fail.
ALLOCATION_ERRORS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",
    "could not create a primitive",
)


class OutOfMemory(Exception):
    """Some process had too little memory for its micro-batch."""


def is_out_of_memory(error):
    """Whether an exception of torch says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return any(sign in str(error) for sign in ALLOCATION_ERRORS)


def get_random_state(device):
    """The states of torch's random generators, of the CPU and of the current device."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def set_random_state(device, states):
    """Restore what `get_random_state` gave."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])


def describe_batch(args):
    """How the batch of a step is composed, as text."""
    share = args.train_batch_size // args.world_size
    micro_batches = -(-share // args.per_device_train_batch_size)
    names = ["device" + "s" * (args.world_size > 1), "micro-batch" + "es" * (micro_batches > 1)]
    return (
        f"{args.train_batch_size} images a step = {args.world_size} {names[0]} x {micro_batches} {names[1]} x "
        f"{'' if share % args.per_device_train_batch_size == 0 else 'up to '}{args.per_device_train_batch_size} images"
    )
