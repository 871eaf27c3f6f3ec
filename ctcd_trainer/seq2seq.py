"""The same for `Seq2SeqTrainer`: evaluation by generated texts (`predict_with_generate`), for both models."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .graph import TEACHER
from .modeling import LearnerView
from .trainer import CoDistillationTrainer
from .training_args import DistillationArguments


@dataclass
class CoDistillationSeq2SeqTrainingArguments(DistillationArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the arguments of co-distillation; see `CoDistillationTrainingArguments`."""


class CoDistillationSeq2SeqTrainer(CoDistillationTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for a teacher and a student that are trained together.

    With `predict_with_generate` both models generate, and `compute_metrics` is called once per model with what it has
    generated. `eval_agreement` is that of teacher forcing: texts of two models are rarely equal as a whole. An
    `args.generation_config` holds for both.

    Args:
        *args: As in `CoDistillationTrainer`.
        **kwargs: As in `CoDistillationTrainer`, without `optimizer_cls_and_kwargs`, which `Seq2SeqTrainer` lacks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pair is not None and self.args.generation_config is not None:
            # Seq2SeqTrainer has set the teacher's before the pair was made.
            for name, learner in self.pair.learners.items():
                if name != TEACHER:
                    learner.generation_config = self.load_generation_config(self.args.generation_config)

    def _prediction_step_of(
        self, view: LearnerView, *args: Any, **gen_kwargs: Any
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Seq2SeqTrainer's prediction step for one learner: it generates with `self.model`."""
        pair, self.model = self.model, self.pair.learners[view.learner]
        try:
            return super()._prediction_step_of(view, *args, **gen_kwargs)
        finally:
            self.model = pair
