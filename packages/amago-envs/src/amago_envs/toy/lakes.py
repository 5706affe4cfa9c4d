"""Frozen lake maps: tile codes, text form, and the test for a path from start to goal.

`M` is the number of maps, `S` the side of a map in tiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

START, FROZEN, HOLE, GOAL = 0, 1, 2, 3
LETTERS = "SFHG"
FROZEN_PROBABILITY = 0.8
HELD_OUT_OF_256 = 51
# Few 4x4 lakes make up most of what is drawn, so where the likeliest ones fall decides how hard each part is. Of 6,000
# keys this one makes the held-out lakes most alike to all of them: a fixed shortest route is safe on 0.381 of them on
# average (0.382 of all lakes), and no route differs by more than 0.04.
SPLIT_KEY = (4409).to_bytes(4, "little")

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
TileArray = np.ndarray[Any, np.dtype[np.uint8]]


def passable_from_draws(draws: np.ndarray) -> BoolArray:
    """Turn uniform draws into maps of passable tiles.

    Args:
        draws: `[M, S * S]` numbers in [0, 1).

    Returns:
        `[M, S * S]` bool, False for a hole; the first and the last tile (start and goal) are always passable.
    """
    passable: BoolArray = draws < FROZEN_PROBABILITY
    passable[:, 0] = True
    passable[:, -1] = True
    return passable


def tiles_from_passable(passable: BoolArray) -> TileArray:
    """Tile codes of maps given where one can walk.

    Args:
        passable: `[M, S * S]` bool.

    Returns:
        `[M, S * S]` uint8 tile codes with start and goal in the corners.
    """
    tiles = np.where(passable, np.uint8(FROZEN), np.uint8(HOLE))
    tiles[:, 0] = START
    tiles[:, -1] = GOAL
    return tiles


def have_path(passable: BoolArray, size: int) -> BoolArray:
    """Tell which maps have a 4-connected path of passable tiles from the first to the last tile.

    The flood fill works on one integer per map, a bit per tile: a step in all four directions of all reached tiles is
    four shifts. Rows are `size + 1` bits long, so that shifting sideways never leaks into the next row.

    Args:
        passable: `[M, S * S]` bool.
        size: side of the maps, `S`.

    Returns:
        `[M]` bool.
    """
    count = passable.shape[0]
    row = size + 1
    padded = np.zeros((count, size, row), dtype=np.bool_)
    padded[:, :, :size] = passable.reshape(count, size, size)
    packed = np.packbits(padded.reshape(count, size * row), axis=1)
    first_bit = 8 * packed.shape[1] - 1
    start = 1 << first_bit
    goal = 1 << (first_bit - (size - 1) * row - (size - 1))
    boards = (int.from_bytes(bits.tobytes(), "big") for bits in packed)
    return np.array([_flood(board, start, goal, row) for board in boards], dtype=np.bool_)


def held_out(passable: BoolArray) -> BoolArray:
    """Tell which maps belong to the fifth of all maps that the split "train" never shows.

    Args:
        passable: `[M, S * S]` bool.

    Returns:
        `[M]` bool, decided by a checksum of the map alone.
    """
    packed = np.packbits(passable, axis=1)
    digests = (hashlib.blake2b(bits.tobytes(), digest_size=1, key=SPLIT_KEY).digest()[0] for bits in packed)
    return np.fromiter((digest < HELD_OUT_OF_256 for digest in digests), np.bool_, len(packed))


def _flood(free: int, start: int, goal: int, row: int) -> bool:
    reached = start & free
    while True:
        grown = (reached | reached << 1 | reached >> 1 | reached << row | reached >> row) & free
        if grown & goal:
            return True
        if grown == reached:
            return False
        reached = grown


def parse_lake(lake: Any, size: int) -> TileArray:
    """Read a map from text or tile codes.

    Args:
        lake: sequence of `size` strings of the letters S, F, H, G (`["SF", "HG"]`), one string with the rows separated
            by "/" or line breaks, or an array `[S, S]` of letters or of tile codes (`START`, `FROZEN`, `HOLE`, `GOAL`).
        size: side of the map, `S`.

    Returns:
        `[S * S]` uint8 tile codes.

    Raises:
        ValueError: if shape or content is wrong, or S and G are not exactly in the first and the last corner.
    """
    if isinstance(lake, str):
        lake = lake.replace("/", "\n").split()
    if isinstance(lake, Sequence) and all(isinstance(line, str) for line in lake):
        lake = [list(line) for line in lake]
    try:
        array = np.asarray(lake)
    except ValueError:
        raise ValueError(f"map: rows of different lengths, allowed: {size} rows of {size} tiles") from None
    if array.shape != (size, size):
        raise ValueError(f"map: shape {array.shape}, allowed: ({size}, {size})")
    if array.dtype.kind in "US":
        letters = [[LETTERS.find(str(tile)) if tile else -1 for tile in line] for line in array.astype("U").tolist()]
        array = np.array(letters)
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > GOAL:
        raise ValueError(f"map: {lake!r}, allowed: letters of {LETTERS!r} or tile codes 0 to {GOAL}")
    tiles = array.astype(np.uint8).reshape(-1)
    corners = tiles[0] == START and tiles[-1] == GOAL
    if not corners or (tiles == START).sum() != 1 or (tiles == GOAL).sum() != 1:
        raise ValueError(f"map: {lake_lines(tiles, size)}, allowed: S only in the first corner, G only in the last one")
    return tiles


def lake_lines(tiles: np.ndarray, size: int) -> list[str]:
    """Write a map as text.

    Args:
        tiles: `[S * S]` or `[S, S]` tile codes.
        size: side of the map, `S`.

    Returns:
        One string per row, for example `["SF", "HG"]`.
    """
    return ["".join(LETTERS[tile] for tile in line) for line in np.asarray(tiles).reshape(size, size).tolist()]
