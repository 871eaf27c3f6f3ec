"""The weight that a source deserves, from errors on held-out rows."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from ctcd_trainer.losses.reliability import trusted_weight
from ctcd_trainer.soft_losses import Bernoulli, Categorical, Point


def test_the_weight_gives_the_target_that_is_nearest_to_the_truth():
    """Simulated numbers: the mixture of label and prediction is best at the weight of the formula."""
    random = np.random.default_rng(0)
    truth = random.normal(size=200_000) * 3
    label, source = truth + random.normal(size=truth.size) * 0.5, truth + random.normal(size=truth.size)
    error_of = lambda w: np.mean(((2 * label + w * source) / (2 + w) - truth) ** 2)  # noqa: E731
    best = minimize_scalar(error_of, bounds=(0, 5), method="bounded").x
    learner = truth + random.normal(size=truth.size) * 0.2
    chance = float(Point().chance_error(torch.tensor(label)))
    error, product = np.mean((source - label) ** 2), np.mean((source - label) * (learner - label))
    weight = trusted_weight(error, np.mean((learner - label) ** 2), product, chance, hard_weight=2.0, limit=9.0)
    assert weight == pytest.approx(best * (chance - error) / (chance - product), rel=0.02)
    worse = trusted_weight(error, 0.1, product, chance, hard_weight=2.0, limit=9.0)
    assert worse == pytest.approx(2 * 0.1 / (error - 0.1) * (chance - error) / (chance - 0.1)), (
        "the least is the bound"
    )


def test_random_sources_weigh_nothing_and_the_best_weighs_the_limit():
    for best in (0.0, 0.1, 0.3):
        assert trusted_weight(best, best, best, 0.5, limit=0.8) == 0.8, "a copy of the best"
        assert trusted_weight(0.5, best, best, 0.5) == trusted_weight(0.9, best, best, 0.5) == 0.0
        assert 0 <= trusted_weight(0.45, best, 0.4, 0.5) <= trusted_weight(0.4, best, 0.4, 0.5) <= 1
        assert trusted_weight(best, 0.45, 0.4, 0.5) == 1.0, "the learner has all to learn"
    assert trusted_weight(0.1, 0.1, -0.1, 0.5) == 0.0, "errors that cancel: the labels have no noise"
    assert trusted_weight(0.6, 0.7, 0.6, 0.5) == 0.0, "no model is better than chance"
    assert trusted_weight(0.49, 0.49, 0.49, 0.5) == pytest.approx(0.2), "no model is far from chance"
    assert trusted_weight(0.1, 0.1, 0.1, 0.5, hard_weight=0.0, limit=0.8) == 0.8


def test_chance_errors_are_those_of_the_frequencies():
    classes = torch.tensor([0, 2, 2, -100, 1, 2])
    frequencies = np.array([0.2, 0.2, 0.6])
    expected = np.mean([((frequencies - np.eye(3)[c]) ** 2).sum() for c in (0, 2, 2, 1, 2)])
    assert float(Categorical().chance_error(classes)) == pytest.approx(expected)
    several = torch.tensor([[0.0, 1.0], [1.0, np.nan], [1.0, 1.0]])
    errors = [(y - 2 / 3) ** 2 for y in (0, 1, 1)] + [0.0, 0.0]
    assert float(Bernoulli().chance_error(several)) == pytest.approx(2 * np.mean(errors))
    assert float(Point().chance_error(torch.tensor([1.0, 4.0, np.nan]))) == pytest.approx(1.5**2)
    for family, nothing in ((Categorical(), torch.tensor([-100])), (Point(), torch.tensor([np.nan]))):
        assert family.chance_error(nothing).isnan()
