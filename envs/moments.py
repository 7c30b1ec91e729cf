"""Running mean and variance of what environments give, to normalize it."""

from typing import Self

import numpy as np
import torch
import torch.distributed as dist


class RunningMoments:
    """Mean and variance of all rows seen so far, kept as sums, which processes can add up.

    Starts like gymnasium's wrappers, as if it had seen 1e-4 rows of mean 0 and variance 1.
    """

    def __init__(self, shape: tuple[int, ...] = ()):
        self.sums = np.zeros((3, *shape))  # count, sum, sum of squares
        self.sums[0] = self.sums[2] = 1e-4
        self.merged = self.sums.copy()

    def update(self, rows: np.ndarray) -> None:
        """rows: (N, *shape)."""
        self.sums[0] += len(rows)
        self.sums[1] += rows.sum(0)
        self.sums[2] += (rows * rows).sum(0)

    def mean_and_std(self, sums: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        count, total, squares = self.sums if sums is None else sums
        mean = total / count
        return mean, np.sqrt(np.maximum(squares / count - mean * mean, 0.0) + 1e-8)

    def normalize(self, rows: np.ndarray) -> np.ndarray:
        """clip((rows - mean) / std, -10, 10), in float32."""
        mean, std = self.mean_and_std()
        # np.clip costs three times as much on a small array
        return np.minimum(np.maximum((rows - mean) / std, -10), 10).astype(np.float32)

    def merge(self, device: torch.device) -> None:
        """Add what the other processes have seen since the last merge."""
        if dist.get_world_size() > 1:
            news = torch.from_numpy(self.sums - self.merged).to(device)
            dist.all_reduce(news)
            self.sums = self.merged + news.cpu().numpy()
        self.merged = self.sums.copy()

    def state(self) -> dict[str, torch.Tensor]:
        return {"sums": torch.from_numpy(self.sums), "merged": torch.from_numpy(self.merged)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.sums, self.merged = state["sums"].numpy().copy(), state["merged"].numpy().copy()

    @classmethod
    def of_state(cls, state: dict[str, torch.Tensor]) -> Self:
        moments = cls()
        moments.load_state(state)
        return moments
