"""Training arguments of co-distillation: the weights of the graph, the soft loss and the per-model optimisation."""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from .graph import EDGES, MODES, STUDENT, TEACHER, Edge, Graph
from .pair.shared_layers import parse_share
from .soft_losses import SOFT_LOSSES


class ModeDefault(float):
    """A weight that the mode filled in: it follows the mode when that is changed (`dataclasses.replace`, a search)."""


@dataclass
class DistillationArguments:
    """The arguments of co-distillation alone, to be mixed into any `TrainingArguments` class.

    Names of directions say who learns from whom: `student_from_teacher_weight` weighs the loss that trains the student
    on the teacher's predictions.

    Raises:
        ValueError: An unknown mode or soft loss, a weight that is negative or not finite, a temperature that is not
            above 0, a warm-up ratio outside of 0 to 1, a weight on an edge into a model that the mode freezes, no
            weight above 0 at all, parts to share with a model that the mode freezes, or a cache of a frozen teacher
            that nothing learns from.
    """

    distillation_mode: Literal["ctcd", "community", "kd", "reversed", "standalone"] = field(
        default="ctcd",
        metadata={
            "help": "Who learns from whom. `ctcd`: teacher and student from each other. `kd`: the student from the "
            "frozen teacher. `reversed`: the teacher from the frozen student. `community`: both from each other and "
            "from a frozen pre-trained teacher. `standalone`: nobody. Sets the soft weights that are not given."
        },
    )
    teacher_hard_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's own task loss."})
    student_hard_weight: float = field(default=1.0, metadata={"help": "Weight of the student's own task loss."})
    student_from_teacher_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the loss that trains the student on the teacher. Default: set by the mode."},
    )
    teacher_from_student_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the loss that trains the teacher on the student. Default: set by the mode."},
    )
    student_from_pretrained_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss that trains the student on the frozen pre-trained teacher. Default: set by "
            "the mode."
        },
    )
    teacher_from_pretrained_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss that trains the teacher on the frozen pre-trained teacher. Default: set by "
            "the mode."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of the soft losses; they are multiplied by its square to keep their scale."},
    )
    soft_loss: Literal["kl", "reverse_kl", "js", "mse"] = field(
        default="kl",
        metadata={
            "help": "How predictions are compared. `kl`: KL(source || learner). `reverse_kl`: KL(learner || source). "
            "`js`: Jensen-Shannon divergence. `mse`: mean squared difference of the logits (no temperature)."
        },
    )
    soft_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps over which the soft weights rise linearly from 0."}
    )
    student_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the student. Default: `learning_rate`."}
    )
    student_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the student. Default: `weight_decay`."}
    )
    student_max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Norm to which the student's gradients are clipped, 0 for none. Default: `max_grad_norm`."},
    )
    share: str | None = field(
        default=None,
        metadata={
            "help": "What the student has in common with the teacher, whose weights it takes: `embeddings`, "
            "`layers:K` for these and the K lowest layers, or `prefix` for these and all layers of the student. "
            "Default: nothing."
        },
    )
    fused_lm_head: bool = field(
        default=True,
        metadata={
            "help": "Whether language models compute all losses in one chunked pass over the scored positions, "
            "without the logits of all positions. Where the models do not allow it, whole logits are used anyway."
        },
    )
    pretrained_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the predictions of the frozen pre-trained teacher are kept, so that later epochs "
            "and later trainings do not run it. Default: it is run on every batch."
        },
    )
    student_metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric of the student, such as `loss` or `accuracy`: the student that is best by it is kept in "
            "`best-student/`, beside the checkpoints. Default: none is kept."
        },
    )
    student_greater_is_better: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a larger `student_metric_for_best_model` is a better one. Default: unless its name ends "
            "with `loss`."
        },
    )
    student_hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Repository of the student alone on the Hub. Default: `<hub_model_id>-student`."},
    )

    def __post_init__(self) -> None:
        self.check()
        parent = super()
        if hasattr(parent, "__post_init__"):  # the `TrainingArguments` that this class is mixed into
            parent.__post_init__()

    def check(self) -> None:
        """Fill in the weights that the mode sets, and check all arguments of co-distillation.

        Raises:
            ValueError: See the class.
        """
        self._check_choice("distillation_mode", MODES)
        self._check_choice("soft_loss", SOFT_LOSSES)
        mode = MODES[self.distillation_mode]
        for edge in EDGES:
            setattr(self, edge.weight_name, self._weight(edge))
        for name in (f"{TEACHER}_hard_weight", f"{STUDENT}_hard_weight", *(edge.weight_name for edge in EDGES)):
            self._check_number(name)
        self._check_number("temperature", zero=False)
        self._check_number("soft_warmup_ratio", maximum=1.0)
        if self.share is not None:
            parse_share(self.share)
            if self.graph.frozen:
                raise ValueError(
                    f"`share={self.share!r}` is for two models that are trained, and `distillation_mode="
                    f"'{self.distillation_mode}'` with its weights freezes the {self.graph.frozen[0]}. Choose another "
                    "mode, or leave it out."
                )
        for name in ("student_learning_rate", "student_weight_decay", "student_max_grad_norm"):
            if getattr(self, name) is not None:
                self._check_number(name)
        own = [(f"{name}_hard_weight", name, 1.0) for name in (TEACHER, STUDENT)]
        for name, learner, default in [*own, *((edge.weight_name, edge.learner, 0.0) for edge in EDGES)]:
            if getattr(self, name) not in (default, 0.0) and learner not in mode.trained:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` has no effect: `distillation_mode='{self.distillation_mode}'` "
                    f"freezes the {learner}. Leave the weight out or choose a mode that trains the {learner}."
                )
        if not self.graph.trained:
            raise ValueError(
                f"Nothing would be trained: all weights of the models that `distillation_mode="
                f"'{self.distillation_mode}'` trains ({', '.join(mode.trained)}) are 0. Set at least one hard or soft "
                "weight above 0."
            )
        if self.pretrained_cache_dir is not None and not self.graph.uses_pretrained:
            raise ValueError(
                f"`pretrained_cache_dir={self.pretrained_cache_dir!r}` has no effect: with `distillation_mode="
                f"'{self.distillation_mode}'` and its weights nothing learns from a frozen pre-trained teacher. Leave "
                "it out, or set `distillation_mode='community'` or one of the weights `..._from_pretrained_weight`."
            )
        if self.student_greater_is_better is not None and self.student_metric_for_best_model is None:
            raise ValueError(
                f"`student_greater_is_better={self.student_greater_is_better}` has no effect without "
                "`student_metric_for_best_model` (None). Set both, or leave it out."
            )

    def _weight(self, edge: Edge) -> float:
        """Weight of an edge: the one that was given, or the one of the mode."""
        weight = getattr(self, edge.weight_name)
        if weight is None or isinstance(weight, ModeDefault):
            return ModeDefault(MODES[self.distillation_mode].default_weight(edge.source, edge.learner))
        return weight

    def _check_choice(self, name: str, valid: Collection[str]) -> None:
        if getattr(self, name) not in valid:
            raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown. Valid values: {', '.join(sorted(valid))}.")

    def _check_number(self, name: str, maximum: float = math.inf, zero: bool = True) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        finite = number and math.isfinite(value)
        if not (finite and 0 <= value <= maximum and (zero or value > 0)):
            limits = f"from 0 to {maximum}" if maximum < math.inf else "of 0 or more" if zero else "above 0"
            raise ValueError(f"`{name}={value!r}` is not valid: it must be a finite number {limits}.")

    @property
    def graph(self) -> Graph:
        """The learners, their hard weights and the edges between them that these arguments describe."""
        mode = MODES[self.distillation_mode]
        hard_weights = {
            name: getattr(self, f"{name}_hard_weight") if name in mode.trained else 0.0 for name in (TEACHER, STUDENT)
        }
        edges = (Edge(edge.source, edge.learner, float(self._weight(edge))) for edge in EDGES)
        return Graph(hard_weights, tuple(edge for edge in edges if edge.weight > 0))

    def soft_weight_factor(self, step: int, max_steps: int) -> float:
        """Factor of the soft weights during warm-up.

        Args:
            step: Number of optimizer steps that are complete.
            max_steps: Number of optimizer steps of the whole training.

        Returns:
            `step` over the number of warm-up steps, at most 1.0; 1.0 without warm-up.
        """
        warmup_steps = math.ceil(self.soft_warmup_ratio * max_steps)
        return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def learner_arguments(args: TrainingArguments, learner: str) -> TrainingArguments:
    """The arguments as a Trainer of one learner alone would see them.

    Args:
        args: The arguments of the co-training; they are not changed.
        learner: Name of the learner.

    Returns:
        `args` itself, or a shallow copy in which every argument `<name>` is replaced by `<learner>_<name>` where that
        is set (`student_learning_rate`, `student_weight_decay`, `student_max_grad_norm`).
    """
    names = ("learning_rate", "weight_decay", "max_grad_norm")
    own = {name: getattr(args, f"{learner}_{name}", None) for name in names}
    own = {name: value for name, value in own.items() if value is not None}
    if not own:
        return args
    view = copy.copy(args)
    for name, value in own.items():
        setattr(view, name, value)
    return view


@dataclass
class CoDistillationTrainingArguments(DistillationArguments, TrainingArguments):
    """`TrainingArguments` with the arguments of co-distillation.

    All arguments of `transformers.TrainingArguments` keep their meaning and hold for both models; the ones of
    [`DistillationArguments`] are added. Works with `HfArgumentParser`.

    Example:
        ```python
        args = CoDistillationTrainingArguments(output_dir="out", distillation_mode="ctcd", temperature=2.0)
        ```
    """
