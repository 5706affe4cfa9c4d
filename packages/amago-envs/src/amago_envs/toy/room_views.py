"""Pictures of a room with key and door, as text and as pixels; x runs to the right and y down.

`S` is the side of the room, `P` the side of a tile in pixels.
"""

from __future__ import annotations

import functools

import numpy as np

from amago_envs.toy.drawing import INK, TILE, Canvas, Color, Point, grid_image
from amago_envs.toy.room_rules import RoomRules

DARK_FLOOR: tuple[Color, Color] = ((58, 64, 84), (65, 72, 93))
LIGHT_FLOOR: tuple[Color, Color] = ((238, 228, 208), (230, 218, 195))
GOLD: Color = (240, 190, 60)
GOLD_EDGE: Color = (150, 108, 22)
WOOD: Color = (150, 96, 58)
WOOD_EDGE: Color = (92, 56, 32)


def room_text(rules: RoomRules, cell: int, key: int, goal: int, has_key: bool) -> str:
    """Draw a room as text: `P` player, `K` key, `D` door.

    Args:
        rules: settings of the environment.
        cell: cell of the agent.
        key: cell of the key.
        goal: cell of the door.
        has_key: whether the agent holds the key; it is not drawn then.

    Returns:
        A header line and one line per y.
    """
    lines = [["."] * rules.size for _ in range(rules.size)]
    for letter, place in (("D", goal), ("K", key), ("P", cell)):
        if letter != "K" or not has_key:
            x, y = divmod(place, rules.size)
            lines[y][x] = letter
    header = f"{'dark' if rules.dark else 'light'} room, {'with' if has_key else 'without'} key"
    return "\n".join([header, *("".join(line) for line in lines)])


def _draw_key(canvas: Canvas, centre: Point, scale: float) -> None:
    x, y = centre
    for width, color in ((0.17, GOLD_EDGE), (0.1, GOLD)):
        canvas.line((x - 0.05 * scale, y), (x + 0.38 * scale, y), width * scale, color)
        for tooth in (0.22, 0.36):
            canvas.line((x + tooth * scale, y), (x + tooth * scale, y + 0.17 * scale), width * scale, color)
    canvas.disc((x - 0.2 * scale, y), 0.22 * scale, GOLD_EDGE)
    canvas.disc((x - 0.2 * scale, y), 0.185 * scale, GOLD)
    canvas.disc((x - 0.2 * scale, y), 0.08 * scale, GOLD_EDGE)


def _draw_door(canvas: Canvas) -> None:
    canvas.box((0.2, 0.1), (0.8, 0.92), WOOD_EDGE, rounding=0.08)
    canvas.box((0.25, 0.15), (0.75, 0.92), WOOD, rounding=0.05)
    canvas.box((0.33, 0.22), (0.67, 0.48), WOOD_EDGE, rounding=0.03, alpha=0.45)
    canvas.box((0.33, 0.58), (0.67, 0.84), WOOD_EDGE, rounding=0.03, alpha=0.45)
    canvas.disc((0.68, 0.53), 0.05, GOLD)


@functools.cache
def _floor(dark: bool) -> np.ndarray:
    colors = DARK_FLOOR if dark else LIGHT_FLOOR
    canvases = [Canvas(INK if dark else LIGHT_FLOOR[1]) for _ in colors]
    for canvas, color in zip(canvases, colors, strict=True):
        canvas.box((0.01, 0.01), (0.99, 0.99), color, rounding=0.04)
    return np.stack([canvas.image() for canvas in canvases])


@functools.cache
def _tile(dark: bool, shade: int, door: bool, key: bool, agent: bool, carrying: bool) -> np.ndarray:
    canvas = Canvas(_floor(dark)[shade])
    if door:
        _draw_door(canvas)
    if key:
        _draw_key(canvas, (0.48, 0.5), 0.8)
    if agent:
        canvas.agent()
    if carrying:
        _draw_key(canvas, (0.68, 0.8), 0.5)
    return canvas.image()


def draw_room(rules: RoomRules, cell: int, key: int, goal: int, has_key: bool) -> np.ndarray:
    """Draw a room as pixels.

    Args:
        rules: settings of the environment.
        cell: cell of the agent.
        key: cell of the key.
        goal: cell of the door.
        has_key: whether the agent holds the key; it is drawn with the agent then.

    Returns:
        `[S * P, S * P, 3]` uint8, `P` = 48.
    """
    size = rules.size
    shades = np.add.outer(np.arange(size), np.arange(size)) % 2
    image = grid_image(_floor(rules.dark), shades)
    for place in {cell, key, goal}:
        x, y = divmod(place, size)
        here = place == cell
        tile = _tile(
            rules.dark, int(shades[y, x]), place == goal, place == key and not has_key, here, here and bool(has_key)
        )
        image[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE] = tile
    return image
