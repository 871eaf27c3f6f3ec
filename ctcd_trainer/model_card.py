"""Model cards: Trainer's own summary of a training, once for each of the two models."""

import os
from typing import TYPE_CHECKING, Any

from transformers.modelcard import TrainingSummary

from .tasks import base_model
from .training_args import learner_arguments

if TYPE_CHECKING:
    from .trainer import CoDistillationTrainer

_PLACEHOLDER = "## Model description\n\nMore information needed\n"
_DESCRIPTION = """## Model description

The {learner} of a pair that was trained together by co-training and co-distillation
([arXiv 2311.02849](https://arxiv.org/abs/2311.02849), mode `{mode}`): {parameters:.1f} M parameters, beside a
{partner} of {partner_parameters:.1f} M.
"""


class _OneOfThePair:
    """What `TrainingSummary` reads of a trainer, as if it had trained this learner alone."""

    def __init__(self, trainer: "CoDistillationTrainer", learner: str) -> None:
        self._trainer = trainer
        self.model = base_model(trainer.pair.learners[learner])
        self.args = learner_arguments(trainer.args, learner)
        self.state = _State([_logs_of(learner, trainer, logs) for logs in trainer.state.log_history])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class _State:
    def __init__(self, log_history: list[dict[str, float]]) -> None:
        self.log_history = log_history


def _logs_of(learner: str, trainer: "CoDistillationTrainer", logs: dict[str, float]) -> dict[str, float]:
    """The evaluation logs of one learner under the names that a Trainer of it alone would have given them."""
    others = [name for name in trainer.pair.learners if name != trainer.pair.primary]
    own = {}
    for key, value in logs.items():
        prefixes = [name for name in others if key.startswith(f"eval_{name}_")]
        if prefixes == [learner]:
            own[key.replace(f"eval_{learner}_", "eval_", 1)] = value
        elif not prefixes and (
            learner == trainer.pair.primary or not key.startswith("eval_") or key == "eval_agreement"
        ):
            own[key] = value
    return own


def write_model_cards(trainer: "CoDistillationTrainer", model_name: str | None = None, **kwargs: Any) -> None:
    """Write `README.md` for the teacher in the output folder and for the student in `student/`.

    Args:
        trainer: A trainer with a pair.
        model_name: Name of the teacher; the student's is `<model_name>-student`.
        **kwargs: The other arguments of `Trainer.create_model_card`, for both cards.
    """
    pair = trainer.pair
    model_name = model_name or os.path.basename(os.path.abspath(trainer.args.output_dir))
    millions = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in pair.learners.items()}
    for learner in pair.learners:
        partner = next(name for name in pair.learners if name != learner)
        own_name = model_name if learner == pair.primary else f"{model_name}-{learner}"
        summary = TrainingSummary.from_trainer(_OneOfThePair(trainer, learner), model_name=own_name, **kwargs)
        card = summary.to_model_card().replace(
            _PLACEHOLDER,
            _DESCRIPTION.format(
                learner=learner,
                mode=trainer.distillation.distillation_mode,
                parameters=millions[learner],
                partner=partner,
                partner_parameters=millions[partner],
            ),
        )
        folder = pair.folder_of(learner, trainer.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)
