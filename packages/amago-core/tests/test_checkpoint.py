"""Checkpoints: exact round trips, damage, replacement, and a kill at every system call that matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from amago_core.checkpoint import checkpoint_names, latest_name, load_checkpoint, save_checkpoint, write_text_atomic
from amago_core.errors import CheckpointError

TENSORS = {
    "float64": torch.tensor([1e-300, -0.0, float("nan"), 1 / 3], dtype=torch.float64),
    "scalar": torch.tensor(1e-7),
    "bool": torch.tensor([[True, False]]),
    "int64": torch.tensor([2**62, -1]),
    "bfloat16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "uint8": torch.arange(5, dtype=torch.uint8),
}


def identical(left: torch.Tensor, right: torch.Tensor) -> bool:
    same_bits = left.contiguous().reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))
    return left.dtype == right.dtype and left.shape == right.shape and same_bits


def step(directory, number, **options):
    return save_checkpoint(
        directory, f"step-{number}", {"w": torch.full((4,), float(number))}, {"step": number}, **options
    )


def flip_byte(path, position=-3):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(bytes(data))


def test_round_trip_is_bit_exact(tmp_path):
    state = {"optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2)}}}, "epoch": 3, "none": None}
    state["generator"] = np.random.default_rng(3).bit_generator.state
    path = save_checkpoint(tmp_path / "ckpts", "first", TENSORS, state)
    loaded = load_checkpoint(tmp_path / "ckpts")
    assert loaded.name == "first" and loaded.path == path
    assert list(sorted(loaded.tensors)) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert identical(loaded.tensors[name], tensor), name
    assert loaded.state["generator"] == state["generator"]
    assert torch.equal(loaded.state["optimizer"]["state"][0]["m"], state["optimizer"]["state"][0]["m"])
    assert {file.name for file in path.iterdir()} == {"tensors.safetensors", "state.json", "manifest.json"}
    json.loads((path / "state.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_shared_memory_and_views(tmp_path):
    base = torch.arange(10.0)
    parameter = torch.nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path, "a", {"base": base, "tied": base, "view": base[2:4], "p": parameter}, {})
    loaded = load_checkpoint(tmp_path).tensors
    assert torch.equal(loaded["tied"], base) and torch.equal(loaded["view"], base[2:4])
    assert not loaded["p"].requires_grad
    loaded["base"][0] = 99.0
    assert loaded["tied"][0] == 0.0


def test_keeps_the_newest_and_points_to_it(tmp_path):
    assert latest_name(tmp_path) is None and checkpoint_names(tmp_path / "absent") == []
    for number in (9, 10, 8):  # order of writing counts, not the order of names
        step(tmp_path, number)
    assert checkpoint_names(tmp_path) == ["step-8", "step-10"]
    assert latest_name(tmp_path) == "step-8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-8"]
    step(tmp_path, 11, keep=None)
    assert len(checkpoint_names(tmp_path)) == 3


def test_same_name_is_replaced(tmp_path):
    step(tmp_path, 1)
    save_checkpoint(tmp_path, "step-1", {"w": torch.zeros(1)}, {"step": "again"})
    assert checkpoint_names(tmp_path) == ["step-1"]
    assert load_checkpoint(tmp_path).state == {"step": "again"}


@pytest.mark.parametrize("file_name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_falls_back_to_the_previous_one(tmp_path, file_name, damage):
    step(tmp_path, 1), step(tmp_path, 2)
    victim = tmp_path / "step-2" / file_name
    if damage == "flip":
        flip_byte(victim)
    elif damage == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    messages = []
    assert load_checkpoint(tmp_path, on_damaged=messages.append).state == {"step": 1}
    assert len(messages) == 1 and "step-2" in messages[0] and "\n" not in messages[0]
    with pytest.warns(UserWarning, match="step-2"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="step-2"):
        load_checkpoint(tmp_path, "step-2")
    step(tmp_path, 2)  # training again to the damaged one replaces it
    assert load_checkpoint(tmp_path).state == {"step": 2}


def test_incomplete_checkpoints_do_not_push_out_good_ones(tmp_path):
    step(tmp_path, 1), step(tmp_path, 2)
    os.truncate(tmp_path / "step-2" / "tensors.safetensors", 5)
    step(tmp_path, 3)
    assert checkpoint_names(tmp_path) == ["step-3", "step-2", "step-1"]
    step(tmp_path, 4)
    assert checkpoint_names(tmp_path) == ["step-4", "step-3"]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    for number in range(4):
        step(tmp_path, number)
    assert (tmp_path / "notes").is_dir() and load_checkpoint(tmp_path).name == "step-3"


def test_clear_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "absent")
    step(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"named 'other'.*step-1"):
        load_checkpoint(tmp_path, "other")
    flip_byte(tmp_path / "step-1" / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        load_checkpoint(tmp_path, on_damaged=lambda message: None)
    for name in ("", ".hidden", "a/b", "latest"):
        with pytest.raises(CheckpointError, match="name"):
            save_checkpoint(tmp_path, name, {}, {})
    with pytest.raises(CheckpointError, match="keep"):
        step(tmp_path, 1, keep=0)
    with pytest.raises(CheckpointError, match="must be a torch.Tensor"):
        save_checkpoint(tmp_path, "a", {"x": 3}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        step(tmp_path / "file", 1)


def test_newer_format_is_refused(tmp_path):
    path = step(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        load_checkpoint(tmp_path, "step-1")


def test_write_text_atomic(tmp_path):
    write_text_atomic(tmp_path / "a.json", "one")
    write_text_atomic(tmp_path / "a.json", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "two"


KILLER = textwrap.dedent(
    """
    import os, pathlib, shutil, signal, sys
    import torch
    from amago_core import checkpoint
    from amago_core.checkpoint import load_checkpoint, save_checkpoint

    base, replace = pathlib.Path(sys.argv[1]), sys.argv[2] == "replace"

    def save(directory, number):
        name = "same" if replace else f"step-{number}"
        save_checkpoint(directory, name, {"w": torch.full((1000,), float(number))}, {"step": number})

    def fragile(function, budget):
        def call(*args, **kwargs):
            budget[0] -= 1
            if budget[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    def fail(message):
        raise AssertionError(message)

    for kill_at in range(1, 100):
        directory = base / str(kill_at)
        save(directory, 1), save(directory, 2)
        child = os.fork()
        if child == 0:
            budget = [kill_at]
            for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
                setattr(os, name, fragile(getattr(os, name), budget))
            checkpoint.save_file = fragile(checkpoint.save_file, budget)
            save(directory, 3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        loaded = load_checkpoint(directory, on_damaged=fail)
        assert loaded.state["step"] in (2, 3) and (loaded.tensors["w"] == loaded.state["step"]).all()
        finished = os.waitstatus_to_exitcode(status) == 0
        assert loaded.state["step"] == 3 or not finished
        save(directory, 4)
        assert load_checkpoint(directory, on_damaged=fail).state == {"step": 4}
        left = sorted(path.name for path in directory.iterdir() if not path.name.endswith(".tmp"))
        assert len(left) == (2 if replace else 3), left
        if finished:
            print("survived", kill_at)
            break
    """
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("mode", ["new", "replace"])
def test_kill_at_every_step_of_a_write(tmp_path, mode):
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), mode], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 10
