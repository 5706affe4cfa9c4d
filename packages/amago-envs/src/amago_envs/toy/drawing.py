"""A few anti-aliased shapes in NumPy, enough for the pictures of the toy environments.

`P` is the side of a tile in pixels. Lengths and positions on a `Canvas` are fractions of its side, x to the right and y
down; colours are RGB in 0..255.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TILE = 48

Color = tuple[int, int, int]
Point = tuple[float, float]

AGENT_BODY: Color = (240, 118, 76)
AGENT_EDGE: Color = (150, 62, 38)
WHITE: Color = (255, 255, 255)
INK: Color = (38, 44, 58)
SUCCESS: Color = (72, 170, 108)
FAILURE: Color = (214, 82, 82)
NOT_PLAYED: Color = (196, 204, 214)


class Canvas:
    """A square picture that shapes are blended onto.

    Args:
        background: one colour, or `[P, P, 3]` pixels to draw over (they are copied).
        side: side in pixels when `background` is a colour.
    """

    def __init__(self, background: Color | np.ndarray, side: int = TILE) -> None:
        if isinstance(background, np.ndarray):
            self.pixels = background.astype(np.float64)
        else:
            self.pixels = np.tile(np.array(background, dtype=np.float64), (side, side, 1))
        self._side = self.pixels.shape[0]
        centres = (np.arange(self._side) + 0.5) / self._side
        self._x, self._y = np.meshgrid(centres, centres)

    def _blend(self, distance: np.ndarray, color: Color, alpha: float) -> None:
        # A signed distance of half a pixel either way turns into the share of the pixel that is covered.
        cover = alpha * np.clip(0.5 - distance * self._side, 0.0, 1.0)[..., None]
        self.pixels = self.pixels * (1.0 - cover) + np.array(color, dtype=np.float64) * cover

    def disc(self, centre: Point, radius: float, color: Color, alpha: float = 1.0) -> None:
        """Fill a disc.

        Args:
            centre: its centre.
            radius: its radius.
            color: fill colour.
            alpha: opacity in [0, 1].
        """
        self._blend(np.hypot(self._x - centre[0], self._y - centre[1]) - radius, color, alpha)

    def box(self, corner: Point, opposite: Point, color: Color, rounding: float = 0.0, alpha: float = 1.0) -> None:
        """Fill a box with rounded corners.

        Args:
            corner: upper left corner.
            opposite: lower right corner.
            color: fill colour.
            rounding: radius of the corners.
            alpha: opacity in [0, 1].
        """
        half = ((opposite[0] - corner[0]) / 2, (opposite[1] - corner[1]) / 2)
        x = np.abs(self._x - corner[0] - half[0]) - half[0] + rounding
        y = np.abs(self._y - corner[1] - half[1]) - half[1] + rounding
        outside = np.hypot(np.maximum(x, 0.0), np.maximum(y, 0.0))
        self._blend(outside + np.minimum(np.maximum(x, y), 0.0) - rounding, color, alpha)

    def line(self, start: Point, end: Point, width: float, color: Color, alpha: float = 1.0) -> None:
        """Draw a line with round ends.

        Args:
            start: one end.
            end: the other end.
            width: its width.
            color: its colour.
            alpha: opacity in [0, 1].
        """
        dx, dy = end[0] - start[0], end[1] - start[1]
        along = ((self._x - start[0]) * dx + (self._y - start[1]) * dy) / (dx * dx + dy * dy)
        along = np.clip(along, 0.0, 1.0)
        distance = np.hypot(self._x - start[0] - along * dx, self._y - start[1] - along * dy)
        self._blend(distance - width / 2, color, alpha)

    def polygon(self, corners: Sequence[Point], color: Color, alpha: float = 1.0) -> None:
        """Fill a convex polygon.

        Args:
            corners: its corners, clockwise on the screen.
            color: fill colour.
            alpha: opacity in [0, 1].
        """
        distance = np.full_like(self._x, -np.inf)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            length = float(np.hypot(x1 - x0, y1 - y0))
            side = ((y1 - y0) * (self._x - x0) - (x1 - x0) * (self._y - y0)) / length
            distance = np.maximum(distance, side)
        self._blend(distance, color, alpha)

    def agent(self) -> None:
        """Draw the agent, a round fellow who looks at you."""
        self.disc((0.5, 0.86), 0.2, INK, alpha=0.12)
        self.disc((0.5, 0.52), 0.34, AGENT_EDGE)
        self.disc((0.5, 0.52), 0.31, AGENT_BODY)
        self.disc((0.42, 0.38), 0.11, WHITE, alpha=0.25)
        for x in (0.38, 0.62):
            self.disc((x, 0.48), 0.085, WHITE)
            self.disc((x, 0.495), 0.045, INK)
        self.line((0.43, 0.66), (0.57, 0.66), 0.035, AGENT_EDGE)

    def image(self) -> np.ndarray:
        """The picture as `[P, P, 3]` uint8."""
        return np.rint(self.pixels).astype(np.uint8)


def grid_image(sprites: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Put tile pictures side by side.

    Args:
        sprites: `[K, P, P, 3]` uint8 tile pictures.
        tiles: `[rows, columns]` index of the picture of each tile.

    Returns:
        `[rows * P, columns * P, 3]` uint8.
    """
    rows, columns = tiles.shape
    side = sprites.shape[1]
    image: np.ndarray = sprites[tiles].transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    return image


def results_strip(results: np.ndarray, current: int, width: int, height: int = 20) -> np.ndarray:
    """Draw one mark per attempt: green success, red failure, grey not played, the present one with a dark frame.

    Args:
        results: `[k]` 1 success, 0 failure, -1 not played.
        current: index of the present attempt; `k` when all are over.
        width: width of the strip in pixels.
        height: height of the strip in pixels.

    Returns:
        `[height, width, 3]` uint8.
    """
    strip = np.full((height, width, 3), 246, dtype=np.uint8)
    edges = np.linspace(4, width - 4, len(results) + 1).astype(int)
    colors = {1: SUCCESS, 0: FAILURE}
    gap = 1 if edges[1] - edges[0] < 10 else 2
    for index, result in enumerate(results.tolist()):
        left, right = edges[index] + gap, max(edges[index + 1] - gap, edges[index] + gap + 1)
        if index == current:
            strip[3 : height - 3, left - 1 : right + 1] = INK
        strip[5 : height - 5, left + (index == current) : right - (index == current)] = colors.get(result, NOT_PLAYED)
    return strip
