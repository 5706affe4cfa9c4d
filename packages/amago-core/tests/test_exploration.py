import json

import numpy as np
import pytest

from amago_core.exploration import (
    BilevelEpsilonGreedyConfig,
    EpsilonGreedy,
    EpsilonGreedyConfig,
    Exploration,
    ExplorationConfig,
)
from amago_nets.specs import ActionSpec

DISCRETE = ActionSpec(kind="discrete", size=4)
CONTINUOUS = ActionSpec(kind="continuous", size=2)
BINARY = ActionSpec(kind="multi_binary", size=5)


def constant(eps, **kwargs):
    return EpsilonGreedyConfig(start_eps=eps, end_eps=eps, **kwargs)


def at(exploration, n, t, multiplier=1.0):
    """Put every lane at `n`, `t` and return its epsilon."""
    state = exploration.state_dict()
    lanes = exploration.lanes
    exploration.load_state_dict({**state, "n": [n] * lanes, "t": [t] * lanes, "multiplier": [multiplier] * lanes})
    return exploration.epsilon()


class TestSchedules:
    @pytest.mark.parametrize(
        ("n", "expected"),
        [(0, 1.0), (100_000, 0.905), (500_000, 0.525), (950_000, 0.0975), (1_000_000, 0.05), (10**9, 0.05)],
    )
    @pytest.mark.parametrize("multiplier", [1.0, 0.4])
    def test_epsilon_greedy_table(self, n, expected, multiplier):
        exploration = EpsilonGreedyConfig().build(3, DISCRETE, seed=0)
        for t in (0, 50, 10**6):
            assert at(exploration, n, t, multiplier).tolist() == pytest.approx([expected * multiplier] * 3)

    @pytest.mark.parametrize(
        ("n", "row"),
        [
            (0, [1.0, 0.9, 0.8, 0.8]),
            (500_000, [0.525, 0.465, 0.405, 0.405]),
            (1_000_000, [0.05, 0.03, 0.01, 0.01]),
            (2_000_000, [0.05, 0.03, 0.01, 0.01]),
        ],
    )
    def test_bilevel_table(self, n, row):
        exploration = BilevelEpsilonGreedyConfig(rollout_horizon=100).build(2, DISCRETE, seed=0)
        for t, expected in zip((0, 50, 100, 200), row, strict=True):
            assert at(exploration, n, t).tolist() == pytest.approx([expected] * 2)

    def test_epsilon_stays_at_its_end_past_the_horizon(self):
        exploration = BilevelEpsilonGreedyConfig(rollout_horizon=100).build(1, DISCRETE, seed=0)
        assert at(exploration, 0, 1000).item() == pytest.approx(0.8)

    def test_lanes_are_counted_apart(self):
        config = BilevelEpsilonGreedyConfig(rollout_horizon=10, steps_anneal=100, randomize=False)
        exploration = config.build(2, DISCRETE, seed=0)
        actions = np.zeros(2, dtype=np.int64)
        for _ in range(5):
            exploration.apply(actions)
        exploration.start_episode(np.array([True, False]))
        # n = 5 in both lanes; t = 0 in the first and 5 in the second.
        start, end = 1.0 - 0.95 * 0.05, 0.8 - 0.79 * 0.05
        assert exploration.epsilon().tolist() == pytest.approx([start, (start + end) / 2])
        exploration.apply(actions, active=np.array([False, True]))
        assert exploration.steps.tolist() == [5, 6]
        assert exploration.state_dict()["t"] == [0, 6]

    def test_a_custom_schedule_overrides_one_method(self):
        horizon = 20

        class TMaze(EpsilonGreedy):
            def eps(self, n, t):
                corridor = (t > 0) & (t < horizon - 3)
                return np.where(corridor, 0.5 / horizon, super().eps(n, t))

        config = EpsilonGreedyConfig(end_eps=0.01, steps_anneal=100_000, randomize=False)
        exploration = TMaze(config, 2, DISCRETE, seed=0)
        assert at(exploration, 50_000, 0).tolist() == pytest.approx([0.505] * 2)
        assert at(exploration, 50_000, 1).tolist() == pytest.approx([0.025] * 2)
        assert at(exploration, 50_000, 16).tolist() == pytest.approx([0.025] * 2)
        assert at(exploration, 50_000, 17).tolist() == pytest.approx([0.505] * 2)

    @pytest.mark.parametrize(("value", "match"), [(1.5, r"\[0, 1\]"), (np.nan, r"\[0, 1\]"), (np.ones(3), "shape")])
    def test_a_custom_schedule_is_checked(self, value, match):
        class Bad(Exploration):
            def eps(self, n, t):
                return value

        with pytest.raises(ValueError, match=match):
            Bad(2, DISCRETE, 0).epsilon()

    def test_a_schedule_may_be_one_number_for_all_lanes(self):
        class Fixed(Exploration):
            def eps(self, n, t):
                return 0.25

        assert Fixed(3, DISCRETE, 0, randomize=False).epsilon().tolist() == [0.25] * 3


class TestMultiplier:
    def test_it_is_one_unless_randomized(self):
        exploration = EpsilonGreedyConfig(randomize=False).build(4, DISCRETE, seed=0)
        exploration.start_episode(np.ones(4, dtype=bool))
        assert exploration.multiplier.tolist() == [1.0] * 4
        assert exploration.epsilon().tolist() == [1.0] * 4

    def test_it_is_drawn_anew_only_where_a_rollout_starts(self):
        exploration = EpsilonGreedyConfig().build(4, DISCRETE, seed=0)
        before = exploration.multiplier
        assert ((before >= 0) & (before < 1)).all() and len(set(before)) == 4
        exploration.apply(np.zeros(4, dtype=np.int64))
        assert exploration.multiplier.tolist() == before.tolist()
        exploration.start_episode(np.array([False, True, False, True]))
        changed = exploration.multiplier != before
        assert changed.tolist() == [False, True, False, True]

    def test_it_is_uniform(self):
        exploration = EpsilonGreedyConfig().build(20_000, DISCRETE, seed=0)
        counts = np.histogram(exploration.multiplier, bins=10, range=(0, 1))[0]
        assert (np.abs(counts - 2000) < 200).all()


class TestDiscrete:
    def test_zero_epsilon_changes_nothing(self):
        exploration = constant(0.0).build(3, DISCRETE, seed=0)
        actions = np.array([0, 3, 1])
        for _ in range(50):
            assert exploration.apply(actions).tolist() == [0, 3, 1]

    @pytest.mark.parametrize("eps", [0.3, 1.0])
    def test_change_rate_and_uniform_replacement(self, eps):
        lanes = 40_000
        exploration = constant(eps, randomize=False).build(lanes, DISCRETE, seed=1)
        executed = exploration.apply(np.full(lanes, 2))
        shares = np.bincount(executed, minlength=4) / lanes
        assert shares[[0, 1, 3]] == pytest.approx([eps / 4] * 3, abs=0.01)
        assert shares[2] == pytest.approx(1 - eps * 0.75, abs=0.01)

    @pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
    def test_dtype_is_kept_and_the_input_is_not_modified(self, dtype):
        exploration = constant(1.0, randomize=False).build(64, DISCRETE, seed=0)
        actions = np.zeros(64, dtype=dtype)
        executed = exploration.apply(actions)
        assert executed.dtype == dtype
        assert executed.any() and not actions.any()

    def test_many_actions(self):
        exploration = constant(1.0, randomize=False).build(256, ActionSpec(kind="discrete", size=1000), seed=0)
        assert exploration.apply(np.full(256, 300)).max() > 255


class TestContinuous:
    def test_by_hand(self):
        exploration = constant(1.0, randomize=False).build(1, CONTINUOUS, seed=0)
        executed = exploration.apply(np.array([[0.5, -0.5]]))
        assert executed[0].tolist() == pytest.approx([0.6257302, -0.6321049], rel=1e-6)

    def test_noise_scales_with_epsilon_per_lane(self):
        exploration = constant(0.5, randomize=False).build(2, CONTINUOUS, seed=0)
        state = exploration.state_dict()
        exploration.load_state_dict({**state, "multiplier": [1.0, 0.0]})
        executed = exploration.apply(np.zeros((2, 2)))
        assert executed[0].tolist() == pytest.approx([0.5 * 0.12573022, 0.5 * -0.13210486], rel=1e-6)
        assert executed[1].tolist() == [0.0, 0.0]

    def test_result_is_clipped_and_keeps_float32(self):
        exploration = constant(1.0, randomize=False).build(500, CONTINUOUS, seed=0)
        executed = exploration.apply(np.ones((500, 2), dtype=np.float32))
        assert executed.dtype == np.float32
        assert executed.max() == 1.0 and executed.min() >= -1.0 and (executed < 1.0).any()

    @pytest.mark.parametrize("value", [1.0001, -2.0, np.nan, np.inf])
    def test_actions_outside_the_range_are_refused(self, value):
        exploration = constant(0.1).build(1, CONTINUOUS, seed=0)
        with pytest.raises(ValueError, match=r"allowed are -1.0 to 1.0"):
            exploration.apply(np.array([[0.0, value]]))


class TestMultiBinary:
    @pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.float32])
    def test_each_bit_flips_with_half_epsilon(self, dtype):
        lanes = 20_000
        exploration = constant(0.4, randomize=False).build(lanes, BINARY, seed=0)
        actions = np.tile(np.array([0, 1, 0, 1, 1], dtype=dtype), (lanes, 1))
        executed = exploration.apply(actions)
        assert executed.dtype == dtype
        assert set(np.unique(executed.astype(int))) == {0, 1}
        assert (executed != actions).mean(axis=0) == pytest.approx([0.2] * 5, abs=0.015)

    def test_zero_epsilon_changes_nothing(self):
        exploration = constant(0.0).build(1, BINARY, seed=0)
        assert exploration.apply(np.array([[0, 1, 1, 0, 1]])).tolist() == [[0, 1, 1, 0, 1]]


CASES = [
    (DISCRETE, np.array([0, 1, 2])),
    (CONTINUOUS, np.zeros((3, 2))),
    (BINARY, np.zeros((3, 5), dtype=np.int8)),
]


@pytest.mark.parametrize(("spec", "actions"), CASES)
class TestDeterminism:
    def run(self, exploration, actions, steps):
        out = []
        for step in range(steps):
            out.append(exploration.apply(actions).tolist())
            exploration.start_episode(np.array([step % 3 == 2, step % 5 == 4, False]))
        return out

    def test_a_seed_decides_everything(self, spec, actions):
        config = EpsilonGreedyConfig(steps_anneal=50)
        first, second, other = (config.build(3, spec, seed) for seed in (5, 5, 6))
        reference = self.run(first, actions, 40)
        assert self.run(second, actions, 40) == reference
        assert self.run(other, actions, 40) != reference

    def test_resuming_through_json_continues_exactly(self, spec, actions):
        config = BilevelEpsilonGreedyConfig(rollout_horizon=7, steps_anneal=30)
        exploration = config.build(3, spec, seed=5)
        self.run(exploration, actions, 13)
        saved = json.loads(json.dumps(exploration.state_dict()))
        expected = self.run(exploration, actions, 20)
        resumed = config.build(3, spec, seed=99)
        resumed.load_state_dict(saved)
        assert self.run(resumed, actions, 20) == expected
        assert resumed.state_dict() == exploration.state_dict()

    def test_a_saved_state_does_not_move_with_the_object(self, spec, actions):
        exploration = EpsilonGreedyConfig().build(3, spec, seed=5)
        saved = exploration.state_dict()
        text = json.dumps(saved)
        self.run(exploration, actions, 3)
        assert json.dumps(saved) == text

    def test_inactive_lanes_keep_action_and_counters(self, spec, actions):
        exploration = constant(1.0, randomize=False).build(3, spec, seed=0)
        active = np.array([True, False, True])
        executed = np.stack([exploration.apply(actions, active=active) for _ in range(20)])
        assert (executed[:, 1] == actions[1]).all()
        assert (executed[:, 0] != actions[0]).any()
        assert exploration.steps.tolist() == [20, 0, 20]


class TestValidation:
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda: EpsilonGreedyConfig(start_eps=1.1), "start_eps"),
            (lambda: EpsilonGreedyConfig(end_eps=-0.1), "end_eps"),
            (lambda: EpsilonGreedyConfig(start_eps=0.1, end_eps=0.2), "end_eps"),
            (lambda: EpsilonGreedyConfig(start_eps=float("nan")), "start_eps"),
            (lambda: EpsilonGreedyConfig(steps_anneal=0), "steps_anneal"),
            (lambda: EpsilonGreedyConfig(steps_anneal=10.0), "steps_anneal"),
            (lambda: BilevelEpsilonGreedyConfig(rollout_horizon=0), "rollout_horizon"),
            (lambda: BilevelEpsilonGreedyConfig(rollout_horizon=5, eps_end_end=0.9), "eps_end_end"),
            (lambda: EpsilonGreedyConfig().build(0, DISCRETE, 0), "lanes"),
            (lambda: EpsilonGreedyConfig().build(1, DISCRETE, -1), "seed"),
        ],
    )
    def test_bad_configuration(self, make, name):
        with pytest.raises(ValueError, match=name):
            make()

    def test_the_horizon_is_required(self):
        with pytest.raises(TypeError, match="rollout_horizon"):
            BilevelEpsilonGreedyConfig()

    def test_a_custom_config_must_implement_build(self):
        with pytest.raises(NotImplementedError, match="ExplorationConfig"):
            ExplorationConfig().build(1, DISCRETE, 0)

    @pytest.mark.parametrize(
        ("spec", "actions", "match"),
        [
            (DISCRETE, np.zeros(2, dtype=np.int64), "3 lanes"),
            (DISCRETE, np.zeros((3, 1), dtype=np.int64), "shape"),
            (DISCRETE, np.zeros(3), "dtype"),
            (DISCRETE, np.array([0, 4, 0]), "0 to 3"),
            (DISCRETE, np.array([0, -1, 0]), "0 to 3"),
            (CONTINUOUS, np.zeros((2, 2)), "3 lanes"),
            (CONTINUOUS, np.zeros((3, 3)), "shape"),
            (CONTINUOUS, np.zeros((3, 2), dtype=np.int64), "dtype"),
            (BINARY, np.full((3, 5), 2), "0 and 1"),
        ],
    )
    def test_bad_actions_change_nothing(self, spec, actions, match):
        exploration = EpsilonGreedyConfig().build(3, spec, seed=0)
        before = exploration.state_dict()
        with pytest.raises(ValueError, match=match):
            exploration.apply(actions)
        assert exploration.state_dict() == before

    @pytest.mark.parametrize("mask", [np.ones(2, dtype=bool), np.ones(3), np.ones((3, 1), dtype=bool)])
    def test_bad_masks(self, mask):
        exploration = EpsilonGreedyConfig().build(3, DISCRETE, seed=0)
        with pytest.raises(ValueError, match="lane_mask"):
            exploration.start_episode(mask)
        with pytest.raises(ValueError, match="active"):
            exploration.apply(np.zeros(3, dtype=np.int64), active=mask)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda state: state.pop("t"), "missing"),
            (lambda state: state.update(n=[0]), "3 lanes"),
            (lambda state: state.update(generator={"bit_generator": "MT19937"}), "PCG64"),
            (lambda state: state.update(generator=None), "PCG64"),
        ],
    )
    def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(self, change, match):
        exploration = EpsilonGreedyConfig().build(3, DISCRETE, seed=0)
        before = exploration.state_dict()
        state = exploration.state_dict()
        change(state)
        with pytest.raises(ValueError, match=match):
            exploration.load_state_dict(state)
        assert exploration.state_dict() == before
