"""The trainer for sequence-to-sequence models: evaluation by generated texts (`predict_with_generate`)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .arguments import DistillationArguments
from .pair.learner_view import LearnerView
from .trainer import CoDistillationTrainer


@dataclass
class CoDistillationSeq2SeqTrainingArguments(DistillationArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the arguments of co-distillation; see `CoDistillationTrainingArguments`."""


class CoDistillationSeq2SeqTrainer(CoDistillationTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for a teacher and a student that are trained together.

    With `predict_with_generate` both models generate, and `compute_metrics` is called once per model with its
    generated texts. `eval_agreement` is measured with teacher forcing, since two models rarely generate equal texts.
    An `args.generation_config` holds for both.

    It takes the arguments of `CoDistillationTrainer` except `optimizer_cls_and_kwargs`, which `Seq2SeqTrainer` lacks.
    """

    def _install_pair(self, learners: dict[str, nn.Module]) -> None:
        """Give all learners the generation config of the arguments."""
        super()._install_pair(learners)
        if self.args.generation_config is not None:
            for learner in learners.values():
                learner.generation_config = self.load_generation_config(self.args.generation_config)

    def _prediction_step_of(
        self, view: LearnerView, inputs: dict[str, Tensor | Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Give `generate` the inputs of the learner alone."""
        return super()._prediction_step_of(view, self.pair.named_inputs(self.model, inputs), *args, **kwargs)
