"""The registered operator of one decode timestep on Triton, and the memory its programs share.

Dimensions: `B` lanes, `H` heads, `M` slots, `E` head size, `P` programs per head of a lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Enough that the last ones to finish leave little of the device idle.
_PROGRAMS_PER_MULTIPROCESSOR = 12
# Fewer slots than these are read in less time than it takes to start a program and to combine its result.
_SLOTS_PER_PROGRAM = 256
_MOST_SPLITS = 32
# Of the interpreter, where there is nothing to fill: an H100.
_MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What the programs of one launch tell each other; every launch leaves it as it found it.

    Attributes:
        shape: of the keys it is for, `[B, H, M, E]`.
        splits: `P`, a power of two.
        counters: `[B, H + 1]` int32 zeros; programs that have arrived, per head and, last, per lane.
        partials: `[B, H, P, E + 4]` float32, results of single programs; empty if there is one program per head.
    """

    shape: torch.Size
    splits: int
    counters: Tensor
    partials: Tensor

    @classmethod
    def allocate(cls, keys: Tensor, splits: int | None = None) -> DecodeScratch:
        """Memory for the launches on one cache.

        Args:
            keys: `[B, H, M, E]`, those of the cache.
            splits: `P`; by default what `count_splits` says.

        Returns:
            The memory.
        """
        batch, heads, slots, head_dim = keys.shape
        if splits is None:
            splits = count_splits(batch, heads, slots, keys.device)
        with torch.inference_mode(False):
            counters = torch.zeros(batch, heads + 1, dtype=torch.int32, device=keys.device)
            handed = splits if splits > 1 else 0
            partials = torch.zeros(batch, heads, handed, head_dim + 4, dtype=torch.float32, device=keys.device)
        return cls(keys.shape, splits, counters, partials)

    def serves(self, keys: Tensor) -> bool:
        """Whether it is for keys of this shape and device."""
        return self.shape == keys.shape and self.counters.device == keys.device


def count_splits(batch: int, heads: int, slots: int, device: torch.device) -> int:
    """Programs that share the slots of one head of one lane: as many as it takes to fill the device, if there is work.

    Args:
        batch: `B`.
        heads: `H`.
        slots: `M`.
        device: of the cache.

    Returns:
        `P`, a power of two. It depends on sizes alone: neither on lengths, which only the device knows, nor on time.
    """
    multiprocessors = _MULTIPROCESSORS
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = 1
    while (
        batch * heads * splits < _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        and slots >= 2 * splits * _SLOTS_PER_PROGRAM
        and splits < _MOST_SPLITS
    ):
        splits *= 2
    return splits


@torch.library.custom_op(
    "amago_kernels::decode_attention_triton",
    mutates_args=("keys", "values", "length", "counters", "partials"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) length, Tensor(d!) counters, "
        "Tensor(e!) partials, int pinned, int? window, int sink, float sink_bias, float? logit_clip, float scale, "
        "bool advance, int splits) -> Tensor"
    ),
)
def decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    counters: Tensor,
    partials: Tensor,
    pinned: int,
    window: int | None,
    sink: int,
    sink_bias: float,
    logit_clip: float | None,
    scale: float,
    advance: bool,
    splits: int,
) -> Tensor:
    """`triton_decode.launch_decode` for graphs."""
    from .triton_decode import launch_decode

    return launch_decode(
        q,
        k,
        v,
        keys,
        values,
        length,
        counters,
        partials,
        pinned,
        window,
        sink,
        sink_bias,
        logit_clip,
        scale,
        advance,
        splits,
    )


@decode_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    counters: Tensor,
    partials: Tensor,
    pinned: int,
    window: int | None,
    sink: int,
    sink_bias: float,
    logit_clip: float | None,
    scale: float,
    advance: bool,
    splits: int,
) -> Tensor:
    return q.new_empty(q.shape)
