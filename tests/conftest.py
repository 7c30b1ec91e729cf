"""Every test begins with the same random numbers, whatever ran before it in its process."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def group_of_one():
    """A process group of this process alone, for calls of a script's functions in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    yield
    dist.destroy_process_group()
