"""Contenders that several operations share, and scans in plain PyTorch that can be compiled.

Dimensions: `B` batch, `L` timesteps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from cases import REFERENCE, Contender, Inputs, Run
from torch import Tensor

from amago_kernels import available, dispatch

# Backends that are no fast paths of ours: the reference, and those that call what others have written.
_OTHERS = {
    "reference": REFERENCE,
    "flash": "flash-attn",
    "flex": "flex_attention, compiled",
    "mamba_ssm": "mamba-ssm, our layout",
    "causal_conv1d": "causal-conv1d, our layout",
}
_CHUNK = 32
# Timesteps beyond which a loop over them is not timed on CUDA devices.
LONGEST_LOOP = 1024


def lineup(
    operation: str,
    call: Callable[[Inputs, str], Tensor],
    others: Sequence[Contender] = (),
    *,
    skip: Sequence[str] = (),
    backward: bool = True,
) -> list[Contender]:
    """Every backend of ours that can run here, then others, then the eager reference.

    Args:
        operation: key of `amago_kernels.available()`.
        call: runs the operation on inputs by a backend.
        others: who else takes part.
        skip: backends that are left out.
        backward: whether ours can be differentiated.

    Returns:
        One contender each; backends that wrap a package bear its name.
    """
    names = [name for name in available()[operation] if name not in skip]
    made = [
        Contender(
            _OTHERS.get(name, f"ours: {name}"),
            lambda inputs, name=name: Run(partial(call, inputs, name)),
            backend=name,
            compiled=name == "flex",
            forward=name != "flex",
            backward=backward,
        )
        for name in reversed(names)
    ]
    fast = [contender for contender in made if contender.name != REFERENCE]
    return [*fast, *others, *(contender for contender in made if contender.name == REFERENCE)]


def without_long_loops(device: torch.device, length: int) -> tuple[str, ...]:
    """Leaves the eager reference out where its loop over timesteps would take most of the time there is.

    Args:
        device: where.
        length: timesteps.

    Returns:
        Backends to skip.
    """
    return ("reference",) if device.type == "cuda" and length > LONGEST_LOOP else ()


def plain(name: str, call: Callable[[Inputs], Tensor], **options: Any) -> Contender:
    """A contender that takes the inputs as they are.

    Args:
        name: for the table.
        call: computes the output.
        options: of `Contender`.

    Returns:
        The contender.
    """
    return Contender(name, lambda inputs: Run(partial(call, inputs)), **options)


def compiled(
    name: str, call: Callable[[Inputs], Tensor], *, forward: bool = True, keeps_graph: bool = False
) -> Contender:
    """The same by torch.compile, for one shape.

    Args:
        name: for the table.
        call: computes the output.
        forward: as in `Contender`.
        keeps_graph: the backward pass runs several times on one forward pass.

    Returns:
        The contender.
    """

    def make(inputs: Inputs) -> Run:
        _allow_many_shapes()
        function = torch.compile(call, dynamic=False)

        def run() -> Tensor:
            if not keeps_graph:
                return function(inputs)
            from torch._functorch import config

            # The backward pass would otherwise compute into what the forward pass saved.
            with config.patch(donated_buffer=False):
                return function(inputs)

        return Run(run)

    return Contender(name, make, compiled=True, forward=forward)


def _allow_many_shapes() -> None:
    """Beyond eight shapes torch.compile would silently go on without compiling."""
    from torch._dynamo import config

    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, 256)


def doubling_scan(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + b_t` in log2(L) passes.

    Args:
        a: factors `[B, L, ...]`.
        b: terms, like `a`.

    Returns:
        Products of factors up to every timestep, and the states.
    """
    shift = 1
    while shift < b.shape[1]:
        earlier_b = torch.cat([torch.zeros_like(b[:, :shift]), b[:, :-shift]], dim=1)
        earlier_a = torch.cat([torch.ones_like(a[:, :shift]), a[:, :-shift]], dim=1)
        a, b = a * earlier_a, a * earlier_b + b
        shift *= 2
    return a, b


def chunked_scan(a: Tensor, b: Tensor) -> Tensor:
    """The same in chunks of 32 timesteps: within them, over their ends, and one more pass.

    Args:
        a: factors `[B, L, ...]`.
        b: terms, like `a`.

    Returns:
        The states, like `b`.
    """
    batch, length = b.shape[:2]
    if length <= _CHUNK or length % _CHUNK:
        return doubling_scan(a, b)[1]
    split = (batch, length // _CHUNK, _CHUNK, *b.shape[2:])
    factors, states = (x.flatten(0, 1) for x in (a.reshape(split), b.reshape(split)))
    factors, states = (x.view(split) for x in doubling_scan(factors, states))
    carried = doubling_scan(factors[:, :, -1], states[:, :, -1])[1]
    before = torch.cat([torch.zeros_like(carried[:, :1]), carried[:, :-1]], dim=1)
    return (states + factors * before.unsqueeze(2)).view(b.shape)


def auto_choice(call: Callable[[], Any]) -> str:
    """The backend that `backend="auto"` takes.

    Args:
        call: runs the operation once.

    Returns:
        Its name; "?" if nobody asked.
    """
    with _listening() as chosen, torch.no_grad():
        call()
    return chosen[0] if chosen else "?"


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Notes every answer of `dispatch.choose`, in whatever module it was imported."""
    chosen: list[str] = []
    choose = dispatch.choose

    def listen(operation: str, backend: str, *rest: Any) -> str:
        answer = choose(operation, backend, *rest)
        chosen.append(answer)
        return answer

    modules = [module for name, module in sys.modules.items() if name.startswith("amago_kernels.")]
    asking = [module for module in modules if getattr(module, "choose", None) is choose]
    for module in asking:
        module.choose = listen
        for value in list(vars(module).values()):
            # An answer that is remembered is not asked for again.
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    try:
        yield chosen
    finally:
        for module in asking:
            module.choose = choose
