"""Means, intervals and verdicts of the paper's report, against loops written out."""

import itertools
import random
import statistics as naive

import pytest

from examples.common.statistics import bootstrap_interval, compare, paired_differences, summarise, t_interval

VALUES = [0.31, -0.12, 0.44, 0.05, 0.27]


def test_mean_and_sample_standard_deviation_are_those_of_the_standard_library() -> None:
    found = summarise(VALUES)
    assert found.mean == pytest.approx(naive.mean(VALUES))
    assert found.std == pytest.approx(naive.stdev(VALUES))
    assert found.n == 5


def test_one_value_has_no_standard_deviation_and_none_has_no_summary() -> None:
    assert (summarise([2.0]).mean, summarise([2.0]).std) == (2.0, None)
    assert summarise([]) is None


def test_bootstrap_agrees_with_one_that_draws_in_a_loop() -> None:
    rng = random.Random(1)
    means = sorted(naive.mean(rng.choices(VALUES, k=len(VALUES))) for _ in range(20_000))
    low, high = bootstrap_interval(VALUES)
    assert low == pytest.approx(means[500], abs=0.012)
    assert high == pytest.approx(means[-501], abs=0.012)


def test_bootstrap_of_three_seeds_is_their_range() -> None:
    # The smallest value three times is one of 27 draws, more than the 2.5 % that are cut off.
    values = [0.4, -0.1, 0.2]
    means = sorted(naive.mean(draw) for draw in itertools.product(values, repeat=3))
    assert bootstrap_interval(values) == pytest.approx((means[0], means[-1]))
    assert bootstrap_interval(values) == pytest.approx((-0.1, 0.4))


def test_bootstrap_gives_the_same_interval_every_time() -> None:
    assert bootstrap_interval(VALUES) == bootstrap_interval(list(VALUES))


def test_t_interval_is_the_one_of_the_textbook() -> None:
    half = 2.776445 * naive.stdev(VALUES) / len(VALUES) ** 0.5  # 97.5 % quantile at 4 degrees of freedom
    assert t_interval(VALUES) == pytest.approx((naive.mean(VALUES) - half, naive.mean(VALUES) + half), rel=1e-5)


@pytest.mark.parametrize("interval", [bootstrap_interval, t_interval])
def test_one_value_has_no_interval(interval) -> None:
    assert interval([1.0]) is None


def test_only_seeds_that_both_have_are_paired() -> None:
    assert paired_differences({2: 5.0, 0: 1.0, 7: 9.0}, {0: 0.5, 2: 1.0, 3: 4.0}) == [0.5, 4.0]


def test_positive_is_better_whatever_the_measure() -> None:
    ours, theirs = {0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.5}
    assert compare(ours, theirs, higher_is_better=True).mean == pytest.approx(0.75)
    assert compare(ours, theirs, higher_is_better=False).mean == pytest.approx(-0.75)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2, 0.3], "holds"),
        ([-0.1, -0.2, -0.3], "does not hold"),
        ([-0.1, 0.2, 0.3], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),  # ties
        ([0.0, 0.2, 0.3], "undecided"),
        ([0.5], "one seed"),
    ],
)
def test_verdict_says_where_the_interval_lies(differences: list[float], verdict: str) -> None:
    found = compare(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0), higher_is_better=True)
    assert found.verdict == verdict
    assert found.n == len(differences)


def test_without_a_common_seed_there_is_nothing_to_compare() -> None:
    assert compare({0: 1.0}, {1: 1.0}, higher_is_better=True) is None
