from __future__ import annotations

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import is_valid

from amago_envs.toy import lakes


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("density", [0.55, 0.8])
def test_path_check_agrees_with_a_search(size: int, density: float) -> None:
    draws = np.random.default_rng(size).random((300, size * size)) * lakes.FROZEN_PROBABILITY / density
    passable = lakes.passable_from_draws(draws)
    tiles = lakes.tiles_from_passable(passable)
    boards = [np.array([list(line) for line in lakes.lake_lines(board, size)]) for board in tiles]
    expected = [is_valid(board.tolist(), size) for board in boards]
    assert 0 < sum(expected) < 300 or size == 2
    assert lakes.have_path(passable, size).tolist() == expected


def test_path_may_wind_but_not_wrap_around() -> None:
    def check(rows: list[str]) -> bool:
        passable = np.array([[letter != "H" for row in rows for letter in row]])
        return bool(lakes.have_path(passable, len(rows))[0])

    assert check(["SHFFF", "FHFHF", "FHFHF", "FHFHF", "FFFHG"])
    assert not check(["SFF", "HHH", "FFG"])
    # The end of a row and the start of the next one are no neighbours.
    assert not check(["SFFF", "HHHF", "FHHH", "FFFG"])


def test_forms_of_a_map() -> None:
    wanted = [0, 1, 2, 3]
    forms = ["SF/HG", "SF\nHG", ["SF", "HG"], ("SF", "HG"), [["S", "F"], ["H", "G"]], np.array([[0, 1], [2, 3]])]
    forms += [np.array([["S", "F"], ["H", "G"]]), np.array([[b"S", b"F"], [b"H", b"G"]])]
    for form in forms:
        assert lakes.parse_lake(form, 2).tolist() == wanted
    assert lakes.lake_lines(np.array(wanted), 2) == ["SF", "HG"]


def test_holes_have_the_stated_probability() -> None:
    draws = np.random.default_rng(0).random((2000, 16))
    passable = lakes.passable_from_draws(draws)
    assert passable[:, [0, 15]].all()
    assert abs(passable[:, 1:15].mean() - 0.8) < 0.01
