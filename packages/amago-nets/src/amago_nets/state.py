"""What a sequence backbone keeps between timesteps.

Dimensions: `B` lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class State:
    """What a backbone remembers of every lane: named tensors at fixed addresses.

    Args:
        lanes: number of lanes `B`.
        tensors: name to tensor; every tensor has one axis of size `B`.
        lane_axis: name to the number of that axis.
    """

    def __init__(self, lanes: int, tensors: Mapping[str, Tensor], lane_axis: Mapping[str, int]) -> None:
        self.lanes = lanes
        self._tensors = dict(tensors)
        self._lane_axis = dict(lane_axis)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name itself, not a copy."""
        return self._tensors[name]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor: the memory itself, no copies."""
        return dict(self._tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Snapshot of the state.

        Returns:
            Name to tensor, contiguous copies.
        """
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self._tensors.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restores a snapshot in place; addresses do not change.

        Args:
            state_dict: result of `state_dict` of a state of the same backbone and number of lanes.

        Raises:
            ValueError: if names or shapes differ.
        """
        if set(state_dict) != set(self._tensors):
            raise ValueError(f"state_dict has the entries {sorted(state_dict)}; give {sorted(self._tensors)}")
        for name, tensor in self._tensors.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict[{name!r}] has shape {tuple(state_dict[name].shape)}; give {tuple(tensor.shape)}"
                )
        for name, tensor in self._tensors.items():
            tensor.copy_(state_dict[name])

    def select(self, indices: Tensor) -> State:
        """Copies some lanes to a new state.

        Args:
            indices: `[N]` int64 lane numbers, in the order wanted; a lane may be taken several times.

        Returns:
            A state of `N` lanes that shares no memory with this one.
        """
        picked = self._pick(indices)
        return State(int(indices.numel()), picked, self._lane_axis)

    def _pick(self, indices: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            return {
                name: tensor.index_select(self._lane_axis[name], indices.to(tensor.device))
                for name, tensor in self._tensors.items()
            }
