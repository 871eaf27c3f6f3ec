"""The recipes: training arguments that go together, with the reason for each.

A recipe sets only what the user has left at its default. What a recipe does is all in `RECIPES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A training argument that a recipe sets.

    Attributes:
        name: Name of the argument.
        value: Its value, or a function that returns it, given the arguments as they are so far. `None` leaves the
            argument as it is.
        reason: Why, for the log: a clause without a full stop.
        left_out: The log's remark if the value is `None`, a sentence; empty for none.
    """

    name: str
    value: Any
    reason: str
    left_out: str = ""

    def value_for(self, args: Any) -> Any:
        """Return the value for these arguments."""
        return self.value(args) if callable(self.value) else self.value


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        summary: Its effect, for the help text of the argument `recipe`.
        settings: The settings in the order in which they are made.
        one_rate: Whether all models get `learning_rate`, also a student whose rate would follow from its layers.
    """

    summary: str
    settings: tuple[Setting, ...]
    one_rate: bool = False


def _epochs(args: Any) -> float | None:
    """As many epochs as the training of both, if that is counted in epochs."""
    steps = getattr(args, "max_steps", 0) > 0 or args.warm_start_steps > 0
    return None if steps else getattr(args, "num_train_epochs", None)


def _steps(args: Any) -> int | None:
    """As many steps as the training of both, if that is counted in steps and no number of epochs is given."""
    steps, given = getattr(args, "max_steps", 0), type(args.warm_start_epochs) in (int, float)  # no filled-in 0
    return steps if steps > 0 and not given else None


def _evaluations(args: Any) -> str | None:
    """When to evaluate, if there are data for it (`do_eval`): as often as is saved, if the best model is wanted."""
    if not getattr(args, "do_eval", False):
        return None
    if not args.load_best_model_at_end:
        return "epoch"
    return args.save_strategy if args.save_strategy in ("steps", "epoch") else None


def _listening(args: Any) -> str | None:
    """How much the teacher learns from the student, where both are trained and something is evaluated."""
    both = args.distillation_mode in ("ctcd", "community") and args.teacher_hard_weight and not args.edges
    return "auto" if both and getattr(args, "eval_strategy", "no") != "no" else None


_START = "the student is made from a teacher that knows the task; the teacher is trained alone as long as both are"

RECIPES: Mapping[str, Recipe] = {
    "best": Recipe(
        "trains the teacher, makes the student from it, and trains both",
        (
            Setting("warm_start_epochs", _epochs, _START),
            Setting("warm_start_steps", _steps, _START),
            Setting("eval_strategy", _evaluations, "both models are watched on held-out data"),
            Setting(
                "teacher_from_student_weight",
                _listening,
                "the teacher learns from the student as far as the student is worth it on held-out data",
                "`teacher_from_student_weight` is left to you: `auto` needs a training of both models with "
                "evaluations. Set `eval_strategy` and pass an `eval_dataset`.",
            ),
        ),
    ),
    "paper": Recipe(
        "CTCD with weights of 1 and one learning rate, without a warm start (arXiv 2311.02849)",
        (
            Setting(
                "distillation_mode", "ctcd", "both models learn from the labels and from each other, all weights 1"
            ),
            Setting("warm_start_epochs", 0.0, "both models are trained from the first step on"),
        ),
        one_rate=True,
    ),
}
