"""What operations ask of their inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute and keep states in: float32, or float64 if any input is.

    Args:
        tensors: inputs; None is skipped.

    Returns:
        `torch.float32` or `torch.float64`.
    """
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which products keep the dtype of their inputs.

    Args:
        device: where the inputs are.

    Returns:
        One that does nothing where autocast is off anyway.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def drop_idle(reset: Tensor | None) -> Tensor | None:
    """Forgets resets of which the host can see, without a stall, that there are none; not to be traced.

    Args:
        reset: `[B, L]` bool or None.

    Returns:
        `reset`, or None.
    """
    return None if reset is None or (reset.device.type == "cpu" and not bool(reset.any())) else reset


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that a kernel has changed a tensor.

    Args:
        tensor: what was written to.
    """
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape.

    Args:
        name: of the argument, for the message.
        tensor: the argument; None passes.
        shape: what it should have.

    Raises:
        ValueError: if the shapes differ.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give {shape}")


def check_reset(reset: Tensor | None, batch: int, length: int) -> None:
    """Refuses resets that are not one bool per timestep.

    Args:
        reset: the argument; None passes.
        batch: `B`.
        length: `L`.

    Raises:
        ValueError: if dtype or shape differ.
    """
    if reset is not None and (reset.dtype != torch.bool or tuple(reset.shape) != (batch, length)):
        raise ValueError(f"reset is {reset.dtype} {tuple(reset.shape)}; give torch.bool {(batch, length)}")


def check_floats(**tensors: Tensor | None) -> None:
    """Refuses integers and complex numbers, and tensors that are not on one device.

    Args:
        tensors: arguments by name, None passes; the first says which device.

    Raises:
        ValueError: if one is no float, or not where the first is.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; give a floating dtype")
    check_devices(**tensors)


def check_devices(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not on one device.

    Args:
        tensors: arguments by name, None passes; the first, which is not None, says which device.

    Raises:
        ValueError: if one is not where the first is.
    """
    (first, home), *others = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in others:
        if tensor.device != home.device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {home.device}; give one device")


def check_count(name: str, value: int | None, allowed: str = "an integer >= 0") -> None:
    """Refuses what is no integer from 0.

    Args:
        name: of the argument, for the message.
        value: the argument; None passes.
        allowed: what to give, for the message.

    Raises:
        ValueError: if it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{name}={value!r} is not allowed; give {allowed}")
