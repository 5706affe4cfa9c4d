"""The memory of attention while acting: keys and values of the last timesteps of every lane, at fixed addresses.

Dimensions: `B` lanes, `H` heads, `M` slots, `S` pinned slots, `R = M - S` slots of the ring, `E` head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..inputs import check_devices, check_floats
from .decode_ops import DecodeScratch


@dataclass
class RingCache:
    """Keys and values of the first `S` and the last `R` timesteps of every lane; all tensors stay at fixed addresses.

    Timesteps are counted from the lane's last reset. Timestep `p` lies in slot `p` while `p < S`: these slots are
    pinned, only a reset lets them be written again. Later timesteps go round the other `R = M - S` slots: slot
    `S + (p - S) % R`. Until timestep `M` that is slot `p` as well. Without pinned slots it is slot `p % M`.
    Slots a lane has not written since its last reset may hold anything, NaN included: they are never used.

    Attributes:
        keys: `[B, H, M, E]`.
        values: `[B, H, M, E]`.
        length: `[B]` int64, timesteps since the lane's last reset.
        steps: timesteps decoded since allocation, known to the host: no lane can be longer. None if unknown. It only
            spares work on slots that no lane has reached yet. Resets leave it alone, so that what one lane computes
            never depends, not even in rounding, on what happens to another.
        sink: `S`, the pinned slots.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    steps: int | None = None
    sink: int = 0
    _scratch: DecodeScratch | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: if shapes, dtypes or devices disagree, or no slot is left for the ring.
        """
        if self.keys.dim() != 4 or self.values.shape != self.keys.shape or self.values.dtype != self.keys.dtype:
            raise ValueError(
                f"keys {self.keys.dtype} {tuple(self.keys.shape)} and values {self.values.dtype} "
                f"{tuple(self.values.shape)} must share one dtype and one shape [B, H, M, E]"
            )
        if self.length.dtype != torch.int64 or self.length.shape != self.keys.shape[:1]:
            raise ValueError(
                f"length is {self.length.dtype} {tuple(self.length.shape)}; give torch.int64 ({self.keys.shape[0]},)"
            )
        check_floats(keys=self.keys, values=self.values)
        check_devices(keys=self.keys, length=self.length)
        if not 0 <= self.sink < self.slots:
            raise ValueError(
                f"sink={self.sink} is not allowed with {self.slots} slots; give an integer in [0, {self.slots - 1}]"
            )
        if self.keys.is_cuda:
            # Now, not at first use: that may be while a graph is traced or captured, which would own the memory then.
            _ = self.scratch

    @classmethod
    def allocate(
        cls,
        batch: int,
        heads: int,
        slots: int,
        head_dim: int,
        *,
        sink: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RingCache:
        """An empty cache.

        Args:
            batch: lanes `B`.
            heads: `H`.
            slots: `M`, the timesteps kept per lane, pinned ones included.
            head_dim: `E`.
            sink: `S`, the first timesteps since a reset, which are never overwritten.
            dtype: of keys and values.
            device: of all tensors.

        Returns:
            A cache with all lengths 0.

        Raises:
            ValueError: if a size is below 1, or `sink` leaves no slot for the ring.
        """
        for name, size in (("batch", batch), ("heads", heads), ("slots", slots), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name}={size} is not allowed; give an integer >= 1")
        keys, values = allocate_storage((batch, heads), slots, head_dim, dtype=dtype, device=device)
        with torch.inference_mode(False):
            return cls(keys, values, torch.zeros(batch, dtype=torch.int64, device=device), steps=0, sink=sink)

    @property
    def slots(self) -> int:
        """`M`, the timesteps kept per lane, pinned ones included."""
        return self.keys.shape[2]

    @property
    def ring(self) -> int:
        """`R`, the slots that are written over and over."""
        return self.keys.shape[2] - self.sink

    @property
    def scratch(self) -> DecodeScratch:
        """What the "triton" backend needs besides the cache, at fixed addresses as well.

        Raises:
            RuntimeError: if memory would have to be allocated while a CUDA graph is captured.
        """
        if self._scratch is None or not self._scratch.serves(self.keys):
            if self.keys.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a cache must be made, or moved and used once, before a CUDA graph is captured")
            self._scratch = DecodeScratch.allocate(self.keys)
        return self._scratch

    def slot_of(self, timestep: Tensor) -> Tensor:
        """Where timesteps are kept.

        Args:
            timestep: int64, any shape, counted from the last reset.

        Returns:
            Slots, like `timestep`.
        """
        if self.sink == 0:
            return timestep % self.slots
        return torch.where(timestep < self.sink, timestep, self.sink + (timestep - self.sink) % self.ring)

    def held_timesteps(self, latest: Tensor) -> Tensor:
        """What every slot holds.

        Args:
            latest: `[B]` int64, the latest timestep written, counted from the lane's last reset.

        Returns:
            `[B, M]` int64 timesteps; of no meaning where the slot number is above `latest`, for nothing lies there.
        """
        index = torch.arange(self.slots, device=latest.device)
        newest = latest[:, None] - (latest[:, None] - index) % self.ring
        return newest if self.sink == 0 else torch.where(index < self.sink, index, newest)

    def advance(self) -> None:
        """Counts one timestep for every lane, in place."""
        self.length.add_(1)
        if self.steps is not None:
            self.steps += 1


def allocate_storage(
    leading: tuple[int, ...], slots: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Zeroed keys and values in the memory order that decoding reads fastest.

    Args:
        leading: leading sizes, for example `(B, H)`.
        slots: `M`.
        head_dim: `E`.
        dtype: of both.
        device: of both.

    Returns:
        Keys and values `[*leading, M, E]`. On the CPU, in float32 and float64, the keys lie in memory as
        `[*leading, E, M]`: the "matmul" backend then runs along the slots, up to 2.5 times as fast.
    """
    # Tensors made under inference_mode could never be updated outside of it.
    with torch.inference_mode(False):
        values = torch.zeros((*leading, slots, head_dim), dtype=dtype, device=device)
        if values.device.type == "cpu" and dtype in (torch.float32, torch.float64):
            return torch.zeros((*leading, head_dim, slots), dtype=dtype, device=device).transpose(-1, -2), values
        return torch.zeros_like(values), values


def reset_lanes(cache: RingCache, mask: Tensor) -> None:
    """Forgets everything some lanes have seen, in place: lengths become 0, keys and values stay where they are.

    Args:
        cache: the cache.
        mask: `[B]` bool; True forgets the lane.

    Raises:
        ValueError: if `mask` is not `[B]` bool, or not where the cache is.
    """
    if mask.dtype != torch.bool or mask.shape != cache.length.shape:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; give torch.bool {tuple(cache.length.shape)}")
    check_devices(length=cache.length, mask=mask)
    cache.length.masked_fill_(mask, 0)
