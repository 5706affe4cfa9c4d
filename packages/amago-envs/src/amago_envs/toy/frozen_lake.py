"""MetaFrozenLake: find and remember a path over a frozen lake in a few attempts.

`S` is the side of the lake in tiles; cells are numbered row by row from 0 to `S * S - 1`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amago_envs.toy import lakes
from amago_envs.toy.base import ToyEnv
from amago_envs.toy.lake_rules import (
    CRUMBLE_PROBABILITY,
    NOISE_PROBABILITY,
    RECOVER_PENALTY,
    SWAP_PROBABILITY,
    LakeRules,
)
from amago_envs.toy.lake_views import draw_lake, lake_text
from amago_envs.vector.base import RENDER_MODES, check_options


class MetaFrozenLake(ToyEnv):
    """Frozen lake whose map is hidden and drawn anew at every `reset`; `k_attempts` attempts to learn and use a path.

    The agent starts in the top-left tile and wants to reach the bottom-right one. Reaching it pays 1 and ends the
    attempt, a hole ends it without reward (in recover mode: costs 0.1, the agent stays where it was), and so does the
    step limit. The step that ends an attempt already returns the first observation of the next one; the episode
    terminates with the last attempt.

    Actions: 0 no-op, 1 down, 2 up, 3 right, 4 left. Observation: `[row / S, column / S, reset flag, attempts over /
    k_attempts]`; the reset flag is 1 in the first observation of every attempt.

    Hard mode: for each task the meanings of down and right are swapped with probability 0.5; the tile the agent leaves
    turns into a hole with probability 0.33, for the rest of the attempt; with probability 0.25 both observed
    coordinates are off by -1, 0 or 1.

    `info["metrics"]` on the step that ends attempt i: `attempt_i/success`, `attempt_i/return`, `attempt_i/length`, and
    with the last one `total_successes` and `success_rate`.

    `reset(options={"map": ["SF", "HG"]})` plays on a given map instead of a random one.

    Args:
        size: side of the lake in tiles `S`, >= 2.
        k_attempts: attempts per task, >= 1.
        hard_mode: swapped actions, crumbling ice and noisy positions.
        recover_mode: a hole costs 0.1 and the attempt goes on.
        max_attempt_steps: step limit of an attempt; None for `size ** 2` (twice that in hard mode), divided by
            `1 - slip_chance`.
        show_k_progress: whether the observation tells how many attempts are over.
        slip_chance: probability that a move does nothing, in [0, 1).
        split: "all" maps, or one of two parts that share none: "held_out", about a fifth, and "train", the others.
        render_mode: None, "ansi" or "rgb_array".

    Raises:
        ValueError: if a value is not allowed.

    Source: the meta-learning test domain of AMAGO (Grigsby et al., 2023, arXiv 2310.09971).
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 6}
    _state_arrays = ("_map", "_active", "_results")
    _state_scalars = ("_cell", "_steps", "_swapped", "_attempt", "_return")

    def __init__(
        self,
        size: int = 4,
        k_attempts: int = 10,
        hard_mode: bool = False,
        recover_mode: bool = False,
        max_attempt_steps: int | None = None,
        show_k_progress: bool = True,
        slip_chance: float = 0.0,
        split: str = "all",
        render_mode: str | None = None,
    ) -> None:
        self.rules = LakeRules(
            size=size,
            k_attempts=k_attempts,
            hard_mode=hard_mode,
            recover_mode=recover_mode,
            max_attempt_steps=max_attempt_steps,
            show_k_progress=show_k_progress,
            slip_chance=slip_chance,
            split=split,
        )
        super().__init__(self.rules.observation_space(), self.rules.action_space(), render_mode)
        self._moves = self.rules.moves()
        self._coordinates = self.rules.coordinates()
        self._progress = self.rules.progress()
        self._map = np.full(size**2, lakes.FROZEN, dtype=np.uint8)
        self._active = self._map.copy()
        self._results = np.full(k_attempts, -1, dtype=np.int8)
        self._cell = self._steps = self._swapped = self._attempt = 0
        self._return = 0.0

    @property
    def task_name(self) -> str:
        """Name under which results of this variant are collected."""
        return self.rules.task_name

    @property
    def map(self) -> np.ndarray:
        """`[S, S]` uint8 tile codes of the task (a copy); codes are in `amago_envs.toy.lakes`."""
        return self._map.reshape(self.rules.size, self.rules.size).copy()

    @property
    def active_map(self) -> np.ndarray:
        """`[S, S]` uint8 tile codes of the present attempt, holes made in hard mode included (a copy)."""
        return self._active.reshape(self.rules.size, self.rules.size).copy()

    @property
    def position(self) -> tuple[int, int]:
        """True row and column of the agent."""
        return divmod(self._cell, self.rules.size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new task.

        Args:
            seed: seed of the environment's generator; None continues it.
            options: `{"map": lake}` sets the map, in any form `amago_envs.toy.lakes.parse_lake` takes.

        Returns:
            The observation `[4]` float32 and an empty info dict.

        Raises:
            ValueError: if an option is unknown or the given map has the wrong form.
        """
        lake = check_options(options, ("map",)).get("map")
        super().reset(seed=seed)
        self._map = self._sample_map() if lake is None else lakes.parse_lake(lake, self.rules.size)
        self._swapped = int(self.rules.hard_mode and self.np_random.random() < SWAP_PROBABILITY)
        self._attempt = 0
        self._results[:] = -1
        self._running = True
        self._start_attempt()
        return self._observe(first=True), {}

    def _sample_map(self) -> np.ndarray:
        size = self.rules.size
        while True:
            passable = lakes.passable_from_draws(self.np_random.random((1, size**2)))
            if self.rules.accepts(passable)[0]:
                tiles: np.ndarray = lakes.tiles_from_passable(passable)[0]
                return tiles

    def _start_attempt(self) -> None:
        self._active = self._map.copy()
        self._cell = self._steps = 0
        self._return = 0.0

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by one step.

        Args:
            action: integer in 0..4.

        Returns:
            Observation `[4]` float32, reward, terminated, truncated (never True) and the info dict.

        Raises:
            ResetNeeded: if the task is over or was never started.
            ValueError: if the action is not allowed.
        """
        rules = self.rules
        action = self._checked_action(action)
        self._steps += 1
        if rules.slip_chance > 0 and action != 0 and self.np_random.random() < rules.slip_chance:
            action = 0
        proposed = int(self._moves[self._swapped, action, self._cell])
        if rules.hard_mode and proposed != self._cell and self.np_random.random() < CRUMBLE_PROBABILITY:
            self._active[self._cell] = lakes.HOLE
        tile = int(self._active[proposed])
        goal, hole = tile == lakes.GOAL, tile == lakes.HOLE
        reward = 1.0 if goal else RECOVER_PENALTY if hole and rules.recover_mode else 0.0
        ended = goal or (hole and not rules.recover_mode) or self._steps >= rules.step_limit
        if not (hole and rules.recover_mode):
            self._cell = proposed
        self._return += reward
        info = self._end_attempt(goal) if ended else {}
        self._running = self._attempt < rules.k_attempts
        return self._observe(first=ended), reward, not self._running, False, info

    def _end_attempt(self, success: bool) -> dict[str, Any]:
        index, attempts = self._attempt, self.rules.k_attempts
        self._results[index] = success
        metrics = {
            f"attempt_{index}/success": float(success),
            f"attempt_{index}/return": self._return,
            f"attempt_{index}/length": float(self._steps),
        }
        self._attempt += 1
        if self._attempt == attempts:
            successes = int(self._results.sum())
            metrics |= {"total_successes": float(successes), "success_rate": successes / attempts}
        self._start_attempt()
        return {"metrics": metrics}

    def _observe(self, *, first: bool) -> np.ndarray:
        position = np.array(self.position)
        # The order of the draws (gate, row, column) is part of the seed contract with the vectorised form.
        if self.rules.hard_mode and self.np_random.random() < NOISE_PROBABILITY:
            shift = [int(3 * self.np_random.random()) - 1 for _ in range(2)]
            position = np.clip(position + shift, 0, self.rules.size - 1)
        row, column = self._coordinates[position]
        return np.array([row, column, first, self._progress[self._attempt]], dtype=np.float32)

    def render(self) -> Any:
        """Draw the lake.

        Returns:
            A text ("ansi"), a `[height, width, 3]` uint8 image ("rgb_array"), or None without render mode.
        """
        if self.render_mode is None:
            return None
        draw = lake_text if self.render_mode == "ansi" else draw_lake
        return draw(self.rules, self._active, self._cell, self._results, self._attempt)

    def _settings(self) -> dict[str, Any]:
        return self.rules.as_dict()
