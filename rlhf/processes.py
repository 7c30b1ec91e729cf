"""What the processes of a training script give each other, and who takes what."""

import torch.distributed as dist


def gather_lists(items: list) -> list:
    """The lists of all processes, joined in order of rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def share(items: list) -> list:
    """The items of this process: neighbours, so that few groups lie on two processes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return items[rank * len(items) // world_size : (rank + 1) * len(items) // world_size]
