"""The check of compiled training: P14."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._case import Case, gradients, loss, trained


def check_compile(case: Case) -> None:
    """P14: forward and backward in training mode, compiled as one graph and not."""
    module = case.module
    torch.compiler.reset()
    module.train()
    try:
        compiled = torch.compile(module, fullgraph=True)
        for pattern in ("none", "some"):
            reset = case.resets(pattern)
            message = f"P14 (compile), resets: {pattern}"
            expected, expected_grads = _train(case, module, reset)
            try:
                out, grads = _train(case, compiled, reset)
            except Exception as error:
                raise AssertionError(f"{message}: {type(error).__name__}: {error}") from error
            case.close(out, expected, f"{message}: outputs")
            case.close_gradients(grads, expected_grads, f"{message}: gradients")
    finally:
        module.eval()
        torch.compiler.reset()


def _train(case: Case, module: Any, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    x = case.x.clone().requires_grad_()
    out = module(x, case.times(reset), reset)[0]
    return out.detach(), gradients(loss(out), [x, *trained(module)])
