"""The student's own best step, which need not be the teacher's."""

import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..graph import STUDENT

logger = logging.get_logger(__name__)

#: Folder in the output folder, beside the checkpoints.
BEST_STUDENT = "best-student"


class BestStudent(TrainerCallback, ExportableState):
    """Remembers the best value of a metric of the student, also in checkpoints.

    Args:
        metric: `student_metric_for_best_model`: a metric's name, with or without `student_` and `eval_` before it;
            with several evaluation sets, as it is logged (`<set>_student_<name>`).
        greater_is_better: Whether a larger value is a better one; by default, unless the name ends with "loss".
    """

    def __init__(self, metric: str, greater_is_better: bool | None = None) -> None:
        self.metric = metric
        name = metric.removeprefix("eval_")
        self.key = f"eval_{name}" if f"{STUDENT}_" in name else f"eval_{STUDENT}_{name}"
        if greater_is_better is None:
            greater_is_better = not metric.endswith("loss")
        self.greater_is_better = greater_is_better
        self.value: float | None = None
        self.step: int | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"metric": self.metric, "greater_is_better": self.greater_is_better},
            "attributes": {"value": self.value, "step": self.step},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from what the checkpoint has, or anew."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        same = saved.get("args") == self.state()["args"]  # values of another metric say nothing
        found = saved["attributes"] if state.global_step and same else {}
        if found.get("step") is not None and not Path(args.output_dir, BEST_STUDENT).is_dir():
            logger.warning(
                "The best student so far (%s = %s, step %s) is not in %s; the next one is kept as the best.",
                *(self.metric, found["value"], found["step"], Path(args.output_dir, BEST_STUDENT)),
            )
            found = {}
        self.value, self.step = found.get("value"), found.get("step")

    def improved(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether the student is better than ever before; remembers it.

        Raises:
            KeyError: The evaluation has no such metric; names the ones that there are.
        """
        if self.key not in metrics:
            found = [key for key in metrics if f"{STUDENT}_" in key]
            raise KeyError(
                f"`student_metric_for_best_model={self.metric!r}`: the evaluation has no {self.key!r}. The metrics of "
                f"the student are {found}."
            )
        better = operator.gt if self.greater_is_better else operator.lt
        if math.isnan(metrics[self.key]) or (self.value is not None and not better(metrics[self.key], self.value)):
            return False
        self.value, self.step = float(metrics[self.key]), step
        return True
