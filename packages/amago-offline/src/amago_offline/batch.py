"""`Batch`: windows of trajectories as tensors.

`B` batch, `L` timesteps, `T = L - 1` transitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, tensorclass


@tensorclass
class Batch:
    """Windows of trajectories, right-padded to one length; `batch_size` is `[B]`.

    `.to(device, non_blocking=True)`, `.pin_memory()`, indexing and stacking come with tensorclass.

    Attributes:
        obs: TensorDict of `[B, L, ...]` in the dtypes they are stored in.
        prev_action: `[B, L]` int64 index (-1: no previous action) or `[B, L, A]`.
        prev_reward: `[B, L]` float32.
        terminated: `[B, L]` bool, entry `t` belongs to the transition from `t - 1` to `t`.
        truncated: `[B, L]` bool, aligned as `terminated`.
        time_idx: `[B, L]` int64, true time in the episode; padding repeats the last value.
        reset: `[B, L]` bool, True where a new segment starts: at column 0.
        mask: `[B, T]` bool, True at real transitions.
    """

    obs: TensorDict
    prev_action: torch.Tensor
    prev_reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    time_idx: torch.Tensor
    reset: torch.Tensor
    mask: torch.Tensor

    @property
    def actions(self) -> torch.Tensor:
        """`[B, T, ...]` view: the action of each transition."""
        return self.prev_action[:, 1:]

    @property
    def rewards(self) -> torch.Tensor:
        """`[B, T]` view: the reward of each transition."""
        return self.prev_reward[:, 1:]

    @property
    def terminations(self) -> torch.Tensor:
        """`[B, T]` view: whether each transition ended the episode."""
        return self.terminated[:, 1:]

    @property
    def truncations(self) -> torch.Tensor:
        """`[B, T]` view: whether each transition was the last before a cut."""
        return self.truncated[:, 1:]

    @property
    def timestep_mask(self) -> torch.Tensor:
        """`[B, L]` bool: timesteps that belong to a real transition, before or after it."""
        edge = self.mask.new_zeros(self.mask.shape[0], 1)
        return torch.cat([self.mask, edge], dim=1) | torch.cat([edge, self.mask], dim=1)

    @property
    def lengths(self) -> torch.Tensor:
        """`[B]` int64: real transitions of each row."""
        return self.mask.sum(dim=1)

    def trim(self, multiple_of: int = 1) -> Batch:
        """Drop the columns past the longest row.

        Reads the mask on the host: call it before moving the batch to a device.

        Args:
            multiple_of: keep a number of timesteps that is a multiple of this, but never more than there are.

        Returns:
            A batch of views; itself if there is nothing to drop.

        Raises:
            ValueError: if `multiple_of < 1`.
        """
        if multiple_of < 1:
            raise ValueError(f"multiple_of must be >= 1, got {multiple_of}")
        length = self.mask.shape[1] + 1
        used = torch.nonzero(self.mask.any(dim=0))
        needed = int(used[-1]) + 2 if len(used) else 2
        keep = min(length, -(-needed // multiple_of) * multiple_of)
        if keep == length:
            return self
        fields: dict[str, Any] = {
            name: getattr(self, name)[:, :keep]
            for name in ("prev_action", "prev_reward", "terminated", "truncated", "time_idx", "reset")
        }
        size = [len(self.mask)]
        fields["obs"] = TensorDict({key: value[:, :keep] for key, value in self.obs.items()}, batch_size=size)
        return _make(mask=self.mask[:, : keep - 1], batch_size=size, **fields)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Batch:
        """A batch that shares the memory of NumPy arrays.

        Args:
            arrays: the fields by name, `obs` as a dict, as `amago_offline.sampling.gather` returns them.

        Returns:
            A batch on the CPU.
        """
        size = [len(arrays["mask"])]
        fields: dict[str, Any] = {name: torch.from_numpy(value) for name, value in arrays.items() if name != "obs"}
        obs = {key: torch.from_numpy(value) for key, value in arrays["obs"].items()}
        return _make(obs=TensorDict(obs, batch_size=size), batch_size=size, **fields)


# The decorator adds `batch_size` to the constructor, which type checkers cannot see.
_make: Any = Batch
