"""Model cards: Trainer's own summary of a training, once for each of the two models."""

import copy
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

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
    """What Trainer's `create_model_card` reads of a trainer, as if it had trained this learner alone."""

    def __init__(self, trainer: "CoDistillationTrainer", learner: str) -> None:
        self._trainer = trainer
        self.model = trainer.pair.learners[learner]
        self.args = copy.copy(learner_arguments(trainer.args, learner))
        self.args.output_dir = trainer.pair.folder_of(learner, trainer.args.output_dir)
        self.state = copy.copy(trainer.state)
        others = [name for name in trainer.pair.learners if name != trainer.pair.primary]
        self.state.log_history = [_logs_of(learner, others, logs) for logs in trainer.state.log_history]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _logs_of(learner: str, others: list[str], logs: dict[str, float]) -> dict[str, float]:
    """The evaluation logs of one learner under the names that a Trainer of it alone would have given them."""
    own = {}
    for key, value in logs.items():
        match = re.fullmatch(rf"(eval_(?:.+_)?)({'|'.join(others)})_(.+)", key)
        if match is not None and match[2] == learner:
            own[f"{match[1]}{match[3]}"] = value
        elif match is None and (learner not in others or not key.startswith("eval_") or key.endswith("agreement")):
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
        one = _OneOfThePair(trainer, learner)
        os.makedirs(one.args.output_dir, exist_ok=True)
        Trainer.create_model_card(one, model_name=own_name, **copy.deepcopy(kwargs))
        path = Path(one.args.output_dir, "README.md")
        description = _DESCRIPTION.format(
            learner=learner,
            mode=trainer.distillation.distillation_mode,
            parameters=millions[learner],
            partner=partner,
            partner_parameters=millions[partner],
        )
        path.write_text(path.read_text(encoding="utf-8").replace(_PLACEHOLDER, description), encoding="utf-8")
