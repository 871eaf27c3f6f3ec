"""The scores of a run from the logits of its models, for studies with large test sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ctcd_trainer.graph import STUDENT, TEACHER
from examples.data.metrics import GLUE_SCORES, glue_scores

#: The file of logits that `run_glue_ctcd.py --save_logits` writes, and the column of its rows that names the part.
LOGITS, PART = "predict_logits.npz", "part"


def load_rows(test_file: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the labels `(rows,)` and the name of the part `(rows,)` of the first rows of a test file (JSON lines).

    Args:
        test_file: The file.
        count: Number of rows that were predicted; `max_predict_samples` may have left out the others.
    """
    rows = Dataset.from_json(test_file).take(count)
    return np.array(rows["label"]), np.array(rows[PART])


def load_logits(folder: Path) -> dict[str, np.ndarray]:
    """Read the logits `(rows, outputs)` of each model of a run."""
    with np.load(folder / LOGITS) as file:
        return {name: file[name].astype(np.float64) for name in (TEACHER, STUDENT) if name in file}


def score_of(task: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """The main score of a task in percent: the mean of GLUE's scores, or the accuracy of a task that is not GLUE's.

    Args:
        task: Name of the task.
        logits: `(rows, outputs)`.
        labels: Class indices or numbers, `(rows,)`.
    """
    predictions = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
    if task not in GLUE_SCORES:
        return 100.0 * float((predictions == labels).mean())
    return 100.0 * float(np.mean(list(glue_scores(task, predictions, labels).values())))


def losses_of(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The negative log-likelihood of each row, or its squared error if there is one output, `(rows,)`."""
    if logits.shape[1] == 1:
        return np.square(logits[:, 0] - labels)
    return -log_softmax(logits / temperature, axis=-1)[np.arange(len(labels)), labels.astype(int)]


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least loss (Guo et al. 2017, arXiv 1706.04599); 1.0 for numbers."""
    if logits.shape[1] == 1:
        return 1.0
    loss = lambda log: losses_of(logits, labels, np.exp(log)).mean()  # noqa: E731
    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 4.0), method="bounded").x))


def scores_of(task: str, folder: Path, test_file: str, fitted_on: str) -> dict[str, Any]:
    """The scores of a run, by the part of the data and the model.

    Args:
        task: Name of the task.
        folder: The folder of the run.
        test_file: The file of its test rows.
        fitted_on: Name of the part on which the temperatures are fitted.

    Returns:
        For each model of each part: `score`, `nll` and `scaled_nll`, the loss after temperature scaling.
    """
    scores: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, logits in load_logits(folder).items():
        labels, parts = load_rows(test_file, len(logits))
        temperature = fitted_temperature(logits[parts == fitted_on], labels[parts == fitted_on])
        for part in dict.fromkeys(parts.tolist()):
            own, own_labels = logits[parts == part], labels[parts == part]
            scores.setdefault(part, {})[name] = {
                "score": score_of(task, own, own_labels),
                "nll": float(losses_of(own, own_labels).mean()),
                "scaled_nll": float(losses_of(own, own_labels, temperature).mean()),
            }
    return scores
