"""Animated GIFs of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amago_core.errors import MissingDependencyError

__all__ = ["save_gif"]


def save_gif(path: str | Path, frames: Sequence[np.ndarray], fps: float = 10.0, *, hold_last: float = 1.0) -> Path:
    """Write frames as an endlessly repeated GIF; needs `pip install "amago-core[plot]"`.

    Args:
        path: file to write; its folder is created.
        frames: at least one `[height, width, 3]` or `[height, width]` uint8 array, all of one shape.
        fps: frames per second, in (0, 100]; GIFs count in hundredths of a second.
        hold_last: seconds that the last frame stays.

    Returns:
        The file.

    Raises:
        MissingDependencyError: if pillow is not installed.
        ValueError: if there is no frame, the frames differ, or `fps` is out of range.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("saving a GIF", "pillow", "plot") from error
    if not 0 < fps <= 100:
        raise ValueError(f"fps={fps} is not allowed; give a number in (0, 100]")
    if len(frames) == 0:
        raise ValueError("frames is empty; give at least one frame")
    shape = np.shape(frames[0])
    for index, frame in enumerate(frames):
        good_shape = np.shape(frame) == shape and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))
        if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and good_shape):
            seen = f"{getattr(frame, 'dtype', type(frame).__name__)} {np.shape(frame)}"
            raise ValueError(f"frames[{index}] is {seen}; give uint8 [height, width, 3], all of the shape of the first")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One palette for all frames (from a mosaic of some) keeps colours from flickering.
    picked = [frames[index] for index in np.unique(np.linspace(0, len(frames) - 1, min(len(frames), 16)).astype(int))]
    palette = Image.fromarray(np.concatenate(picked)).convert("RGB").quantize(256)
    images = [
        Image.fromarray(frame).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
    ]
    durations = [round(1000 / fps)] * (len(images) - 1) + [max(round(1000 / fps), round(1000 * hold_last))]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)
    return path
