"""Differentiable gathering of one batch from all processes, in the order of their ranks.

Every process must hold the same number of rows. Accelerate gives process r of P the batches r, P + r, 2P + r... of one
order: gathered in the order of ranks, they are the batch of one process with P times the rows.
"""

import torch
import torch.distributed as dist
from torch.nn.functional import pad


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def leave_processes():
    """Destroy the process group at the end of a command: gloo's threads may otherwise abort Python's exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_process(error):
    """Whether an error of a collective operation says that another process has ended. gloo raises a RuntimeError."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "onnection" in str(error))


def gather_rows(rows, *, fill=0):
    """Gather the rows of all processes: (R, ...) -> (P*R, ...).

    Args:
        fill: padding value for rows that are shorter in dimension 1 than those of another process.
    """
    if process_count() == 1:
        return rows
    if rows.dim() > 1:
        width = torch.tensor(rows.shape[1], device=rows.device)
        dist.all_reduce(width, dist.ReduceOp.MAX)
        rows = pad(rows, [0, 0] * (rows.dim() - 2) + [0, int(width) - rows.shape[1]], value=fill)
    before, count = process_rank() * len(rows), process_count() * len(rows)
    places = torch.arange(before, before + len(rows), device=rows.device)
    return sum_over_processes(rows.new_zeros(count, *rows.shape[1:]).index_copy(0, places, rows))


def largest_over_processes(number, device):
    """The largest of a whole number of each process, on every process."""
    if process_count() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def average_gradients(parameters):
    """Replace each gradient by its mean over all processes, which must hold gradients of the same parameters."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    for work in [dist.all_reduce(gradient.div_(process_count()), async_op=True) for gradient in gradients]:
        work.wait()


def sum_over_processes(tensor):
    """The sum over all processes, on every process. It is exact where only one process has a non-zero entry.

    The gradient is summed over all processes. If each computes the same loss from the sum, the gradient is P times
    that of the loss; averaging over processes, as DDP, FSDP and DeepSpeed do, corrects this.
    """
    return _Sum.apply(tensor) if process_count() > 1 else tensor


class _Sum(torch.autograd.Function):
    """Differentiable all-reduce, instead of the deprecated `torch.distributed.nn.functional.all_reduce`."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
