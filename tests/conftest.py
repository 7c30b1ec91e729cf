"""Every test begins with the same random numbers, whatever ran before it in its process."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
