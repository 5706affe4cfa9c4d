"""The memory of a Transformer between timesteps: one ring buffer of keys and values per layer.

Dimensions: `N` layers, `B` lanes, `H` heads, `M` slots, `S` pinned slots, `E` head size, `L` timesteps of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amago_kernels import RingCache, allocate_storage

from .state import State


class TransformerState(State):
    """Ring buffers of all layers over one storage, with one length per lane.

    Args:
        keys: `[N, B, H, M, E]`.
        values: `[N, B, H, M, E]`.
        length: `[B]` int64, timesteps since the lane's last reset.
        steps: timesteps stepped since the state was made; see `RingCache.steps`.
        sink: pinned slots `S` of every layer; see `RingCache`.

    Attributes:
        sizes: `(N, H, M, E, S)`.
        caches: the ring buffer of every layer.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor, steps: int | None, sink: int = 0) -> None:
        super().__init__(
            keys.shape[1],
            {"keys": keys, "values": values, "length": length},
            {"keys": 1, "values": 1, "length": 0},
        )
        self.sizes = (keys.shape[0], keys.shape[2], keys.shape[3], keys.shape[4], sink)
        # The layers share `length`; the first cache is the clock that counts for all of them.
        self.caches = [
            RingCache(keys[i], values[i], length, steps if i == 0 else None, sink) for i in range(keys.shape[0])
        ]

    @classmethod
    def allocate(
        cls,
        layers: int,
        lanes: int,
        heads: int,
        slots: int,
        head_dim: int,
        *,
        sink: int = 0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> TransformerState:
        """An empty memory.

        Args:
            layers: `N`.
            lanes: `B`.
            heads: `H`.
            slots: `M`, pinned ones included.
            head_dim: `E`.
            sink: `S`, the first timesteps of an episode, which are never overwritten.
            dtype: of keys and values.
            device: of all tensors.

        Returns:
            A state whose lanes have seen nothing.
        """
        keys, values = allocate_storage((layers, lanes, heads), slots, head_dim, dtype=dtype, device=device)
        with torch.inference_mode(False):
            return cls(keys, values, torch.zeros(lanes, dtype=torch.int64, device=device), 0, sink)

    @property
    def clock(self) -> RingCache:
        """The cache of the first layer, whose `length` and `steps` stand for all layers."""
        return self.caches[0]

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled one by one, the rings of the layers would no longer share memory with `keys` and `values`.
        return type(self), (self["keys"], self["values"], self["length"], self.clock.steps, self.clock.sink)

    def state_dict(self) -> dict[str, Tensor]:
        """See `State.state_dict`; `steps` makes a restored state repeat the original bit for bit.

        `sink` tells apart rings of one size that pin different numbers of slots.
        """
        steps = self.clock.steps
        numbers = {"steps": -1 if steps is None else steps, "sink": self.clock.sink}
        return {**super().state_dict(), **{name: torch.tensor(number) for name, number in numbers.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """See `State.load_state_dict`; `steps` and `sink` may be left out."""
        sink = int(state_dict.get("sink", self.clock.sink))
        if sink != self.clock.sink:
            raise ValueError(f"state_dict pins {sink} slots (sink); give one that pins {self.clock.sink}")
        tensors = {name: tensor for name, tensor in state_dict.items() if name not in ("steps", "sink")}
        super().load_state_dict(tensors)
        steps = int(state_dict.get("steps", torch.tensor(-1)))
        self.clock.steps = None if steps < 0 else steps

    def select(self, indices: Tensor) -> TransformerState:
        """See `State.select`."""
        layers, heads, slots, head_dim, sink = self.sizes
        picked = self._pick(indices)
        new = TransformerState.allocate(
            layers,
            int(indices.numel()),
            heads,
            slots,
            head_dim,
            sink=sink,
            dtype=self["keys"].dtype,
            device=self["keys"].device,
        )
        for name, tensor in new.tensors.items():
            tensor.copy_(picked[name])
        new.clock.steps = self.clock.steps
        return new


class Prefill:
    """Feeds a whole window to lanes that already remember something.

    The keys of a window are put behind what the ring buffer holds, oldest first, to make one longer window of
    `M + L` timesteps for `amago_kernels.attention`; `reset` marks where the memory of each lane begins. Pinned
    timesteps come first, where attention looks for sinks. Between them and the ring timesteps may be missing: they
    are nearer to the queries than they were, yet still further away than the ring reaches.

    Args:
        state: memory before the window.
        length: timesteps `L` of the window.
        reset: `[B, L]` bool, or None.
    """

    def __init__(self, state: TransformerState, length: int, reset: Tensor | None) -> None:
        cache, seen = state.clock, state.clock.length[:, None]
        if reset is not None:
            # Lanes that begin afresh find nothing: hidden from attention alone, NaN in memory would still spread.
            seen = seen.masked_fill(reset[:, :1], 0)
        slots = cache.slots
        device = seen.device
        self.state, self.slots, self.length = state, slots, length
        index = torch.arange(slots, device=device)
        # Timesteps of the episode in the order of the columns; negative ones have not happened.
        remembered = seen - slots + index
        self._stale = remembered < 0
        if cache.sink:
            remembered = torch.where((remembered > index) & (index < cache.sink), index, remembered)
        self._history = cache.slot_of(remembered.clamp(min=0))
        column = torch.arange(slots + length, device=device)
        self.reset = column == (slots - seen).clamp(min=0)
        new_length = seen + length
        pinned_before = seen > slots
        if reset is not None:
            self.reset[:, slots:] |= reset
            last = torch.where(reset, torch.arange(1, length + 1, device=device), 0).amax(dim=1, keepdim=True)
            new_length = torch.where(last > 0, length + 1 - last, new_length)
            pinned_before &= last == 0
        self._new_length = new_length[:, 0]
        # The columns that the slots take over; those of slots that hold nothing do not matter.
        kept = slots + length - new_length + cache.held_timesteps(self._new_length - 1)
        self._source = torch.where(pinned_before & (index < cache.sink), index, kept).clamp(0, slots + length - 1)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts memory in front of the keys and values of a window, and the window into memory.

        Args:
            layer: number of the layer.
            k: `[B, L, H, E]`.
            v: `[B, L, H, E]`.

        Returns:
            Keys and values `[B, M + L, H, E]`; gradients flow to `k` and `v`, none to memory.
        """
        cache = self.state.caches[layer]
        return self._extend_one(cache.keys, k), self._extend_one(cache.values, v)

    def _extend_one(self, ring: Tensor, new: Tensor) -> Tensor:
        shape = (ring.shape[0], ring.shape[1], self.slots, ring.shape[3])
        old = ring.gather(2, self._history[:, None, :, None].expand(shape))
        old = old.masked_fill(self._stale[:, None, :, None], 0.0).transpose(1, 2)
        both = torch.cat([old.to(new.dtype), new], dim=1)
        with torch.no_grad():
            kept = both.detach().transpose(1, 2).gather(2, self._source[:, None, :, None].expand(shape))
            ring.copy_(kept)
        return both

    def finish(self) -> None:
        """Counts the timesteps of the window, in place, after the last layer."""
        self.state.clock.length.copy_(self._new_length)
        if self.state.clock.steps is not None:
            self.state.clock.steps += self.length
