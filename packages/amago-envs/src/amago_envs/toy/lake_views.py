"""Pictures of a frozen lake, as text and as pixels.

`S` is the side of the lake in tiles, `P` the side of a tile in pixels.
"""

from __future__ import annotations

import functools

import numpy as np

from amago_envs.toy import lakes
from amago_envs.toy.drawing import INK, TILE, WHITE, Canvas, Color, grid_image, results_strip
from amago_envs.toy.lake_rules import LakeRules

ICE: Color = (214, 235, 247)
ICE_EDGE: Color = (186, 214, 232)
WATER: Color = (44, 92, 142)
DEEP_WATER: Color = (22, 52, 92)
FLAG: Color = (206, 58, 78)
MAT: Color = (160, 206, 168)


def lake_text(rules: LakeRules, tiles: np.ndarray, cell: int, results: np.ndarray, attempt: int) -> str:
    """Draw a lake as text, `A` at the agent.

    Args:
        rules: settings of the environment.
        tiles: `[S * S]` tile codes of the present attempt.
        cell: cell of the agent.
        results: `[k_attempts]` 1 success, 0 failure, -1 not played.
        attempt: number of attempts that are over.

    Returns:
        A header line and one line per row of tiles.
    """
    modes = [name for name, on in (("hard", rules.hard_mode), ("recover", rules.recover_mode)) if on]
    played = "".join({1: "+", 0: "-"}.get(result, ".") for result in results.tolist())
    number = min(attempt + 1, rules.k_attempts)
    header = f"attempt {number}/{rules.k_attempts} [{played}] {' '.join(modes) or 'standard'}"
    lines = [list(line) for line in lakes.lake_lines(tiles, rules.size)]
    lines[cell // rules.size][cell % rules.size] = "A"
    return "\n".join([header, *("".join(line) for line in lines)])


@functools.cache
def _sprites() -> np.ndarray:
    start, frozen, hole, goal = (Canvas(ICE_EDGE) for _ in range(4))
    for canvas in (start, frozen, hole, goal):
        canvas.box((0.02, 0.02), (0.98, 0.98), ICE, rounding=0.06)
        canvas.line((0.16, 0.34), (0.34, 0.16), 0.03, WHITE, alpha=0.8)
        canvas.line((0.66, 0.86), (0.86, 0.66), 0.03, WHITE, alpha=0.8)
    start.box((0.14, 0.14), (0.86, 0.86), MAT, rounding=0.14)
    start.box((0.22, 0.22), (0.78, 0.78), ICE, rounding=0.1, alpha=0.7)
    frozen.line((0.28, 0.44), (0.44, 0.28), 0.02, WHITE, alpha=0.8)
    hole.disc((0.5, 0.5), 0.4, WHITE, alpha=0.9)
    hole.disc((0.5, 0.5), 0.36, WATER)
    hole.disc((0.5, 0.54), 0.29, DEEP_WATER, alpha=0.85)
    hole.line((0.36, 0.36), (0.48, 0.3), 0.03, WHITE, alpha=0.45)
    goal.disc((0.36, 0.84), 0.1, INK, alpha=0.15)
    goal.line((0.36, 0.16), (0.36, 0.84), 0.05, INK)
    goal.polygon([(0.38, 0.16), (0.82, 0.32), (0.38, 0.5)], FLAG)
    return np.stack([canvas.image() for canvas in (start, frozen, hole, goal)])


@functools.cache
def _agent_sprites() -> np.ndarray:
    canvases = [Canvas(sprite) for sprite in _sprites()]
    for canvas in canvases:
        canvas.agent()
    return np.stack([canvas.image() for canvas in canvases])


def draw_lake(rules: LakeRules, tiles: np.ndarray, cell: int, results: np.ndarray, attempt: int) -> np.ndarray:
    """Draw a lake as pixels, with a strip above it that tells how the attempts went.

    Args:
        rules: settings of the environment.
        tiles: `[S * S]` tile codes of the present attempt.
        cell: cell of the agent.
        results: `[k_attempts]` 1 success, 0 failure, -1 not played.
        attempt: number of attempts that are over.

    Returns:
        `[20 + S * P, S * P, 3]` uint8, `P` = 48.
    """
    size = rules.size
    image = grid_image(_sprites(), tiles.reshape(size, size))
    top, left = TILE * (cell // size), TILE * (cell % size)
    image[top : top + TILE, left : left + TILE] = _agent_sprites()[tiles[cell]]
    return np.concatenate([results_strip(results, attempt, size * TILE), image])
