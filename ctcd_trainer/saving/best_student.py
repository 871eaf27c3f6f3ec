"""Keeping the best student, which may come from another step than the best teacher."""

import math
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..arguments import greater_is_better as known_direction
from ..graph import STUDENT

logger = logging.get_logger(__name__)


class BestStudent(TrainerCallback, ExportableState):
    """Remembers the best value of a metric of one learner and its step; checkpoints keep both.

    Args:
        metric: `student_metric_for_best_model`: the name of a metric, with or without `eval_` and `student_` before
            it. With several evaluation sets, the name as it is logged (`<set>_student_<name>`).
        greater_is_better: Whether a larger value is a better one; by default known by the name of the metric.
        learner: Name of the learner.
    """

    def __init__(self, metric: str, greater_is_better: bool | None = None, learner: str = STUDENT) -> None:
        self.metric, self.learner = metric, learner
        name = metric.removeprefix("eval_")
        self.key = f"eval_{name}" if f"{learner}_" in name else f"eval_{learner}_{name}"
        self.greater_is_better = bool(known_direction(metric) if greater_is_better is None else greater_is_better)
        self.value: float | None = None
        self.step: int | None = None

    @classmethod
    def among(cls, callbacks: Iterable[TrainerCallback]) -> "BestStudent | None":
        """Find the callback of this class; resuming may have replaced the object that was added."""
        return next((callback for callback in callbacks if isinstance(callback, cls)), None)

    @property
    def folder(self) -> str:
        """Name of the folder with the best model, in the output folder beside the checkpoints."""
        return f"best-{self.learner}"

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {
            "args": {"metric": self.metric, "greater_is_better": self.greater_is_better},
            "attributes": {"value": self.value, "step": self.step},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the best value so far from the checkpoint, or forget it if a new training begins."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        same_metric = saved.get("args") == self.state()["args"]
        best = saved["attributes"] if state.global_step and same_metric else {}
        folder = Path(args.output_dir, self.folder)
        if best.get("step") is not None and not folder.is_dir():
            logger.warning(
                "The best %s so far (%s = %s, step %s) is not in %s. The next evaluation will be kept as the best.",
                *(self.learner, self.metric, best["value"], best["step"], folder),
            )
            best = {}
        self.value, self.step = best.get("value"), best.get("step")

    def improved(self, metrics: Mapping[str, float], step: int) -> bool:
        """Compare a value with the best so far; remember it and return True if it is better.

        Raises:
            KeyError: The evaluation lacks the metric.
        """
        if self.key not in metrics:
            known = [key for key in metrics if f"{self.learner}_" in key]
            raise KeyError(
                f"`{self.learner}_metric_for_best_model={self.metric!r}`: the evaluation has no {self.key!r}, but has "
                f"{known}. Use one of these."
            )
        better = operator.gt if self.greater_is_better else operator.lt
        if math.isnan(metrics[self.key]) or (self.value is not None and not better(metrics[self.key], self.value)):
            return False
        self.value, self.step = float(metrics[self.key]), step
        return True
