"""The advice of a diagnosis: two tables of rules."""

import math
from collections.abc import Callable
from typing import Any

from ..cards.results import format_number
from ..graph import STUDENT, TEACHER

_Rule = tuple[Callable[[Any], bool], str]
#: Recipes: the first rule that holds gives the sentence. `{t}` are the scores of the teacher, `{s}` of the student.
RECIPES: tuple[_Rule, ...] = (
    (
        lambda d: d.skill(TEACHER) < 0.05,
        "The teacher knows hardly more than the frequencies of the labels ({skills}): train it before it teaches.",
    ),
    (
        lambda d: d.skill(STUDENT) < 0.05,
        "The student knows hardly more than the frequencies of the labels ({skills}): cut it from the teacher after "
        "that is trained for the task (`create_student`), or train it first, and let the teacher not learn from it.",
    ),
    (
        lambda d: d.skill(STUDENT) < 0.7 * d.skill(TEACHER),
        "The student is far behind the teacher (beside the frequencies of the labels, {skills}): give it a better "
        "start, cut from the trained teacher or aligned with its hidden states on unlabelled rows, and a higher "
        "`student_learning_rate`.",
    ),
    (
        lambda d: (d.models[STUDENT].scaled_loss or math.inf) < 0.8 * d.models[STUDENT].loss,
        "The student is sure of itself where it is wrong, which hides what it knows (NLL {s.loss:.4f}, and "
        "{s.scaled_loss:.4f} with its logits divided by {s.temperature:.2f}): train it for fewer steps, or together "
        "with the teacher from the start, and diagnose again.",
    ),
    (
        lambda d: d.memorised,
        "The teacher has memorised its training rows, where its targets are the labels again ({memory}): let the "
        "student learn from it on unlabelled rows, or from targets of teachers that have not seen the rows "
        "(`cross_fit`).",
    ),
    (
        lambda d: d.mixture.gain.low <= 0,
        "No mixture of both is surely better than the better model ({d.loss_name} {d.mixture.gain}), so the student "
        "has nothing to teach but smoothing: choose `distillation_mode='kd'`, or CTCD with a low weight for the "
        "teacher.",
    ),
    (
        lambda d: True,
        "Each model knows what the other does not (their mixture is better by {d.loss_name} {d.mixture.gain}): train "
        "both together, `distillation_mode='ctcd'`.",
    ),
)
#: Weights: the same.
WEIGHTS: tuple[_Rule, ...] = (
    (
        lambda d: d.skill(TEACHER) < 0.05,
        "Set `student_from_teacher_weight=0.0` and `teacher_from_student_weight=0.0` until then.",
    ),
    (
        lambda d: d.edges["teacher_from_student"].trusted_weight < 0.05,
        "Set `student_from_teacher_weight={to_student:.2f}` and `teacher_from_student_weight=0.0`: by its held-out "
        "errors the student's opinion would pull the teacher away from the truth.",
    ),
    (
        lambda d: (
            d.models[TEACHER].scaled_loss is not None
            and d.models[TEACHER].scaled_loss <= min(d.mixture.losses) < d.models[TEACHER].loss
        ),
        "Set `student_from_teacher_weight={to_student:.2f}` and `teacher_from_student_weight={to_teacher:.2f}`, but "
        "expect no more for the teacher than dividing its logits by {t.temperature:.2f} gives (NLL {t.loss:.4f} to "
        "{t.scaled_loss:.4f}).",
    ),
    (
        lambda d: d.mixture.gain.low <= 0,
        "Set `student_from_teacher_weight={to_student:.2f}` and `teacher_from_student_weight=0.0`: nothing shows that "
        "the teacher would learn more than smoothing.",
    ),
    (
        lambda d: True,
        "Set `student_from_teacher_weight={to_student:.2f}` and `teacher_from_student_weight={to_teacher:.2f}`, the "
        "weights that their held-out errors deserve beside hard losses of weight 1.",
    ),
)


def advice_of(found: Any) -> list[str]:
    """Return two sentences for a `Diagnosis`: which recipe, and which weights."""
    rules = (next(text for holds, text in table if holds(found)) for table in (RECIPES, WEIGHTS))
    return [text.format(d=found, t=found.models[TEACHER], s=found.models[STUDENT], **_named(found)) for text in rules]


def _named(found: Any) -> dict[str, Any]:
    """The numbers that the sentences name."""
    teacher = found.models[TEACHER]
    memory = f"{found.loss_name} {format_number(teacher.training_loss)} there, {format_number(teacher.loss)} on others"
    if teacher.training_label_share is not None:
        memory = f"probability of the label {teacher.training_label_share:.3f}, on others {teacher.label_share:.3f}"
    return {
        "skills": f"the teacher takes away {max(found.skill(TEACHER), 0):.0%} of their {found.loss_name}, and the "
        f"student {max(found.skill(STUDENT), 0):.0%}",
        "memory": memory,
        "to_student": found.edges["student_from_teacher"].trusted_weight,
        "to_teacher": found.edges["teacher_from_student"].trusted_weight if found.mixture.gain.low > 0 else 0.0,
    }
