"""GIFs of episodes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from amago_core.errors import AmagoError
from amago_core.gif import save_gif


def test_round_trip(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [np.full((8, 12, 3), colour, np.uint8) for colour in colours]
    path = save_gif(tmp_path / "new" / "episode.gif", frames, fps=5)
    with image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (3, (12, 8), 0)
        for index, colour in enumerate(colours):
            gif.seek(index)
            assert gif.convert("RGB").getpixel((3, 3)) == colour
            assert gif.info["duration"] == (200 if index < 2 else 1000)


def test_grey_frames_and_one_frame(tmp_path):
    pytest.importorskip("PIL.Image", reason="needs pillow")
    assert save_gif(tmp_path / "a.gif", [np.zeros((4, 4), np.uint8)]).exists()


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 10, "frames is empty"),
        ([np.zeros((4, 4, 3))], 10, "float64"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], 10, r"frames\[1\]"),
        ([np.zeros((4, 4, 4), np.uint8)], 10, r"frames\[0\]"),
        ([np.zeros((4, 4, 3), np.uint8)], 0, "fps=0"),
    ],
)
def test_mistakes_are_named(tmp_path, frames, fps, message):
    pytest.importorskip("PIL.Image", reason="needs pillow")
    with pytest.raises(ValueError, match=message):
        save_gif(tmp_path / "a.gif", frames, fps)


def test_missing_pillow_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(AmagoError, match=r'pip install "amago-core\[plot\]"'):
        save_gif(tmp_path / "a.gif", [np.zeros((4, 4, 3), np.uint8)])
