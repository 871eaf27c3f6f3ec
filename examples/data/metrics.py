"""The scores of GLUE, in numpy alone: a machine that only trains a prepared grid needs no library of metrics."""

from collections.abc import Mapping

import numpy as np

#: The scores of each GLUE task (Wang et al. 2019, arXiv 1804.07461, table 1).
GLUE_SCORES: Mapping[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "stsb": ("pearson", "spearmanr"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    **dict.fromkeys(("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "sst2", "wnli"), ("accuracy",)),
}


def glue_scores(task: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The scores of a task.

    An undefined score is 0.0: a correlation with constant values or with fewer than two examples, and the F1 of a
    class that neither occurs nor is predicted. A correlation with NaN or infinite values is NaN.

    Args:
        task: A key of `GLUE_SCORES`.
        predictions: Class indices, or scores for `stsb`, `(rows,)`.
        references: Likewise.
    """
    compute = {
        "matthews_correlation": correlation,  # of two classes, it is Pearson's correlation
        "pearson": correlation,
        "spearmanr": lambda first, second: correlation(ranks(first), ranks(second)),
        "accuracy": lambda first, second: float((first == second).mean()),
        "f1": f1,
    }
    return {name: compute[name](predictions, references) for name in GLUE_SCORES[task]}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays `(rows,)`; 0.0 if one is constant, NaN if a value is not finite."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    first, second = first - first.mean(dtype=np.float64), second - second.mean(dtype=np.float64)
    return float((first * second).sum() / np.sqrt(np.square(first).sum() * np.square(second).sum()))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of `(rows,)` values. Equal values share the mean of their ranks; NaN stays NaN."""
    if not np.isfinite(values).all():
        return values
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """The F1 of class 1, over all entries; 0.0 if the class neither occurs nor is predicted."""
    predicted, expected = predictions == 1, references == 1
    return float(2 * (predicted & expected).sum() / max(predicted.sum() + expected.sum(), 1))


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        logits: `(rows, classes)`.
        labels: Class indices, `(rows,)`.
        bins: Number of bins of equal width between confidence 0 and 1.

    Returns:
        Mean distance of accuracy and confidence over the bins, weighted by their numbers of rows.
    """
    logits = logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = exponentials.max(-1) / exponentials.sum(-1)
    right = logits.argmax(-1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
