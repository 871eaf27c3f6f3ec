"""Soft losses against definitions written with loops and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax

from ctcd_trainer.soft_losses import SOFT_LOSSES, Bernoulli, Categorical, Point


def divergence(name, p, q):
    """Between two vectors of probabilities; `q` is the learner's."""
    if name == "kl":
        return rel_entr(p, q).sum()
    if name == "reverse_kl":
        return rel_entr(q, p).sum()
    m = (p + q) / 2
    return (rel_entr(p, m).sum() + rel_entr(q, m).sum()) / 2


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(5, 4, generator=generator), 3 * torch.randn(5, 4, generator=generator)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js"])
def test_categorical_divergences_equal_their_definitions(name, tau, logits):
    learner, source = logits
    expected = [
        tau**2 * divergence(name, softmax(s / tau), softmax(z / tau))
        for z, s in zip(learner.double().numpy(), source.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(Categorical().soft_loss(learner, source, name, tau), expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js"])
def test_multi_label_divergences_are_sums_over_the_labels(name, tau, logits):
    learner, source = logits
    expected = []
    for z, s in zip(learner.double().numpy(), source.double().numpy(), strict=True):
        total = 0.0
        for label in range(len(z)):
            p, q = expit(s[label] / tau), expit(z[label] / tau)
            total += divergence(name, np.array([p, 1 - p]), np.array([q, 1 - q]))
        expected.append(tau**2 * total)
    np.testing.assert_allclose(Bernoulli().soft_loss(learner, source, name, tau), expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_mse_compares_logits_and_does_not_depend_on_the_temperature(tau, logits):
    learner, source = logits
    squares = (learner.double().numpy() - source.double().numpy()) ** 2
    np.testing.assert_allclose(Categorical().soft_loss(learner, source, "mse", tau), squares.mean(1), rtol=1e-5)
    np.testing.assert_allclose(Bernoulli().soft_loss(learner, source, "mse", tau), squares.sum(1), rtol=1e-5)


@pytest.mark.parametrize("name", list(SOFT_LOSSES))
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_regression_compares_predictions_by_their_squared_error_whatever_the_soft_loss(name, tau):
    learner, source = torch.tensor([[1.0], [2.5]]), torch.tensor([[0.0], [3.0]])
    assert Point().soft_loss(learner, source, name, tau).tolist() == [1.0, 0.25]


def test_gradient_of_kl_is_temperature_times_the_difference_of_the_probabilities(logits):
    """The formula of the method: d(tau^2 KL) / dz_S = tau (p_S - p_T)."""
    learner, source = logits
    tau = 3.0
    learner.requires_grad_()
    Categorical().soft_loss(learner, source, "kl", tau).sum().backward()
    expected = tau * (softmax(learner.detach().numpy() / tau, -1) - softmax(source.numpy() / tau, -1))
    np.testing.assert_allclose(learner.grad, expected, atol=1e-5)


@pytest.mark.parametrize("family", [Categorical(), Bernoulli()])
@pytest.mark.parametrize("name", list(SOFT_LOSSES))
def test_gradients_are_exact_in_double_precision(family, name, logits):
    learner, source = (x.double() for x in logits)
    learner.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: family.soft_loss(z, source, name, 2.0), learner)


@pytest.mark.parametrize("family", [Categorical(), Bernoulli(), Point()])
@pytest.mark.parametrize("name", list(SOFT_LOSSES))
def test_soft_losses_are_zero_for_equal_and_positive_for_different_predictions(family, name, logits):
    learner, source = logits
    assert family.soft_loss(learner, learner, name, 2.0).abs().max() < 1e-6
    assert family.soft_loss(learner, source, name, 2.0).min() > 0


def test_jensen_shannon_is_symmetric_and_at_most_log_2(logits):
    far = torch.tensor([[60.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 60.0, 0.0, 0.0]])
    assert Categorical().soft_loss(*far, "js", 1.0).item() == pytest.approx(math.log(2))
    first, second = logits
    forth, back = (Categorical().soft_loss(a, b, "js", 2.0) for a, b in ((first, second), (second, first)))
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize("family", [Categorical(), Bernoulli()])
@pytest.mark.parametrize("name", list(SOFT_LOSSES))
def test_extreme_logits_give_finite_losses_and_gradients(family, name):
    learner = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    loss = family.soft_loss(learner, torch.tensor([[-80.0, 80.0, 0.0]]), name, 1.0).sum()
    loss.backward()
    assert loss.isfinite()
    assert learner.grad.isfinite().all()


def test_half_precision_logits_are_compared_in_single_precision(logits):
    learner, source = (x.bfloat16() for x in logits)
    expected = Categorical().soft_loss(learner.float(), source.float(), "kl", 2.0)
    actual = Categorical().soft_loss(learner, source, "kl", 2.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
