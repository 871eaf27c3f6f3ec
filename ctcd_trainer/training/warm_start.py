"""The warm start: the teacher is trained alone, and the student is made from it afterwards.

Its checkpoints are in a folder of their own. As soon as it is complete, the trained teacher is in `teacher` there.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..graph import TEACHER

logger = logging.get_logger(__name__)

#: The folder in the output folder.
FOLDER = "warm-start"
_COSTS = "train_results.json"
#: Metrics that only a pair has, by the end of their names; the loss of the teacher takes their place.
_OF_PAIRS = re.compile(r"(agreement|perplexity)$")


@dataclass(frozen=True)
class WarmStart:
    """The folder and the arguments of a warm start.

    Args:
        args: The training arguments of the co-training.
    """

    args: TrainingArguments

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.args.output_dir, FOLDER)

    @property
    def teacher(self) -> Path:
        """The folder of the trained teacher; it exists if the warm start is complete."""
        return self.folder / TEACHER

    @property
    def length(self) -> str:
        """The length in words."""
        steps = self.args.warm_start_steps
        return f"{steps} steps" if steps else f"{self.args.warm_start_epochs:g} epochs"

    @property
    def arguments(self) -> TrainingArguments:
        """The arguments as a Trainer of the teacher alone would get them; nothing is pushed.

        A metric of the student by which checkpoints are chosen becomes the teacher's metric of that name.
        """
        args, own = copy.copy(self.args), self.args
        args.output_dir = str(self.folder)
        args.max_steps = own.warm_start_steps or -1
        args.num_train_epochs = own.warm_start_epochs
        if own.warm_start_learning_rate is not None:
            args.learning_rate = own.warm_start_learning_rate
        args.push_to_hub, args.hub_token = False, None
        if own.metric_for_best_model is not None:
            args.metric_for_best_model = own.metric_for_best_model.replace("student_", "")
            if _OF_PAIRS.search(args.metric_for_best_model):
                args.metric_for_best_model = _OF_PAIRS.sub("loss", args.metric_for_best_model)
                args.greater_is_better = False
        return args

    def point(self, resume: Any) -> tuple[str | None, str | None]:
        """Find out where a training goes on.

        Args:
            resume: `resume_from_checkpoint`, as `Trainer.train` takes it.

        Returns:
            The checkpoint of the pair, and the checkpoint of the warm start. The latter is the trained teacher if the
            warm start is complete. None of both if the training begins.

        Raises:
            ValueError: `resume` is True, and there is no checkpoint, or it is not known which one is meant.
        """
        output_dir = self.args.output_dir
        if not resume:
            return None, None
        if resume is not True:
            path = Path(resume)
            if path.name == FOLDER and (path / TEACHER).is_dir():
                path /= TEACHER
            return (None, str(path)) if path.parent.name == FOLDER else (str(resume), None)
        pairs, own = (get_last_checkpoint(str(f)) if Path(f).is_dir() else None for f in (output_dir, self.folder))
        if self.teacher.is_dir():
            # An older checkpoint is of a training before this warm start.
            later = pairs is not None and os.path.getmtime(pairs) >= os.path.getmtime(self.teacher)
            return (pairs, None) if later else (None, str(self.teacher))
        if pairs is not None and self.folder.is_dir():
            raise ValueError(
                f"`resume_from_checkpoint=True` may mean {pairs!r} or the warm start in {str(self.folder)!r}, which "
                "is not complete: they are of two trainings. Give the path of one of them, or move the other away."
            )
        if pairs is None and own is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`: there is no checkpoint in {output_dir!r} or {str(self.folder)!r}. "
                "Leave it out to start."
            )
        return pairs, own

    def set_aside(self, anew: bool) -> None:
        """Move the folder of an earlier warm start away, and make a new one (`anew`). One process may call it."""
        if self.folder.is_dir():
            old = self.folder.with_name(f"{FOLDER}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
            logger.warning(
                "%s holds an earlier warm start, which this training does not use. It was moved to %s. To go on with "
                "it, move it back and give `resume_from_checkpoint=True`.",
                *(self.folder, old),
            )
        if anew:
            self.folder.mkdir(parents=True)


def can_resume(output_dir: str | os.PathLike) -> bool:
    """Tell whether a training has left anything in its output folder from which it can go on."""
    folders = [Path(output_dir), Path(output_dir, FOLDER)]
    return Path(folders[1], TEACHER).is_dir() or any(f.is_dir() and get_last_checkpoint(str(f)) for f in folders)


def is_complete(checkpoint: str) -> bool:
    """Tell whether a checkpoint of a warm start is that of its end."""
    return Path(checkpoint).name == TEACHER


def costs_of(output: TrainOutput, state: TrainerState) -> dict[str, float]:
    """The costs of a warm start, from Trainer's output and state, as metrics of the whole training."""
    return {
        "warm_start_runtime": output.metrics["train_runtime"],
        "warm_start_steps": state.global_step,
        "warm_start_flos": state.total_flos,
    }


def save_costs(folder: Path, costs: Mapping[str, float]) -> None:
    """Write the costs beside the trained teacher."""
    (folder / _COSTS).write_text(json.dumps(costs, indent=4), encoding="utf-8")


def read_costs(folder: str | os.PathLike) -> dict[str, float]:
    """Read the costs that `save_costs` has written; none if the folder is gone."""
    file = Path(folder, _COSTS)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
