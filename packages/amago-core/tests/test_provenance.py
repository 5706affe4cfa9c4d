"""Provenance is JSON and never fails for want of git."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

from amago_core.provenance import git_commit, provenance


def test_provenance_is_json():
    data = provenance()
    assert json.loads(json.dumps(data)) == data
    assert data["packages"]["torch"] and data["torch_threads"] == torch.get_num_threads()


def test_git_commit(tmp_path, monkeypatch):
    assert git_commit(tmp_path) is None
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file"), git("commit", "-m", "first")
    first = git_commit(tmp_path)
    assert first is not None and len(first["commit"]) == 40 and not first["dirty"]
    (tmp_path / "file").write_text("2")
    changed = git_commit(tmp_path)
    assert changed is not None and changed["dirty"]
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None
