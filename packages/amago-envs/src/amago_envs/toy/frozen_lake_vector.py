"""MetaFrozenLake with all lanes stepped at once in NumPy.

`N` is the number of lanes, `M` the number of lanes one call is about, `S` the side of the lake in tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amago_envs.toy import lakes
from amago_envs.toy.lake_rules import (
    CRUMBLE_PROBABILITY,
    NOISE_PROBABILITY,
    RECOVER_PENALTY,
    SWAP_PROBABILITY,
    LakeRules,
)
from amago_envs.toy.lake_views import draw_lake, lake_text
from amago_envs.vector.base import LaneVectorEnv
from amago_envs.vector.infos import InfoBuilder
from amago_envs.vector.streams import IntArray


class MetaFrozenLakeVector(LaneVectorEnv):
    """Many independent `MetaFrozenLake` tasks, one per lane; see that class for the rules.

    `reset(options={"map": ...})` sets one map for all lanes, or one per lane as an array `[N, S, S]`; the tasks that
    follow in a lane are random again.

    Lane i seeded with s equals the single environment seeded with s + i, number for number, also across automatic
    resets (`AutoresetMode.SAME_STEP`).

    Args:
        num_envs: number of lanes `N`, >= 1.
        size: side of the lake in tiles `S`, >= 2.
        k_attempts: attempts per task, >= 1.
        hard_mode: swapped actions, crumbling ice and noisy positions.
        recover_mode: a hole costs 0.1 and the attempt goes on.
        max_attempt_steps: step limit of an attempt; None for the default of `LakeRules`.
        show_k_progress: whether the observation tells how many attempts are over.
        slip_chance: probability that a move does nothing, in [0, 1).
        split: "all" maps, or one of two parts that share none: "held_out", about a fifth, and "train", the others.
        render_mode: None, "ansi" or "rgb_array".

    Raises:
        ValueError: if a value is not allowed.
    """

    _state_arrays = ("_maps", "_active", "_cell", "_steps", "_attempt", "_swapped", "_return", "_flag", "_results")
    _option_names = ("map",)

    def __init__(
        self,
        num_envs: int,
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
        self.rules = rules = LakeRules(
            size=size,
            k_attempts=k_attempts,
            hard_mode=hard_mode,
            recover_mode=recover_mode,
            max_attempt_steps=max_attempt_steps,
            show_k_progress=show_k_progress,
            slip_chance=slip_chance,
            split=split,
        )
        super().__init__(
            num_envs,
            rules.observation_space(),
            rules.action_space(),
            largest_request=size**2,
            render_mode=render_mode,
        )
        self._moves = rules.moves()
        self._coordinates = rules.coordinates()
        rows, columns = np.divmod(np.arange(size**2), size)
        self._position_features = self._coordinates[np.stack([rows, columns], axis=1)]
        self._progress = rules.progress()
        self._maps = np.full((num_envs, size**2), lakes.FROZEN, dtype=np.uint8)
        self._active = self._maps.copy()
        self._cell = np.zeros(num_envs, dtype=np.int64)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._attempt = np.zeros(num_envs, dtype=np.int64)
        self._swapped = np.zeros(num_envs, dtype=np.int64)
        self._return = np.zeros(num_envs, dtype=np.float64)
        self._flag = np.ones(num_envs, dtype=np.bool_)
        self._results = np.full((num_envs, k_attempts), -1, dtype=np.int8)

    @property
    def task_name(self) -> str:
        """Name under which results of this variant are collected."""
        return self.rules.task_name

    @property
    def maps(self) -> np.ndarray:
        """`[N, S, S]` uint8 tile codes of every lane's task (a copy); codes are in `amago_envs.toy.lakes`."""
        return self._maps.reshape(self.num_envs, self.rules.size, self.rules.size).copy()

    @property
    def active_maps(self) -> np.ndarray:
        """`[N, S, S]` uint8 tile codes of the present attempts, holes made in hard mode included (a copy)."""
        return self._active.reshape(self.num_envs, self.rules.size, self.rules.size).copy()

    @property
    def positions(self) -> np.ndarray:
        """`[N, 2]` true row and column of every agent (a copy)."""
        return np.stack(np.divmod(self._cell, self.rules.size), axis=1)

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every lane by one step.

        Args:
            actions: `[N]` integers in 0..4.

        Returns:
            Observations `[N, 4]` float32, rewards `[N]` float64, terminated `[N]`, truncated `[N]` (never True) and
            the info dict.

        Raises:
            ResetNeeded: if `reset` was never called.
            ValueError: if the actions have the wrong form.
        """
        rules = self.rules
        actions = self._checked_actions(actions)
        self._steps += 1
        if rules.slip_chance > 0:
            actions = self._slip(actions)
        proposed = self._moves[self._swapped, actions, self._cell]
        if rules.hard_mode:
            self._crumble(proposed)
        tile = self._active[self._lanes, proposed]
        goal = tile == lakes.GOAL
        hole = tile == lakes.HOLE
        ended = goal | (self._steps >= rules.step_limit)
        rewards = goal.astype(np.float64)
        if rules.recover_mode:
            rewards[hole] = RECOVER_PENALTY
            self._cell = np.where(hole, self._cell, proposed)
        else:
            ended |= hole
            self._cell = proposed
        self._return += rewards
        return self._finish(ended, goal, rewards)

    def _slip(self, actions: IntArray) -> IntArray:
        moving = np.flatnonzero(actions)
        slipped = moving[self.streams.take_one(moving) < self.rules.slip_chance]
        actions = actions.copy()
        actions[slipped] = 0
        return actions

    def _crumble(self, proposed: IntArray) -> None:
        leaving = np.flatnonzero(proposed != self._cell)
        broken = leaving[self.streams.take_one(leaving) < CRUMBLE_PROBABILITY]
        self._active[broken, self._cell[broken]] = lakes.HOLE

    def _finish(
        self, ended: np.ndarray, goal: np.ndarray, rewards: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        info = InfoBuilder(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        self._flag = ended
        over = np.flatnonzero(ended)
        if over.size:
            self._results[over, self._attempt[over]] = goal[over]
            done = over[self._attempt[over] == self.rules.k_attempts - 1]
            terminated[done] = True
            self._report(info, over, done, terminated)
            self._attempt[over] += 1
            self._start_attempt(over)
        observations = self._observe(self._lanes)
        if over.size and done.size:
            info.add_final_observations(done, observations[done])
            self._begin(done, {})
            observations[done] = self._observe(done)
        self._last_observations = observations.copy()
        return observations, rewards, terminated, np.zeros(self.num_envs, dtype=np.bool_), info.info

    def _report(self, info: InfoBuilder, over: IntArray, done: IntArray, terminated: np.ndarray) -> None:
        attempt = self._attempt[over]
        for index in np.flatnonzero(np.bincount(attempt)).tolist():
            lanes = over[attempt == index]
            metrics = {
                f"attempt_{index}/success": self._results[lanes, index],
                f"attempt_{index}/return": self._return[lanes],
                f"attempt_{index}/length": self._steps[lanes],
            }
            info.add_metrics(lanes, metrics, final=index == self.rules.k_attempts - 1)
        if done.size:
            successes = self._results[done].sum(axis=1)
            metrics = {"total_successes": successes, "success_rate": successes / self.rules.k_attempts}
            info.add_metrics(done, metrics, final=True)

    def _start_attempt(self, lanes: IntArray) -> None:
        if self.rules.hard_mode:
            self._active[lanes] = self._maps[lanes]
        self._cell[lanes] = 0
        self._steps[lanes] = 0
        self._return[lanes] = 0.0

    def _begin(self, lanes: IntArray, options: dict[str, Any]) -> None:
        lake = options.get("map")
        if lake is None:
            self._sample_maps(lanes)
        else:
            self._maps[lanes] = self._given_maps(lake, lanes)
        self._active[lanes] = self._maps[lanes]
        if self.rules.hard_mode:
            self._swapped[lanes] = self.streams.take_one(lanes) < SWAP_PROBABILITY
        self._attempt[lanes] = 0
        self._flag[lanes] = True
        self._results[lanes] = -1
        self._start_attempt(lanes)

    def _given_maps(self, lake: Any, lanes: IntArray) -> np.ndarray:
        if isinstance(lake, np.ndarray) and lake.ndim == 3:
            if lake.shape[0] != self.num_envs:
                raise ValueError(f"map: {lake.shape[0]} maps, allowed: one map, or one per lane, {self.num_envs}")
            return np.stack([lakes.parse_lake(lake[lane], self.rules.size) for lane in lanes.tolist()])
        return lakes.parse_lake(lake, self.rules.size)

    def _sample_maps(self, lanes: IntArray) -> None:
        size = self.rules.size
        while lanes.size:
            passable = lakes.passable_from_draws(self.streams.take(lanes, size**2))
            accepted = self.rules.accepts(passable)
            self._maps[lanes[accepted]] = lakes.tiles_from_passable(passable[accepted])
            lanes = lanes[~accepted]

    def _observe(self, lanes: IntArray) -> np.ndarray:
        observations = np.empty((lanes.size, 4), dtype=np.float32)
        observations[:, :2] = self._position_features[self._cell[lanes]]
        observations[:, 2] = self._flag[lanes]
        observations[:, 3] = self._progress[self._attempt[lanes]]
        if self.rules.hard_mode:
            self._add_noise(lanes, observations)
        return observations

    def _add_noise(self, lanes: IntArray, observations: np.ndarray) -> None:
        rows = np.flatnonzero(self.streams.take_one(lanes) < NOISE_PROBABILITY)
        noisy = lanes[rows]
        shift = (3 * self.streams.take(noisy, 2)).astype(np.int64) - 1
        true = np.stack(np.divmod(self._cell[noisy], self.rules.size), axis=1)
        observations[rows, :2] = self._coordinates[np.clip(true + shift, 0, self.rules.size - 1)]

    def _settings(self) -> dict[str, Any]:
        return {"num_envs": self.num_envs, **self.rules.as_dict()}

    def render(self) -> tuple[Any, ...] | None:
        """Draw every lane.

        Returns:
            One text ("ansi") or one `[height, width, 3]` uint8 image ("rgb_array") per lane; None without render mode.
        """
        if self.render_mode is None:
            return None
        views = (
            (self._active[lane], int(self._cell[lane]), self._results[lane], int(self._attempt[lane]))
            for lane in range(self.num_envs)
        )
        draw = lake_text if self.render_mode == "ansi" else draw_lake
        return tuple(draw(self.rules, *view) for view in views)
