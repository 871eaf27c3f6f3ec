"""Soft losses against definitions written with loops and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from scipy.stats import entropy
from transformers import HfArgumentParser

from ctcd_trainer import CoDistillationTrainingArguments
from ctcd_trainer.graph import EDGES
from ctcd_trainer.losses.fused_linear import LinearHead, linear_losses
from ctcd_trainer.soft_losses import (
    SOFT_LOSSES,
    Bernoulli,
    Categorical,
    ClosedForm,
    Point,
    Prediction,
    SoftLoss,
    find_soft_loss,
)


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


def test_scores_against_labels_equal_their_definitions(logits):
    """Class 2 has no label; class 0 of the last row is impossible."""
    z, other = logits
    labels, possible = torch.tensor([0, 3, -100, 1, 2]), torch.ones(5, 4, dtype=torch.bool)
    possible[4, 0] = False
    family = Categorical(possible)
    scores = {"nll": [], "brier": [], "product": [], "right": [], "confidence": []}
    for row, label in enumerate(labels.tolist()):
        p, q = (softmax(np.where(possible[row], x[row].double(), -np.inf)) for x in (z, other))
        onehot = np.eye(4)[label] if label >= 0 else np.full(4, np.nan)
        scores["nll"].append(-np.log(p[label]) if label >= 0 else np.nan)
        scores["brier"].append(((p - onehot) ** 2).sum())
        scores["product"].append(((p - onehot) * (q - onehot)).sum())
        scores["right"].append(p.argmax() == label)
        scores["confidence"].append(1 - entropy(p) / np.log(possible[row].sum().item()))
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(family.nll(z, labels), scores["nll"], **close)
    np.testing.assert_allclose(family.squared_error(z, labels[:, None]), scores["brier"], **close)
    np.testing.assert_allclose(family.error_product(z, other, labels), scores["product"], **close)
    assert family.right(z, labels).tolist() == scores["right"]
    np.testing.assert_allclose(family.confidence(z), scores["confidence"], **close)


def test_scores_of_several_labels_are_means_over_those_that_are_there(logits):
    z, other = logits
    labels = torch.tensor([[0, 1, 1, 0], [1, 1, np.nan, 0], [np.nan] * 4, [1, 0, 0, 0.3], [0, 0, 0, np.nan]])
    there, p, q, y = ~labels.isnan().numpy(), *(expit(x.double().numpy()) for x in (z, other)), labels.numpy()
    mean = lambda values: [row[mask].mean() if mask.any() else np.nan for row, mask in zip(values, there, strict=True)]  # noqa: E731
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(Bernoulli().nll(z, labels), mean(-y * np.log(p) - (1 - y) * np.log(1 - p)), **close)
    np.testing.assert_allclose(Bernoulli().squared_error(z, labels), mean(2 * (p - y) ** 2), **close)
    np.testing.assert_allclose(Bernoulli().error_product(z, other, labels), mean(2 * (p - y) * (q - y)), **close)
    right = [bool(m.any() and ((p > 0.5) == (y > 0.5))[i][m].all()) for i, m in enumerate(there)]
    assert Bernoulli().right(z, labels).tolist() == right
    assert Bernoulli().right(z, (z > 0).float()).all()
    entropies = [[entropy([x, 1 - x]) for x in row] for row in p]
    np.testing.assert_allclose(Bernoulli().confidence(z), 1 - np.mean(entropies, 1) / np.log(2), **close)


def test_scores_of_numbers_are_squared_errors(logits):
    z, other = (x[:, :1] for x in logits)
    labels = torch.tensor([1.0, 2.0, np.nan, -1.0, 0.0])
    for score in (Point().nll, Point().squared_error):
        np.testing.assert_allclose(score(z, labels), (z[:, 0] - labels) ** 2, rtol=1e-6)
    np.testing.assert_allclose(
        Point().error_product(z, other, labels), (z[:, 0] - labels) * (other[:, 0] - labels), rtol=1e-6
    )
    assert Point().right(z, labels) is None
    assert Point().confidence(z) is None


class Hellinger(SoftLoss):
    """`sum (sqrt(q) - sqrt(r))^2`, a loss that the package does not have.

    With the sum `b` of `sqrt(q r)` its gradient is `q b - sqrt(q r)`.
    """

    summary = "squared Hellinger distance"

    def value(self, learner, source):
        return ((learner / 2).exp() - (source / 2).exp()).square().sum(-1)

    def closed_form(self, learner, source, buffer):
        q, r = learner.outcomes, source.outcomes
        root = torch.add(q, r, out=buffer(q)).mul_(0.5).exp_()  # sqrt(q r)
        overlap = root.sum(-1)
        term = torch.sub(root, learner.probs * overlap.unsqueeze(-1), out=buffer(q))
        return ClosedForm(2 - 2 * overlap, term, factor=-1.0)


class MeanCube(SoftLoss):
    """The mean of `|z - s|^3` of the logits."""

    summary = "mean cube of the difference of the logits"
    of_logits = averaged = True

    def value(self, learner, source):
        return (learner - source).abs().pow(3).sum(-1)

    def closed_form(self, learner, source, buffer):
        difference = torch.sub(learner.outcomes, source.outcomes, out=buffer(learner.outcomes))
        value = difference.abs().pow(3).sum(-1)
        return ClosedForm(value, difference.mul_(difference.abs()), factor=3.0)


@pytest.fixture(params=[Hellinger, MeanCube])
def new_loss(request, monkeypatch):
    """A loss that is added to the table, and nowhere else."""
    monkeypatch.setitem(SOFT_LOSSES, "new", request.param())
    return request.param()


def closed_gradient(loss, learner, source):
    """Value and gradient `(rows, outcomes)` at temperature 1, as the fused pass adds them up."""
    predictions = []
    for z in (learner, source):
        outcomes = z if loss.of_logits else z.log_softmax(-1)
        predictions.append(Prediction(outcomes, None if loss.of_logits else outcomes.exp()))
    before = [prediction.outcomes.clone() for prediction in predictions]
    value, term, factor, probs_factor = loss.closed_form(*predictions, torch.empty_like)
    for prediction, outcomes in zip(predictions, before, strict=True):
        assert torch.equal(prediction.outcomes, outcomes), "the predictions serve other losses as well"
    gradient = factor * term
    return value, gradient if loss.of_logits else gradient + probs_factor * predictions[0].probs


def check_closed_form(loss, logits):
    learner, source = (z.double() for z in logits)
    learner.requires_grad_()
    expected = loss.value(*((z if loss.of_logits else z.log_softmax(-1)) for z in (learner, source)))
    value, gradient = closed_gradient(loss, learner.detach(), source)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected.sum(), learner))


@pytest.mark.parametrize("name", list(SOFT_LOSSES))
def test_the_closed_form_of_every_loss_is_its_value_and_the_gradient_of_autograd(name, logits):
    check_closed_form(SOFT_LOSSES[name], logits)


def test_a_loss_that_is_added_to_the_table_is_the_one_of_all_heads(new_loss, logits):
    check_closed_form(new_loss, logits)
    learner, source = logits
    for tau in (1.0, 3.0):
        if new_loss.of_logits:
            expected = (learner - source).abs().pow(3).mean(-1)
        else:
            q, r = torch.softmax(learner / tau, -1), torch.softmax(source / tau, -1)
            expected = tau**2 * (q.sqrt() - r.sqrt()).square().sum(-1)
        torch.testing.assert_close(Categorical().soft_loss(learner, source, "new", tau), expected)
    assert Bernoulli().soft_loss(learner, source, "new", 1.0).shape == (5,)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_a_loss_that_is_added_to_the_table_is_the_one_of_the_fused_pass(new_loss, tau):
    """All other losses would have been taken for Jensen-Shannon."""
    generator = torch.Generator().manual_seed(1)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    heads = {name: LinearHead(new(9, 4), new(size, 4)) for name, size in (("teacher", 13), ("student", 15))}
    labels = torch.arange(9)
    tensors = [tensor for head in heads.values() for tensor in (head.hidden, head.weight)]
    hard = {"teacher": 1.0, "student": 0.5}
    loss, values = linear_losses(heads, labels, hard, EDGES[:2], "new", tau)
    logits = {name: head.logits() for name, head in heads.items()}
    expected = sum(
        weight * torch.nn.functional.cross_entropy(logits[name], labels, reduction="sum")
        for name, weight in hard.items()
    )
    for edge in EDGES[:2]:
        learner, source = logits[edge.learner][:, :13], logits[edge.source][:, :13].detach()
        soft = Categorical().soft_loss(learner, source, "new", tau).sum()
        torch.testing.assert_close(values[edge.loss_name], soft.detach())
        expected = expected + soft
    torch.testing.assert_close(loss, expected)
    for own, other in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(own, other)


def test_a_loss_that_is_added_to_the_table_is_a_choice_of_the_arguments(new_loss, tmp_path, capsys):
    parser = HfArgumentParser(CoDistillationTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true", "--soft_loss"]
    assert parser.parse_args_into_dataclasses([*line, "new"])[0].soft_loss == "new"
    with pytest.raises(SystemExit):
        parser.parse_args([*line, "old"])
    assert "choose from" in capsys.readouterr().err


def test_a_name_that_is_not_in_the_table_is_refused(logits):
    message = r"`soft_loss='old'` is unknown. Valid values: js, kl, mse, reverse_kl"
    heads = {"teacher": LinearHead(torch.ones(2, 3), torch.ones(5, 3))}
    for compare in (
        lambda: find_soft_loss("old"),
        lambda: Categorical().soft_loss(*logits, "old", 1.0),
        lambda: linear_losses(heads, torch.tensor([0, 1]), {"teacher": 1.0}, (), "old"),
    ):
        with pytest.raises(ValueError, match=message):
            compare()
