"""Triton kernels of the return functions.

Dimensions: `B` batch, `T` transitions, `G` discounts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, on_device, tuned
from .call import Transitions

if TYPE_CHECKING:
    from ..builds import Build


@triton.jit
def _in_turn(factor_before, term_before, factor, term):
    # A factor of 0 forgets what came before, NaN and infinity included.
    return factor_before * factor, tl.where(factor == 0.0, term, factor * term_before + term)


# Few discounts per program where lanes alone do not fill the device; tiles that hold whole windows of usual length.
@tuned(
    [
        config(8, TILE=4096, BLOCK_G=4),
        config(8, TILE=4096, BLOCK_G=8),
        config(4, TILE=2048, BLOCK_G=4),
        config(4, TILE=2048, BLOCK_G=8),
    ],
    key=("SPAN", "WIDTH", "ENDS_ONLY"),
)
@triton.jit
def lambda_kernel(
    rewards,
    terminated,
    truncated,
    next_values,
    gammas,
    mask,
    out,
    length,
    discounts,
    lambda_,
    reward_lane,
    reward_time,
    terminated_lane,
    terminated_time,
    truncated_lane,
    truncated_time,
    mask_lane,
    mask_time,
    value_lane,
    value_time,
    value_discount,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    ENDS_ONLY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """TD(lambda) returns of one lane and a block of discounts, tile by tile from the last transition to the first."""
    COLUMNS: tl.constexpr = WIDTH if WIDTH < BLOCK_G else BLOCK_G
    LONGEST: tl.constexpr = TILE // COLUMNS
    BLOCK_T: tl.constexpr = SPAN if SPAN < LONGEST else LONGEST
    # The blocks of a lane side by side: they read the same cache lines.
    blocks = tl.cdiv(discounts, COLUMNS)
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    gamma = tl.load(gammas + column, mask=column < discounts, other=0.0).to(tl.float32)
    place = tl.arange(0, BLOCK_T)
    carry = tl.zeros([COLUMNS], dtype=tl.float32)
    for tile in range(0, tl.cdiv(length, BLOCK_T)):
        # Times descend, so that a scan over places runs back in time.
        time = (length - 1 - tile * BLOCK_T - place).to(tl.int64)
        inside = time >= 0
        entry = inside[:, None] & (column < discounts)[None, :]
        follows = inside & (time + 1 < length)
        goes_on = tl.load(mask + lane * mask_lane + (time + 1) * mask_time, mask=follows, other=0) != 0
        ended = tl.load(terminated + lane * terminated_lane + time * terminated_time, mask=inside, other=1) != 0
        goes_on = goes_on & (ended == 0)
        if truncated is not None:
            cut = tl.load(truncated + lane * truncated_lane + time * truncated_time, mask=inside, other=1)
            goes_on = goes_on & (cut == 0)
        reward = tl.load(rewards + lane * reward_lane + time * reward_time, mask=inside, other=0.0).to(tl.float32)
        term = reward[:, None] + tl.zeros([BLOCK_T, COLUMNS], dtype=tl.float32)
        if next_values is not None:
            weight = tl.where(ended, 0.0, tl.where(goes_on, 1.0 - lambda_, 1.0))
            address = next_values + lane * value_lane + time[:, None] * value_time + column[None, :] * value_discount
            used = (weight != 0.0)[:, None]
            # Not to wait for the flags is worth more than a few bytes, unless it is nearly all of them.
            value = tl.load(address, mask=entry & used if ENDS_ONLY else entry, other=0.0).to(tl.float32)
            term += weight[:, None] * tl.where(used, value, 0.0) * gamma[None, :]
        factor = tl.where(goes_on, lambda_, 0.0)[:, None] * gamma[None, :]
        factor, term = tl.associative_scan((factor, term), 0, _in_turn)
        returns = tl.where(factor == 0.0, term, factor * carry[None, :] + term)
        address = out + (lane * length + time[:, None]) * discounts + column[None, :]
        tl.store(address, returns.to(out.dtype.element_ty), mask=entry)
        carry = tl.sum(tl.where((place == BLOCK_T - 1)[:, None], returns, 0.0), axis=0)


@tuned([config(4, BLOCK_T=128), config(2, BLOCK_T=64), config(8, BLOCK_T=128)], key=("BLOCK_G",))
@triton.jit
def n_step_kernel(
    rewards,
    terminated,
    truncated,
    next_values,
    gammas,
    mask,
    out,
    length,
    discounts,
    n,
    reward_lane,
    reward_time,
    terminated_lane,
    terminated_time,
    truncated_lane,
    truncated_time,
    mask_lane,
    mask_time,
    value_lane,
    value_time,
    value_discount,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """n-step targets of a block of transitions of one lane and a block of discounts."""
    lane = tl.program_id(0).to(tl.int64)
    time = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    gamma = tl.load(gammas + column, mask=column < discounts, other=0.0).to(tl.float32)
    discount = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_G], dtype=tl.float32)
    power = tl.zeros([BLOCK_T, BLOCK_G], dtype=tl.float32)
    within = time < length
    bootstraps = time < 0
    last = time
    for step in range(0, n):
        # Read whether a sum still goes on or not, so that no load waits for the flags of the step before.
        now = time + step
        inside = now < length
        ended = tl.load(terminated + lane * terminated_lane + now * terminated_time, mask=inside, other=1) != 0
        reward = tl.load(rewards + lane * reward_lane + now * reward_time, mask=inside, other=0.0).to(tl.float32)
        follows = now + 1 < length
        goes_on = tl.load(mask + lane * mask_lane + (now + 1) * mask_time, mask=follows, other=0) != 0
        goes_on = goes_on & (ended == 0)
        if truncated is not None:
            cut = tl.load(truncated + lane * truncated_lane + now * truncated_time, mask=inside, other=1)
            goes_on = goes_on & (cut == 0)
        total += discount[None, :] * tl.where(within, reward, 0.0)[:, None]
        discount *= gamma
        power = tl.where(within[:, None], discount[None, :], power)
        bootstraps = (within & (ended == 0)) | (bootstraps & (within == 0))
        last = tl.where(within, now, last)
        within = within & goes_on
    entry = (time < length)[:, None] & (column < discounts)[None, :]
    address = next_values + lane * value_lane + last[:, None] * value_time + column[None, :] * value_discount
    value = tl.load(address, mask=entry & bootstraps[:, None], other=0.0).to(tl.float32)
    address = out + (lane * length + time[:, None]) * discounts + column[None, :]
    tl.store(address, (total + power * value).to(out.dtype.element_ty), mask=entry)


def launch_lambda(transitions: Transitions, lambda_: float) -> Tensor:
    """TD(lambda) returns; discounted ones with `lambda_` 1.

    Args:
        transitions: the inputs; no values stand for zeros.
        lambda_: weight of longer returns.

    Returns:
        `[B, T, G]`.
    """
    batch, length, discounts = transitions.shape
    out = transitions.rewards.new_empty(transitions.shape, dtype=transitions.dtype)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (batch * triton.cdiv(discounts, min(meta["WIDTH"], meta["BLOCK_G"])),)

    with on_device(out):
        lambda_kernel[grid](**_arguments(transitions), out=out, lambda_=lambda_, **_sizes(transitions, lambda_))
    return out


def launch_n_step(transitions: Transitions, n: int) -> Tensor:
    """n-step targets.

    Args:
        transitions: the inputs, with values.
        n: horizon in transitions.

    Returns:
        `[B, T, G]`.
    """
    batch, length, discounts = transitions.shape
    out = transitions.rewards.new_empty(transitions.shape, dtype=transitions.dtype)
    block_g = min(triton.next_power_of_2(discounts), 8)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return batch, triton.cdiv(length, meta["BLOCK_T"]), triton.cdiv(discounts, block_g)

    with on_device(out):
        n_step_kernel[grid](**_arguments(transitions), out=out, n=n, BLOCK_G=block_g)
    return out


def _sizes(transitions: Transitions, lambda_: float) -> dict[str, int]:
    """What a variant of `lambda_kernel` is compiled for."""
    _, length, discounts = transitions.shape
    span, width = triton.next_power_of_2(length), triton.next_power_of_2(discounts)
    return {"SPAN": max(span, 16), "WIDTH": width, "ENDS_ONLY": lambda_ == 1.0}


def _arguments(transitions: Transitions) -> dict[str, Any]:
    """What both kernels take."""
    rewards, terminated, truncated, next_values, gammas, mask = transitions.flat()
    _, length, discounts = transitions.shape
    tensors = {"reward": rewards, "terminated": terminated, "truncated": truncated, "mask": mask, "value": next_values}
    strides = {}
    for name, tensor in tensors.items():
        axes = ("lane", "time", "discount") if name == "value" else ("lane", "time")
        for axis, label in enumerate(axes):
            strides[f"{name}_{label}"] = 0 if tensor is None else tensor.stride(axis)
    return {
        "rewards": rewards,
        "terminated": terminated.view(torch.uint8),
        "truncated": None if truncated is None else truncated.view(torch.uint8),
        "next_values": next_values,
        "gammas": gammas.contiguous(),
        "mask": mask.view(torch.uint8),
        "length": length,
        "discounts": discounts,
        **strides,
    }


def builds() -> list[Build]:
    """What `amago_kernels.builds` compiles: 64 windows of 1024 transitions, 7 discounts."""
    from ..builds import Build

    flags = torch.empty(64, 1024, dtype=torch.bool, device="meta")
    rewards, gammas = torch.empty(64, 1024, device="meta"), torch.empty(7, device="meta")
    result = []
    for operation, dtype, truncated in (
        ("lambda_returns", torch.float32, True),
        ("lambda_returns", torch.bfloat16, False),
        ("discounted_returns", None, True),
        ("n_step_targets", torch.float32, True),
        ("n_step_targets", torch.bfloat16, False),
    ):
        values = None if dtype is None else torch.empty(64, 1024, 7, dtype=dtype, device="meta")
        transitions = Transitions(rewards, flags, flags if truncated else None, values, gammas, flags)
        pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8"}
        arguments = {
            name: pointers[value.dtype] if isinstance(value, Tensor) else value
            for name, value in _arguments(transitions).items()
        }
        lambda_ = 1.0 if operation == "discounted_returns" else 0.95
        arguments |= {"out": pointers[transitions.dtype], "lambda_": lambda_, "n": 5}
        n_step = operation == "n_step_targets"
        arguments |= {"BLOCK_G": 8} if n_step else _sizes(transitions, lambda_)
        kernel = n_step_kernel if n_step else lambda_kernel
        name = f"{operation} {'no values' if dtype is None else pointers[dtype][1:]}{', truncated' * truncated}"
        result.append(Build(name, kernel, arguments))
    return result
