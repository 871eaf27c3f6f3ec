"""The metrics of the GLUE tasks as a local `evaluate.Metric`, with the keys of `evaluate.load("glue", task)`."""

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from examples.data.glue import Labels

_ACCURACY = ("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "sst2", "wnli")
_ACCURACY_AND_F1 = ("mrpc", "qqp")
#: The names that `GlueMetric` takes.
GLUE_METRICS = ("cola", "stsb", *_ACCURACY_AND_F1, *_ACCURACY)


class GlueMetric(evaluate.Metric):
    """The metric of one GLUE task (Wang et al. 2019, arXiv 1804.07461, table 1).

    - `cola`: `matthews_correlation`
    - `stsb`: `pearson` and `spearmanr`
    - `mrpc`, `qqp`: `accuracy` and `f1` (of class 1)
    - `mnli`, `mnli_matched`, `mnli_mismatched`, `qnli`, `rte`, `sst2`, `wnli`: `accuracy`

    What is undefined is 0.0: a correlation with constant predictions or references or with fewer than two examples,
    and the F1 of a class that neither occurs nor is predicted. A correlation with NaN or infinite values is NaN.

    Nothing is fetched, and in a single process nothing is written: several instances and processes can compute at the
    same time.

    Args:
        config_name: Name of the task.
        keep_in_memory: Whether predictions are kept in memory instead of in a cache file. Default: unless
            `num_process` is above 1, where `evaluate` needs files.
        num_process: As in `evaluate.Metric`; stays 1 with Trainer, which gathers the predictions itself.
        **kwargs: The other arguments of `evaluate.Metric`.

    Raises:
        KeyError: The task is unknown; the message has the valid names.

    Example:
        >>> GlueMetric("rte").compute(predictions=[0, 1], references=[0, 0])
        {'accuracy': 0.5}
    """

    def __init__(
        self, config_name: str, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs: Any
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in GLUE_METRICS:
            raise KeyError(f"Unknown GLUE task {self.config_name!r}. Valid names: {', '.join(sorted(GLUE_METRICS))}.")
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metric of a task of the GLUE benchmark.",
            citation="",
            inputs_description="predictions and references: class indices, or scores for stsb.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if self.config_name == "stsb":
            return {
                "pearson": _correlation(pearsonr, predictions, references),
                "spearmanr": _correlation(spearmanr, predictions, references),
            }
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        metrics = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in _ACCURACY_AND_F1:
            metrics["f1"] = float(f1_score(references, predictions, zero_division=0.0))
        return metrics


def _correlation(
    correlate: Callable[[np.ndarray, np.ndarray], Any], predictions: np.ndarray, references: np.ndarray
) -> float:
    """A correlation coefficient; 0.0 where it is undefined, NaN if a value is not finite."""
    if not (np.isfinite(predictions).all() and np.isfinite(references).all()):
        return float("nan")
    if len(predictions) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant and nearly constant input
        value = float(correlate(predictions, references).statistic)
    return value if np.isfinite(value) else 0.0


def metrics_for(labels: Labels, task: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """GLUE's own metrics for a task (with `combined_score`, their mean, if there are two).

    Without a task: the mean squared error of scores; the accuracy; for multiple labels, the share of rows in which all
    of them are right (`accuracy`) and the F1 over all labels of all rows (`f1_micro`).
    """
    glue = GlueMetric(task) if task is not None else None

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = labels.in_data_order(labels.predictions(prediction.predictions))
        references = labels.in_data_order(prediction.label_ids)
        if glue is not None:
            metrics = glue.compute(predictions=predicted, references=references)
            return metrics | ({"combined_score": float(np.mean(list(metrics.values())))} if len(metrics) > 1 else {})
        if labels.problem_type == "regression":
            return {"mse": float(np.square(predicted - references).mean())}
        if labels.problem_type == "single_label_classification":
            return {"accuracy": float((predicted == references).mean())}
        f1 = float(f1_score(references, predicted, average="micro", zero_division=0.0))
        return {"accuracy": float((predicted == references).all(axis=1).mean()), "f1_micro": f1}

    return compute_metrics
