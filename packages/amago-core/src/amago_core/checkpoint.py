"""Checkpoints as safetensors and JSON (no pickle) that survive a kill at any moment.

A checkpoint is a folder that appears under its name in one atomic rename, after everything in it is on disk:

    <directory>/<name>/tensors.safetensors   all tensors
    <directory>/<name>/state.json            everything else
    <directory>/<name>/manifest.json         format, order of writing, size and SHA-256 of the other two
    <directory>/latest                       name of the newest one, for other programs to read

One process writes a directory; any number may read it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from amago_core.errors import CheckpointError
from amago_core.state_tree import flatten_tensors, rng_state, set_rng_state, unflatten

__all__ = [
    "Checkpoint",
    "checkpoint_names",
    "flatten_tensors",
    "latest_name",
    "load_checkpoint",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "unflatten",
    "write_text_atomic",
]

FORMAT = 1
_TENSORS, _STATE, _MANIFEST, _LATEST = "tensors.safetensors", "state.json", "manifest.json", "latest"
_TEMPORARY, _REPLACED, _DELETED = ".writing-", ".replaced-", ".deleting-"
_STATE_PREFIX = "state:"  # tensors found inside `state`, kept apart from the caller's own names


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        name: name of the checkpoint.
        path: its folder.
        tensors: tensors by name, on the CPU.
        state: everything else, as it was given to `save_checkpoint`.
    """

    name: str
    path: Path
    tensors: dict[str, Tensor]
    state: Any


def _fsync_path(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a small file so that readers see either the old or the new content, also after a crash.

    Args:
        path: file to write or replace.
        text: the whole content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_path(path.parent)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, which safetensors requires."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"tensors[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")
        value = tensor.detach().to("cpu").contiguous()
        pointer = value.untyped_storage().data_ptr()
        result[name] = value.clone() if pointer in seen else value
        if value.numel():
            seen.add(pointer)
    return result


def _check_name(name: str) -> None:
    if not name or name == _LATEST or name[0] == "." or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"checkpoint name must be a plain folder name that starts with no dot, got {name!r}")


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint folder, None if it cannot be read."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        int(manifest["sequence"]), manifest["files"][_TENSORS]["bytes"], manifest["files"][_STATE]["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _looks_complete(path: Path, manifest: dict[str, Any] | None) -> bool:
    """Cheap check, sizes only."""
    if manifest is None:
        return False
    try:
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except OSError:
        return False


def _modified(path: Path) -> int:
    """Modification time in nanoseconds; 0 if the folder has just been deleted by the writer."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _ordered(directory: Path) -> list[tuple[str, Path, dict[str, Any] | None]]:
    """All checkpoint folders as (name, path, manifest), newest first.

    One whose manifest is unreadable takes its place by the time of its folder, so that a damaged newest checkpoint is
    reported and not silently passed over.
    """
    if not directory.is_dir():
        return []
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith(_REPLACED) and path.is_dir():
            found.setdefault(path.name[len(_REPLACED) :], path)
        elif not path.name.startswith(".") and any((path / part).exists() for part in (_MANIFEST, _TENSORS, _STATE)):
            found[path.name] = path  # wins over a leftover of an interrupted replacement, which sorts first
    entries = [(name, path, _manifest(path)) for name, path in found.items()]
    written = [(_modified(path), manifest["sequence"]) for _, path, manifest in entries if manifest]

    def place(entry: tuple[str, Path, dict[str, Any] | None]) -> float:
        if entry[2]:
            return -float(entry[2]["sequence"])
        time = _modified(entry[1])
        return -0.5 - max((sequence for other, sequence in written if other <= time), default=0)

    return sorted(entries, key=place)


def checkpoint_names(directory: str | Path) -> list[str]:
    """Names of the checkpoints in a directory, newest first, damaged ones included.

    Args:
        directory: where `save_checkpoint` wrote; need not exist.

    Returns:
        The names, possibly none.
    """
    return [name for name, _, _ in _ordered(Path(directory))]


def latest_name(directory: str | Path) -> str | None:
    """Content of the `latest` pointer file: one cheap read, for processes that poll for new weights.

    Args:
        directory: where `save_checkpoint` wrote.

    Returns:
        The name, or None if nothing was saved yet.
    """
    try:
        return (Path(directory) / _LATEST).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _clean_up(directory: Path) -> None:
    """Undo what a killed writer left: half-written folders go, a half-replaced checkpoint comes back."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith((_TEMPORARY, _DELETED)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_REPLACED):
            original = directory / path.name[len(_REPLACED) :]
            if original.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, original)


def _write_folder(folder: Path, name: str, sequence: int, tensors: dict[str, Tensor], skeleton: Any) -> None:
    folder.mkdir()
    save_file(tensors, str(folder / _TENSORS))
    with (folder / _STATE).open("w", encoding="utf-8") as file:
        json.dump(skeleton, file, allow_nan=False)
    manifest = {
        "format": FORMAT,
        "name": name,
        "sequence": sequence,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "files": {file_name: _digest(folder / file_name) for file_name in (_TENSORS, _STATE)},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for file_name in (_TENSORS, _STATE, _MANIFEST):
        _fsync_path(folder / file_name)
    _fsync_path(folder)


def _publish(folder: Path, directory: Path, name: str) -> None:
    """Give a finished folder its name; an older checkpoint of that name exists until the new one does."""
    final, replaced = directory / name, directory / f"{_REPLACED}{name}"
    if final.exists():
        os.rename(final, replaced)
    os.rename(folder, final)
    _fsync_path(directory)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a checkpoint; renamed first, because a half-deleted one would look damaged."""
    hidden = path.with_name(f"{_DELETED}{path.name}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints; incomplete ones do not count."""
    complete = 0
    for _, path, manifest in _ordered(directory):
        if complete >= keep:
            _delete(path)
        complete += _looks_complete(path, manifest)


def save_checkpoint(
    directory: str | Path, name: str, tensors: Mapping[str, Tensor], state: Any, *, keep: int | None = 2
) -> Path:
    """Write a checkpoint; when this returns it is on disk, and until then the previous one is untouched.

    Args:
        directory: where the checkpoints of one run lie; created if needed.
        name: folder name of this one; an existing one of the same name is replaced.
        tensors: tensors by name, of any device and dtype; typically `module.state_dict()`.
        state: anything nested that `flatten_tensors` accepts, tensors and numpy arrays included: optimizer states,
            counters, generators.
        keep: how many of the newest complete checkpoints stay; None for all.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: if something cannot be stored, or the directory cannot be written.
    """
    _check_name(name)
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep must be at least 1, or None for all checkpoints, got {keep}")
    directory = Path(directory)
    state_tensors, skeleton = flatten_tensors(state)
    if not all(isinstance(key, str) and not key.startswith(_STATE_PREFIX) for key in tensors):
        raise CheckpointError(f"names of tensors must be strings that do not start with {_STATE_PREFIX!r}")
    storable = _storable({**tensors, **{f"{_STATE_PREFIX}{key}": value for key, value in state_tensors.items()}})
    temporary = directory / f"{_TEMPORARY}{name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clean_up(directory)
        sequence = 1 + max((entry["sequence"] for _, _, entry in _ordered(directory) if entry), default=0)
        _write_folder(temporary, name, sequence, storable, skeleton)
        _publish(temporary, directory, name)
        write_text_atomic(directory / _LATEST, f"{name}\n")
        if keep is not None:
            _prune(directory, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {directory / name}: {error}") from error
    return directory / name


def _read(name: str, path: Path) -> Checkpoint:
    manifest = _manifest(path)
    if manifest is None:
        raise CheckpointError(f"checkpoint {path} is damaged: {_MANIFEST} is missing or unreadable")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    try:
        for file_name, expected in manifest["files"].items():
            if _digest(path / file_name) != expected:
                raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {file_name} does not match")
        stored = load_file(str(path / _TENSORS))
        skeleton = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    cut = len(_STATE_PREFIX)
    inner = {key[cut:]: value for key, value in stored.items() if key.startswith(_STATE_PREFIX)}
    tensors = {key: value for key, value in stored.items() if not key.startswith(_STATE_PREFIX)}
    return Checkpoint(name, path, tensors, unflatten(inner, skeleton))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def load_checkpoint(
    directory: str | Path, name: str | None = None, *, on_damaged: Callable[[str], None] = _warn
) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        directory: where `save_checkpoint` wrote.
        name: which one; None for the newest that is intact.
        on_damaged: called with one line for every damaged checkpoint that is passed over when `name` is None; the
            default issues a Python warning.

    Returns:
        The checkpoint, all tensors on the CPU.

    Raises:
        CheckpointError: if there is none, the named one is damaged, or all are.
    """
    directory = Path(directory)
    entries = _ordered(directory)
    if not entries:
        raise CheckpointError(f"no checkpoint in {directory}")
    if name is not None:
        for found, path, _ in entries:
            if found == name:
                return _read(name, path)
        raise CheckpointError(f"no checkpoint named {name!r} in {directory}; there are {checkpoint_names(directory)}")
    for found, path, _ in entries:
        try:
            return _read(found, path)
        except CheckpointError as error:
            on_damaged(str(error))
    raise CheckpointError(f"all {len(entries)} checkpoints in {directory} are damaged")
