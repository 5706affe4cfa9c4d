"""Sequence backbones beside each other: size, training speed, and the time of one timestep while acting.

All have width 128 and two layers, on 64 input features. Training is forward plus backward of windows of several
lengths, with as many rows as make the same number of timesteps; a Transformer then sees the whole window. Acting is one
`step` of all lanes; a Transformer's ring buffer has 128 slots and is full.
Every backbone's steps are first compared with its window; where they disagree the script stops and reports nothing.
Medians of calls in a row are reported: whatever else the machine does shows, so use a quiet one.

    python benchmarks/backbones.py [--only gru ...] [--quick] [--markdown] [--threads 2] [--device cuda] [--out r.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import report
from torch import Tensor

from amago_kernels.testing import error_ratio
from amago_nets.traj_encoders import (
    FFConfig,
    GRUConfig,
    LRUConfig,
    LSTMConfig,
    MambaConfig,
    MinGRUConfig,
    TrajEncoder,
    TransformerConfig,
)

IN_DIM = 64
SLOTS = 128
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
CONFIGS = {
    "ff": FFConfig(d_model=128, n_layers=2),
    "gru": GRUConfig(d_hidden=128, n_layers=2, d_output=128),
    "lstm": LSTMConfig(d_hidden=128, n_layers=2, d_output=128),
    "min_gru": MinGRUConfig(d_model=128, n_layers=2),
    "lru": LRUConfig(d_model=128, n_layers=2),
    "mamba": MambaConfig(d_model=128, n_layers=2),
    "transformer": TransformerConfig(d_model=128, n_heads=4, n_layers=2, dropout_ff=0.0, dropout_emb=0.0),
}


def median_s(call: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2) -> float:
    """Median wall-clock seconds of a call."""
    times = []
    for repeat in range(repeats + warmup):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= warmup:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def build(name: str, max_seq_len: int, args: argparse.Namespace) -> TrajEncoder:
    """The backbone, with the same weights every time."""
    torch.manual_seed(0)
    return CONFIGS[name].build(IN_DIM, max_seq_len).to(device=args.device, dtype=getattr(torch, args.dtype))


def inputs(module: TrajEncoder, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random windows `[B, L, D]` and their times `[B, L]`."""
    parameter = next(module.parameters())
    x = torch.randn(batch, length, IN_DIM).to(parameter)
    return x, torch.arange(length, device=parameter.device).expand(batch, length).contiguous()


@torch.no_grad()
def agree(name: str, args: argparse.Namespace) -> None:
    """Refuses to go on if steps and window differ."""
    module = build(name, SLOTS, args).eval()
    x, time_idx = inputs(module, 3, SLOTS + 16)
    state = module.initial_state(3)
    out = torch.stack([module.step(x[:, t], time_idx[:, t], state) for t in range(x.shape[1])], dim=1)
    error = error_ratio(out, module(x, time_idx)[0])
    if not error < TOLERANCES[getattr(torch, args.dtype)]:
        raise SystemExit(f"{name}: steps differ from the window by {error:.3g}; nothing is reported")


def train_speed(name: str, length: int, args: argparse.Namespace) -> float:
    """Timesteps per second, forward plus backward to inputs and weights."""
    module = build(name, length, args)
    x, time_idx = inputs(module, max(1, args.timesteps // length), length)
    x.requires_grad_()

    def call() -> None:
        module(x, time_idx)[0].square().mean().backward()
        module.zero_grad()
        x.grad = None

    return x.shape[0] * length / median_s(call, args.repeats, x.device)


@torch.no_grad()
def step_us(name: str, lanes: int, args: argparse.Namespace) -> float:
    """Microseconds of one step of all lanes that have seen `SLOTS` timesteps and more."""
    module = build(name, SLOTS, args).eval()
    x, time_idx = inputs(module, lanes, SLOTS)
    state = module.initial_state(lanes)
    module(x, time_idx, None, state)
    now, here = time_idx[:, -1] + 1, x[:, 0].contiguous()
    return 1e6 * median_s(lambda: module.step(here, now, state), 30 * args.repeats, x.device, warmup=SLOTS // 8)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, numbers with three digits."""
    lines = [list(rows[0]), ["---"] + ["---:"] * (len(rows[0]) - 1)]
    for row in rows:
        lines.append([_rounded(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounded(value: Any) -> str:
    return (
        f"{float(f'{value:.3g}'):,.15g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=[str(dtype).split(".")[1] for dtype in TOLERANCES], default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--timesteps", type=int, default=4096, help="of a training batch")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="a quarter of the timesteps, the small sizes, 3 repeats")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown too")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.lanes = sorted(args.lengths)[:2], sorted(args.lanes)[:2]
        args.timesteps, args.repeats = args.timesteps // 4, 3
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.only:
        agree(name, args)
        row: dict[str, Any] = {"backbone": name}
        row["parameters"] = sum(p.numel() for p in build(name, SLOTS, args).parameters())
        row.update({f"train L{n}, steps/s": train_speed(name, n, args) for n in args.lengths})
        row.update({f"act {n} lanes, us": step_us(name, n, args) for n in args.lanes})
        rows.append(row)
    report("backbones", rows, args.out, settings={**vars(args), "torch": torch.__version__})
    if args.markdown:
        print(as_markdown(rows))


if __name__ == "__main__":
    main()
