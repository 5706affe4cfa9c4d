from __future__ import annotations

import numpy as np
import pytest

from amago_envs import MetaFrozenLake, MetaFrozenLakeVector, RoomKeyDoor, RoomKeyDoorVector
from amago_envs.toy.drawing import FAILURE, NOT_PLAYED, SUCCESS, TILE, Canvas, results_strip


def test_lake_as_text() -> None:
    env = MetaFrozenLake(3, k_attempts=3, recover_mode=True, max_attempt_steps=2, render_mode="ansi")
    env.reset(seed=0, options={"map": "SFF/FHF/FFG"})
    env.step(3)
    assert env.render() == "attempt 1/3 [...] recover\nSAF\nFHF\nFFG"
    env.step(3)
    assert env.render() == "attempt 2/3 [-..] recover\nAFF\nFHF\nFFG"


def test_room_as_text_draws_the_player_last() -> None:
    settings = {"size": 3, "start_location": (0, 0), "key_location": (1, 0), "goal_location": (0, 2)}
    env = RoomKeyDoor(render_mode="ansi", **settings)
    env.reset(seed=0)
    assert env.render() == "dark room, without key\nPK.\n...\nD.."
    env.step(3)
    assert env.render() == "dark room, with key\n.P.\n...\nD.."
    light = RoomKeyDoor(dark=False, render_mode="ansi", size=1)
    light.reset(seed=0)
    assert light.render() == "light room, without key\nP"


def test_pixels() -> None:
    env = MetaFrozenLake(4, k_attempts=2, render_mode="rgb_array")
    env.reset(seed=0, options={"map": "SFFF/FHFF/FFFF/FFFG"})
    first = env.render()
    assert first.shape == (20 + 4 * TILE, 4 * TILE, 3) and first.dtype == np.uint8
    env.step(3)
    second = env.render()
    changed = (first != second).any(axis=2)[20:].reshape(4, TILE, 4, TILE).any(axis=(1, 3))
    assert changed.tolist() == [[True, True, False, False]] + [[False] * 4] * 3
    env.step(1)
    third = env.render()
    assert (third[20:] == first[20:]).all() and (third[:20] != first[:20]).any()

    room = RoomKeyDoor(size=5, render_mode="rgb_array")
    room.reset(seed=0)
    picture = room.render()
    assert picture.shape == (5 * TILE, 5 * TILE, 3) and picture.dtype == np.uint8


def test_vector_views_equal_single_views() -> None:
    pairs = ((MetaFrozenLake, MetaFrozenLakeVector), (RoomKeyDoor, RoomKeyDoorVector))
    for single, vector in pairs:
        for mode in ("ansi", "rgb_array"):
            lanes = vector(3, size=4, render_mode=mode)
            lanes.reset(seed=4)
            envs = [single(size=4, render_mode=mode) for _ in range(3)]
            for index, env in enumerate(envs):
                env.reset(seed=4 + index)
            for action in (1, 3, 2, 3):
                lanes.step([action] * 3)
                for env in envs:
                    env.step(action)
            for ours, env in zip(lanes.render(), envs, strict=True):
                np.testing.assert_array_equal(ours, env.render())


@pytest.mark.parametrize("make", [lambda: MetaFrozenLake(3), lambda: RoomKeyDoor(), lambda: MetaFrozenLakeVector(2, 3)])
def test_no_render_mode_draws_nothing(make: object) -> None:
    env = make()  # type: ignore[operator]
    env.reset(seed=0)
    assert env.render() is None


def test_pictures_are_not_shared() -> None:
    env = RoomKeyDoor(size=2, render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    expected = picture.copy()
    picture[:] = 0
    np.testing.assert_array_equal(env.render(), expected)


@pytest.mark.parametrize("attempts", [1, 5, 30, 60])
def test_results_strip(attempts: int) -> None:
    results = np.full(attempts, -1)
    results[0] = 1
    results[-1] = 0 if attempts > 1 else 1
    strip = results_strip(results, attempts, width=144)
    colors = {tuple(pixel) for pixel in strip[10].tolist()}
    assert SUCCESS in colors
    if attempts > 2:
        assert {FAILURE, NOT_PLAYED} <= colors


def test_shapes_cover_what_they_should() -> None:
    canvas = Canvas((0, 0, 0), side=40)
    canvas.disc((0.5, 0.5), 0.25, (255, 255, 255))
    area = canvas.image()[..., 0].mean() / 255
    assert area == pytest.approx(np.pi * 0.25**2, abs=0.005)
    canvas = Canvas((0, 0, 0), side=40)
    canvas.box((0.1, 0.2), (0.6, 0.7), (255, 255, 255))
    assert canvas.image()[..., 0].mean() / 255 == pytest.approx(0.25, abs=0.005)
    canvas = Canvas((0, 0, 0), side=40)
    canvas.polygon([(0.1, 0.1), (0.9, 0.1), (0.1, 0.9)], (255, 255, 255))
    assert canvas.image()[..., 0].mean() / 255 == pytest.approx(0.32, abs=0.01)
