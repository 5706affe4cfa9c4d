import math

import numpy as np
import pytest

from amago_core import statistics as statistics_module
from amago_core.statistics import bootstrap_ci, lower_quintile, summarize_metrics, summarize_returns, worst_fifth_mean


class TestBootstrap:
    def test_two_samples_by_hand(self):
        # Resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
        low, high = bootstrap_ci([0.0, 1.0], confidence=0.95, seed=0)
        assert (float(low), float(high)) == (0.0, 1.0)
        low, high = bootstrap_ci([0.0, 1.0], confidence=0.4, seed=0)
        assert (float(low), float(high)) == (0.5, 0.5)

    def test_close_to_the_normal_interval_for_many_samples(self):
        samples = np.random.default_rng(0).normal(3.0, 2.0, size=400)
        interval = bootstrap_ci(samples, seed=1)
        half = 1.96 * samples.std() / math.sqrt(400)
        assert float(interval.low) == pytest.approx(samples.mean() - half, abs=0.02)
        assert float(interval.high) == pytest.approx(samples.mean() + half, abs=0.02)

    def test_equals_a_loop_over_resamples(self):
        samples = np.random.default_rng(0).normal(size=(7, 3))
        interval = bootstrap_ci(samples, resamples=50, confidence=0.8, seed=4)
        rng = np.random.default_rng(4)
        means = np.array([samples[rows].mean(axis=0) for rows in rng.integers(7, size=(50, 7))])
        np.testing.assert_allclose(interval.low, np.quantile(means, 0.1, axis=0), rtol=1e-12)
        np.testing.assert_allclose(interval.high, np.quantile(means, 0.9, axis=0), rtol=1e-12)

    def test_columns_are_resampled_together_and_match_single_ones(self):
        samples = np.random.default_rng(0).normal(size=(9, 4))
        joint = bootstrap_ci(samples, seed=2)
        assert joint.low.shape == joint.high.shape == (4,)
        for column in range(4):
            single = bootstrap_ci(samples[:, column], seed=2)
            assert single.low.shape == ()
            assert float(single.low) == pytest.approx(joint.low[column], rel=1e-12)
            assert float(single.high) == pytest.approx(joint.high[column], rel=1e-12)

    def test_blocks_do_not_change_the_answer(self, monkeypatch):
        samples = np.random.default_rng(0).normal(size=(9, 2))
        whole = bootstrap_ci(samples, seed=2)
        monkeypatch.setattr(statistics_module, "_MAX_DRAWS_PER_BLOCK", 9 * 7)
        blocks = bootstrap_ci(samples, seed=2)
        np.testing.assert_array_equal(whole.low, blocks.low)
        np.testing.assert_array_equal(whole.high, blocks.high)

    def test_seeded(self):
        samples = np.random.default_rng(0).normal(size=12)
        assert bootstrap_ci(samples, seed=3) == bootstrap_ci(samples, seed=3)
        assert bootstrap_ci(samples, seed=3) != bootstrap_ci(samples, seed=4)

    @pytest.mark.parametrize("samples", [[0.1], [0.1] * 7])
    def test_no_spread_gives_the_value_itself(self, samples):
        low, high = bootstrap_ci(samples, seed=0)
        assert (float(low), float(high)) == (0.1, 0.1)

    @pytest.mark.parametrize(
        ("samples", "kwargs", "name"),
        [
            ([], {}, "samples"),
            (1.0, {}, "samples"),
            ([1.0, math.nan], {}, "samples"),
            ([1.0], {"confidence": 1.0}, "confidence"),
            ([1.0], {"resamples": 0}, "resamples"),
        ],
    )
    def test_bad_arguments(self, samples, kwargs, name):
        with pytest.raises(ValueError, match=name):
            bootstrap_ci(samples, seed=0, **kwargs)


class TestTails:
    def test_quintile_is_a_percentile_and_the_worst_fifth_is_a_mean(self):
        returns = np.random.default_rng(0).permutation(10.0 * np.arange(10)) / 10
        assert lower_quintile(returns) == pytest.approx(1.8)
        assert worst_fifth_mean(returns) == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("returns", "expected"),
        [
            ([4.0], 4.0),
            ([3.0, 1.0, 2.0], 1.0),  # a fifth of 3 is less than one rollout: the worst one
            ([1.0, 2.0, 3.0, 4.0, 5.0], 1.0),
            ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], (1.0 + 0.4 * 2.0) / 1.4),
            (list(range(15)), 1.0),
        ],
    )
    def test_worst_fifth_mean_by_hand(self, returns, expected):
        assert worst_fifth_mean(returns) == pytest.approx(expected)

    @pytest.mark.parametrize("summary", [lower_quintile, worst_fifth_mean])
    @pytest.mark.parametrize("values", [[], [math.nan], [[1.0]]])
    def test_bad_values(self, summary, values):
        with pytest.raises(ValueError, match="values"):
            summary(values)


class TestSummaries:
    def test_returns(self):
        assert summarize_returns({"maze": [float(i) for i in range(10)], "key": [2.0, 4.0]}) == pytest.approx(
            {
                "Finished Rollouts in maze": 10,
                "Average Total Return in maze": 4.5,
                "Bottom Quintile Total Return in maze": 1.8,
                "20th Percentile Total Return in maze": 1.8,
                "Worst Fifth Mean Total Return in maze": 0.5,
                "Finished Rollouts in key": 2,
                "Average Total Return in key": 3.0,
                "Bottom Quintile Total Return in key": 2.4,
                "20th Percentile Total Return in key": 2.4,
                "Worst Fifth Mean Total Return in key": 2.0,
                # Unweighted over names, although maze has five times the rollouts.
                "Average Total Return (Across All Env Names)": 3.75,
            }
        )

    def test_nothing_finished_reports_the_count_and_never_a_nan(self):
        assert summarize_returns({"maze": []}) == {"Finished Rollouts in maze": 0.0}
        assert summarize_returns({}) == {}
        mixed = summarize_returns({"maze": [], "key": [1.0]})
        assert mixed["Average Total Return (Across All Env Names)"] == 1.0

    def test_metrics(self):
        metrics = {
            "maze": {"attempt_0/success": [0.0, 1.0, 1.0, 0.0], "attempt_1/success": []},
            "key": {"score": [3.0]},
        }
        assert summarize_metrics(metrics) == {"Average attempt_0/success in maze": 0.5, "Average score in key": 3.0}
        assert summarize_metrics({}) == {}

    def test_a_nan_is_refused_rather_than_averaged(self):
        with pytest.raises(ValueError, match="NaN"):
            summarize_returns({"maze": [1.0, math.nan]})
        with pytest.raises(ValueError, match="NaN"):
            summarize_metrics({"maze": {"score": [math.inf]}})
