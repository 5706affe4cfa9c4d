from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amago_nets.input_norm import MaskedInputNorm

ROWS = torch.tensor([[1.0, 5.0], [3.0, 5.0], [4.0, 4.0]])


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_first_update_by_hand() -> None:
    norm = MaskedInputNorm(2)
    y = norm(ROWS)
    close(norm.mu, [1.3334, 2.33345])
    close(norm.nu, [4.8335250, 11.5005250])
    close(norm.sigma, [1.7480216, 2.4608019])
    close(y[0], [-0.1907299, 1.0836102])
    assert norm.count == 2


def test_later_updates_match_a_loop() -> None:
    norm, mu, nu = MaskedInputNorm(3), torch.zeros(3).double(), torch.ones(3).double()
    generator = torch.Generator().manual_seed(0)
    for t in range(2, 8):
        x = torch.randn(4, 5, 3, generator=generator) * 3 + 7
        mask = torch.rand(4, 5, generator=generator) < 0.6
        valid = x[mask].double()
        beta_t = 1e-4 / (1 - (1 - 1e-4) ** t)
        mu = (1 - beta_t) * mu + beta_t * valid.mean(0)
        nu = (1 - beta_t) * nu + beta_t * valid.square().mean(0)
        y = norm(x, mask)
        torch.testing.assert_close(norm.mu, mu)
        torch.testing.assert_close(norm.nu, nu)
        sigma = (nu - mu.square() + 1e-5).sqrt()
        torch.testing.assert_close(y, ((x.double() - mu) / sigma).float())


def test_count_from_zero_takes_the_first_batch() -> None:
    norm = MaskedInputNorm(2, initial_count=0)
    norm(ROWS)
    close(norm.mu, [8 / 3, 14 / 3])


@pytest.mark.parametrize("garbage", [0.0, 4.0, 1e30, float("inf"), float("nan")])
def test_padding_is_inert(garbage: float) -> None:
    norm, padded_norm = MaskedInputNorm(2), MaskedInputNorm(2)
    padded = torch.cat([ROWS, torch.full((4, 2), garbage)])
    mask = torch.arange(7) < 3
    y, padded_y = norm(ROWS), padded_norm(padded, mask)
    assert torch.equal(y, padded_y[:3])
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, padded_norm.get_buffer(name)), name


def test_a_real_row_of_fours_counts() -> None:
    norm = MaskedInputNorm(2, initial_count=0)
    norm(torch.full((2, 3, 2), 4.0), torch.ones(2, 3, dtype=torch.bool))
    close(norm.mu, [4.0, 4.0])


def test_batch_without_valid_timesteps_is_skipped() -> None:
    norm = MaskedInputNorm(2)
    norm(ROWS)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.bool))
    for name, buffer in norm.state_dict().items():
        assert torch.equal(buffer, before[name]), name


def test_eval_changes_nothing() -> None:
    norm = MaskedInputNorm(2)
    norm(ROWS)
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    assert torch.equal(norm(ROWS), norm(ROWS))
    for name, buffer in norm.state_dict().items():
        assert torch.equal(buffer, before[name]), name


def test_constant_feature_is_centred_not_scaled() -> None:
    norm = MaskedInputNorm(1, initial_count=0)
    x = torch.full((5, 1), 3.0)
    for _ in range(3):
        y = norm(x)
    close(norm.sigma, [1e-5**0.5])
    close(y[:1, 0], [0.0])
    norm.eval()
    # Neither scaled nor clamped.
    close(norm(torch.tensor([[5e5]]))[0], [5e5 - 3.0])


def test_scaled_output_is_clamped() -> None:
    norm = MaskedInputNorm(1).eval()
    assert norm(torch.tensor([[1e9], [-1e9]])).flatten().tolist() == [1e4, -1e4]


def test_offset_does_not_cancel() -> None:
    norm = MaskedInputNorm(1, initial_count=0)
    x = torch.tensor([[1e5 - 1.0], [1e5 + 1.0]])
    for _ in range(5):
        y = norm(x)
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]), rtol=1e-3, atol=1e-3)


def test_statistics_survive_half_precision() -> None:
    norm = MaskedInputNorm(2)
    norm(ROWS)
    before = copy.deepcopy(norm.state_dict())
    norm.bfloat16()
    for name, buffer in norm.state_dict().items():
        assert buffer.dtype == torch.float64
        assert torch.equal(buffer, before[name]), name
    assert norm(ROWS.bfloat16()).dtype == torch.bfloat16


def test_loading_statistics_takes_effect() -> None:
    norm, other = MaskedInputNorm(2), MaskedInputNorm(2).eval()
    y = norm(ROWS)
    assert set(norm.state_dict()) == {"mu", "nu", "count"}
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(ROWS), y)


def test_two_forwards_then_one_backward() -> None:
    norm = MaskedInputNorm(2).double()
    x = ROWS.double().requires_grad_()
    first_scale = None
    total = x.new_zeros(())
    for factor in (1.0, 2.0):
        total = total + norm(x * factor).sum()
        first_scale = 1 / norm.sigma if first_scale is None else first_scale
    total.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (first_scale + 2 / norm.sigma).expand(3, 2))


WORKER = """
import json, sys, torch
from amago_nets.input_norm import MaskedInputNorm
rank, address = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
norm = MaskedInputNorm(2)
rows = torch.tensor([[1.0, 5.0], [3.0, 5.0], [4.0, 4.0]])
norm(rows, torch.tensor([[True, False, False], [False, True, True]][rank]))
norm(rows, torch.tensor([[True, True, True], [False, False, False]][rank]))
print(json.dumps([norm.mu.tolist(), norm.nu.tolist(), norm.count.item()]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_share_statistics(tmp_path: Path) -> None:
    address = (tmp_path / "rendezvous").as_uri()
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), address], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    norm = MaskedInputNorm(2)
    norm(ROWS)
    norm(ROWS)
    assert results[0] == results[1]
    close(norm.mu, results[0][0])
    close(norm.nu, results[0][1])
    assert results[0][2] == norm.count.item()


def test_gradient_reaches_the_input_only_by_the_scale() -> None:
    norm = MaskedInputNorm(2)
    x = ROWS.clone().requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (1 / norm.sigma).float().expand(3, 2))


def test_compiled_updates_are_kept() -> None:
    norm, compiled_norm = MaskedInputNorm(2), MaskedInputNorm(2)
    compiled = torch.compile(compiled_norm, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(ROWS, ROWS[:, 0] > 1), norm(ROWS, ROWS[:, 0] > 1))
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(compiled_norm.get_buffer(name), buffer)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        MaskedInputNorm(0)
    with pytest.raises(ValueError, match="beta=1.0"):
        MaskedInputNorm(2, beta=1.0)
