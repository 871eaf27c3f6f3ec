import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import EvalPrediction

from examples.data.metrics import calibration_error, correlation
from examples.paper.train import scores_for

DRAW = np.random.default_rng(0)


def test_scores_of_classes_are_those_of_scikit_learn() -> None:
    logits, labels = DRAW.normal(size=(200, 2)).astype(np.float32), DRAW.integers(2, size=200)
    prediction = EvalPrediction(logits, labels)
    predicted = logits.argmax(-1)
    assert scores_for("rte")(prediction)["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    found = scores_for("cola")(prediction)["matthews_correlation"]
    assert found == pytest.approx(matthews_corrcoef(labels, predicted))


def test_correlations_are_those_of_scipy_with_ties() -> None:
    labels = DRAW.integers(6, size=100).astype(np.float32)
    logits = np.round(labels + DRAW.normal(size=100)).astype(np.float32)
    scores = scores_for("stsb")(EvalPrediction(logits[:, None], labels))
    assert scores["pearson"] == pytest.approx(pearsonr(logits, labels).statistic)
    assert scores["spearmanr"] == pytest.approx(spearmanr(logits, labels).statistic)


def test_constant_predictions_have_no_correlation() -> None:
    assert correlation(np.ones(5), np.arange(5)) == 0.0


def test_calibration_error_is_the_mean_gap_of_confidence_and_accuracy_over_bins() -> None:
    logits, labels = 3 * DRAW.normal(size=(300, 3)), DRAW.integers(3, size=300)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits, labels, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        confidence = probabilities.max()
        bins.setdefault(int(confidence * 15), []).append((confidence, probabilities.argmax() == label))
    expected = sum(
        len(members) / 300 * abs(np.mean([right for _, right in members]) - np.mean([sure for sure, _ in members]))
        for members in bins.values()
    )
    assert calibration_error(logits, labels) == pytest.approx(expected)


def test_certain_and_right_predictions_are_calibrated() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    assert calibration_error(logits, np.array([0, 1])) == 0.0
    assert calibration_error(logits, np.array([1, 0])) == 1.0
