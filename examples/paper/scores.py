"""Scores of a model's predictions, in numpy alone: a machine that only trains needs no library of metrics."""

from collections.abc import Callable, Mapping

import numpy as np
from transformers import EvalPrediction

#: The scores of each task besides its loss and, for classes, the calibration error: GLUE's own, but F1.
TASK_SCORES: Mapping[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy",),
    "qnli": ("accuracy",),
    "qqp": ("accuracy",),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
}


def scores_for(task: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` of a GLUE task."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if task == "stsb":
            return {
                "pearson": correlation(logits[:, 0], labels),
                "spearmanr": correlation(ranks(logits[:, 0]), ranks(labels)),
            }
        classes = logits.argmax(-1)
        scores = {"calibration_error": calibration_error(logits, labels)}
        if task == "cola":
            return {"matthews_correlation": correlation(classes, labels)} | scores
        return {"accuracy": float((classes == labels).mean())} | scores

    return compute


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation, `(rows,)` each; of two classes it is Matthews'. 0.0 where one is constant."""
    first, second = first - first.mean(dtype=np.float64), second - second.mean(dtype=np.float64)
    norm = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return float((first * second).sum() / norm) if norm > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        logits: `(rows, classes)`.
        labels: Class indices, `(rows,)`.
        bins: Number of bins of equal width between confidence 0 and 1.

    Returns:
        Mean distance of accuracy and confidence over the bins, weighted by their rows.
    """
    logits = logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = exponentials.max(-1) / exponentials.sum(-1)
    right = logits.argmax(-1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
