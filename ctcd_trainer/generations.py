"""Generations: train a pair, freeze its teacher, let the next pair learn from it, and keep the best models.

Born-again networks (Furlanello et al. 2018, arXiv 1805.04770) for a pair. Where data repeat, a frozen teacher of the
same size has more to say than a smaller partner.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .arguments import greater_is_better as known_direction
from .checks import check_output_dir
from .graph import LEARNERS, STUDENT, TEACHER
from .saving.atomic_folders import clean_up, place_to_write, put_in_place, whole_file
from .trainer import CoDistillationTrainer
from .training.warm_start import FOLDER as WARM_START
from .training.warm_start import can_resume

logger = logging.get_logger(__name__)

#: File of a finished generation with its metrics, and file of all generations.
RESULT, RESULTS = "generation.json", "generations.json"
#: The parts of a generation's folder that are no part of its models.
_NOT_KEPT = (f"{PREFIX_CHECKPOINT_DIR}-*", "best-*", f"{WARM_START}*", "runs", "_partial", RESULT)


@dataclass(frozen=True)
class Generation:
    """A generation that is to be trained.

    Attributes:
        number: Its number, from 1.
        output_dir: Its folder, which must be the `output_dir` of its trainer.
        source: Folder of the best teacher of the earlier generations, for `pretrained_teacher`; `None` for the first.
    """

    number: int
    output_dir: str
    source: str | None = None


@dataclass
class Generations:
    """The trained generations.

    Attributes:
        metrics: The metrics of each generation on the held-out rows, the first generation first.
        best: Number of the generation with the best model, by name of the learner.
        folders: Folder with the best model, by name of the learner.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, int] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)


def train_generations(
    make_trainer: Callable[[Generation], CoDistillationTrainer],
    generations: int,
    output_dir: str | os.PathLike,
    metric: str = "loss",
    greater_is_better: bool | None = None,
) -> Generations:
    """Train several generations, each from the frozen best teacher of the earlier ones, and keep the best models.

    The models are evaluated on the trainer's `eval_dataset`. The best teacher is put into `output_dir/best`, and the
    best student, which may be of another generation, into `output_dir/best/student`. So if the first generation trains
    the teacher alone (`distillation_mode="standalone"`), the teacher that is kept is not worse on these rows.

    Call it again after a kill: finished generations are read from their folders (`output_dir/generation-1`, ...), and
    the one that was cut goes on at its last checkpoint.

    Args:
        make_trainer: Makes the trainer of a generation, with new models. From the second one on, give it
            `pretrained_teacher=generation.source` and a mode with edges from it, such as "community".
        generations: Number of generations.
        output_dir: Folder of all generations.
        metric: The metric that chooses, such as "loss" or "accuracy", for each learner by its own values.
        greater_is_better: Whether a larger value is a better one. By default known by the name.

    Raises:
        ValueError: There is no generation, no evaluation set, an unknown metric or direction, or the trainer of a
            generation has another output folder.

    Example:
        ```python
        def make_trainer(generation):
            mode = "standalone" if generation.source is None else "community"
            args = CoDistillationTrainingArguments(output_dir=generation.output_dir, distillation_mode=mode)
            return CoDistillationTrainer(
                model=new_teacher(), student_model=new_student(), pretrained_teacher=generation.source, args=args,
                train_dataset=train, eval_dataset=dev,
            )

        found = train_generations(make_trainer, 3, "out", metric="accuracy")
        ```
    """
    if generations < 1:
        raise ValueError(f"`generations={generations}` is not valid: give 1 or more.")
    better = known_direction(metric) if greater_is_better is None else greater_is_better
    if better is None:
        raise ValueError(
            f"`metric={metric!r}`, and it is not known whether a larger value of it is a better one: give "
            "`greater_is_better` (it is None)."
        )
    root, found, process = Path(output_dir), Generations(), PartialState()
    for number in range(1, generations + 1):
        folder = root / f"generation-{number}"
        result = folder / RESULT
        if result.exists():  # no process writes it before all have trained
            logger.warning(
                "Generation %d is finished and is not trained again, whatever its arguments are now. Remove %s to "
                "train it anew.",
                *(number, folder),
            )
        else:
            generation = Generation(number, str(folder), found.folders.get(TEACHER))
            metrics = _train(make_trainer, generation, generations)
            if process.is_main_process:
                with whole_file(result) as written:
                    written.write_text(json.dumps(metrics, indent=2))
            process.wait_for_everyone()
        found.metrics.append(json.loads(result.read_text()))
        wanted = metric_key(metric, TEACHER)
        if wanted not in found.metrics[-1]:
            raise ValueError(
                f"`metric={metric!r}`: the evaluation of generation {number} has no {wanted!r}, but "
                f"has {list(found.metrics[-1])}. Name one of these; the generation is not trained again."
            )
        for learner in LEARNERS:
            key = metric_key(metric, learner, found.metrics[-1])
            values = {n: own[key] for n, own in enumerate(found.metrics, 1) if not math.isnan(own.get(key, math.nan))}
            if values:
                found.best[learner] = (max if better else min)(values, key=values.get)
                found.folders[learner] = _place_in(root / f"generation-{found.best[learner]}", learner)
    if process.is_main_process:
        _keep(found, root / "best")
    process.wait_for_everyone()
    found.folders = {name: _place_in(root / "best", name) for name in found.folders}
    return found


def _place_in(folder: Path, learner: str) -> str:
    """Return the place of a learner in a folder of a pair."""
    return str(folder if learner == TEACHER else folder / learner)


def metric_key(metric: str, learner: str, metrics: Collection[str] = ()) -> str:
    """Return the key of a learner's metric, which may stand behind the name of an evaluation set."""
    name = metric.removeprefix("eval_").replace(f"{STUDENT}_", "", 1)
    if learner == TEACHER:
        return f"eval_{name}"
    of_sets = (key for key in metrics if f"_{learner}_" in key and key.replace(f"{learner}_", "", 1) == f"eval_{name}")
    return next(of_sets, f"eval_{learner}_{name}")


def _train(
    make_trainer: Callable[[Generation], CoDistillationTrainer], generation: Generation, generations: int
) -> dict[str, float]:
    """Train a generation, or the rest of it after a kill; save its models and return its metrics."""
    folder = generation.output_dir
    trainer = make_trainer(generation)
    check_output_dir(trainer.args.output_dir, folder, f"generation {generation.number}")
    if trainer.eval_dataset is None:
        raise ValueError(
            f"`eval_dataset` of generation {generation.number} is None, so that nothing can tell which generation is "
            "the best. Give the trainer held-out rows."
        )
    logger.info("Generation %d of %d learns from %s.", generation.number, generations, generation.source or "no other")
    trainer.train(resume_from_checkpoint=can_resume(folder))
    trainer.save_model(folder)
    return {key: value for key, value in trainer.evaluate().items() if isinstance(value, (int, float))}


def _keep(found: Generations, best: Path) -> None:
    """Put the best models and the table of all generations into a folder, which is replaced as a whole."""
    clean_up(best.parent)
    written = place_to_write(best)
    for learner, folder in found.folders.items():
        others = [name for name in LEARNERS if learner == TEACHER and name != learner]
        target = _place_in(written, learner)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*_NOT_KEPT, *others), dirs_exist_ok=True)
    folders = {name: _place_in(best, name) for name in found.folders}
    (written / RESULTS).write_text(json.dumps(asdict(replace(found, folders=folders)), indent=2))
    put_in_place(best)
