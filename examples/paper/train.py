"""The training of one cell: its models, its arguments, its scores."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments, create_student
from ctcd_trainer.graph import STUDENT, TEACHER
from ctcd_trainer.saving.atomic_folders import place_to_write, put_in_place
from ctcd_trainer.students.costs import cpu_name
from examples.data.metrics import calibration_error, glue_scores

from .cells import METHODS, MLM, Cell
from .data import PARTS, Masking, Prepared, Schedule, collate
from .settings import Scale

#: Folders of a cell: its finished models, and the checkpoints of its training.
MODELS, RUN = "models", "run"


class Stopwatch(TrainerCallback, ExportableState):
    """Adds up the time of the steps, without evaluations and saves; checkpoints keep the sum."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start a step."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """End a step; on a GPU, wait until its work is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start


# ---- Models ----


class Models:
    """The models with which a cell starts.

    Args:
        cell: The cell.
        prepared: The initial models and the labels.
        folders: Folder of each finished cell.
    """

    def __init__(self, cell: Cell, prepared: Prepared, folders: Mapping[Cell, Path]) -> None:
        self.cell, self.folders, self.folder = cell, folders, prepared.folder / "models"
        self.labels = prepared.label_settings(cell.task)
        self.auto_model = AutoModelForMaskedLM if cell.task == MLM else AutoModelForSequenceClassification

    def learners(self) -> dict[str, PreTrainedModel]:
        """The models of the pair by name, or the one model that is trained by itself."""
        if self.cell.learner is not None:
            return {self.cell.learner: self._finished(self.cell.start, self.cell.learner)}
        frozen = METHODS[self.cell.method].frozen
        learners = {}
        for name in (TEACHER, STUDENT):
            if name in frozen:
                learners[name] = self._finished(self.cell.alone, name)
            elif self.cell.start is not None:
                learners[name] = self._finished(self.cell.start, name)
            else:
                learners[name] = self._initial(name)
        return learners

    def pretrained_teacher(self) -> PreTrainedModel | None:
        """The frozen teacher outside of the pair."""
        if self.cell.pretrained_teacher is None:
            return None
        if self.cell.pretrained_teacher == "alone":
            return self._finished(self.cell.alone, TEACHER)
        model, report = self.auto_model.from_pretrained(
            self.folder / "pretrained_teacher", output_loading_info=True, **self.labels
        )
        if report["missing_keys"]:
            raise ValueError(
                f"`pretrained_teacher: prepared` has no trained weights for {sorted(report['missing_keys'])}, which "
                f"{self.cell.task} needs. Use `pretrained_teacher: alone` for this task."
            )
        return model

    def _finished(self, cell: Cell, name: str) -> PreTrainedModel:
        """A model of a finished cell; a missing head is drawn by the seed."""
        folder = self.folders[cell] / MODELS
        folder = folder if name == TEACHER else folder / name
        if not folder.exists():
            raise FileNotFoundError(
                f"The results have the cell {self.folders[cell].name}, but its models, which {self.cell.task} by "
                f"{self.cell.method} starts from, are not in {str(folder)!r}. Bring them back, or remove the line of "
                "this cell from the results to compute it again."
            )
        set_seed(self.cell.seed)
        return self.auto_model.from_pretrained(folder, **self.labels)

    def _initial(self, name: str) -> PreTrainedModel:
        """A model before any training, the same for every method with this seed."""
        config = AutoConfig.from_pretrained(self.folder / name, **self.labels)
        if getattr(self.cell, f"{name}_init") == "scratch":
            set_seed(self.cell.seed + (1 << 16) * (name == STUDENT))  # not the teacher's random numbers
            return self.auto_model.from_config(config)
        if not any((self.folder / TEACHER).glob("*.safetensors")):
            raise ValueError(
                f"`{name}_init: pretrained`, but the prepared teacher has no weights: the settings of its config "
                f"differ from those of its source in more than its depth. Use `{name}_init: scratch`."
            )
        set_seed(self.cell.seed)
        teacher = self.auto_model.from_pretrained(self.folder / TEACHER, **self.labels)
        if name == TEACHER:
            return teacher
        own, other = (json.loads((self.folder / each / "config.json").read_text()) for each in (STUDENT, TEACHER))
        for key in own.keys() - {"num_hidden_layers"}:
            if own[key] != other.get(key):
                raise ValueError(
                    f"`student_init: pretrained`, but the student has `{key}: {own[key]}` and the teacher "
                    f"`{key}: {other.get(key)}`: only its depth can be cut. Use `student_init: scratch`."
                )
        return create_student(teacher, config.num_hidden_layers)


# ---- Training ----


def train_cell(
    cell: Cell, prepared: Prepared, folder: Path, folders: Mapping[Cell, Path], scale: Scale
) -> dict[str, Any]:
    """Train the models of a cell, from its last checkpoint if there is one, and score them.

    Args:
        cell: The cell.
        prepared: Data and initial models.
        folder: Folder of the cell; its models will be in `models/`, the student in `models/student/`.
        folders: Folders of the cells whose models it needs.
        scale: How often to evaluate and to save.

    Returns:
        `models`, `curve`, `compute` and `environment` of the results.
    """
    models = Models(cell, prepared, folders)
    learners, pretrained = models.learners(), models.pretrained_teacher()
    parts = prepared.parts(cell.task)
    schedule = Schedule(parts["train"], cell, Masking(prepared.tokenizer) if cell.task == MLM else None)
    steps = len(schedule) // cell.batch_size
    args = arguments_of(cell, steps, folder / RUN, scale)
    stopwatch = Stopwatch()
    trainer = CoDistillationTrainer(
        model=learners.get(TEACHER) or learners[STUDENT],
        args=args,
        data_collator=collate,
        train_dataset=schedule,
        eval_dataset=Subset(parts["validation"], range(min(scale.curve_rows, len(parts["validation"])))),
        compute_metrics=None if cell.task == MLM else scores_for(cell.task),
        callbacks=[stopwatch],
        student_model=learners[STUDENT] if cell.learner is None else None,
        pretrained_teacher=pretrained,
    )
    trainer.remove_callback(PrinterCallback)  # the scores of each cell are printed instead
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder / RUN))
    stopwatch = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Stopwatch))
    scores = {part: trainer.evaluate(parts[part], metric_key_prefix=part) for part in PARTS[1:]}
    result = {
        "models": {
            name: {
                "parameters": learners[name].num_parameters(),
                "layers": learners[name].config.num_hidden_layers,
                "scores": {part: _scores_of(name, cell, scores[part], part) for part in scores},
            }
            for name in cell.trained
        },
        "curve": [
            {"step": entry["step"], **{name: _scores_of(name, cell, entry, "eval") for name in cell.trained}}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
        "compute": {
            "steps": steps,
            "tokens": sum(schedule.rows.lengths[index] for index in schedule.order),
            "flops": _flops(trainer, schedule, cell.batch_size),
            "seconds": stopwatch.seconds,
        },
        "environment": environment(),
    }
    if cell.learner is None:  # no cell starts from a model that was fine-tuned by itself
        written = place_to_write(folder / MODELS)
        shutil.rmtree(written, ignore_errors=True)
        trainer.save_model(str(written))
        put_in_place(folder / MODELS)
    return result


def arguments_of(cell: Cell, steps: int, folder: Path, scale: Scale) -> CoDistillationTrainingArguments:
    """The training arguments of a cell of so many optimizer steps, whose checkpoints are in a folder."""
    return CoDistillationTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=cell.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=cell.learning_rate,
        student_learning_rate=cell.student_learning_rate,
        weight_decay=cell.weight_decay,
        warmup_steps=cell.warmup_ratio,
        bf16=cell.bf16,
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU has to be asked for
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,  # masking keeps a GPU waiting
        seed=cell.seed,
        train_sampling_strategy="sequential",
        eval_strategy="steps" if cell.task == MLM else "no",
        eval_steps=max(1, steps // scale.evaluations),
        save_strategy="steps",
        save_steps=max(1, steps // scale.checkpoints),
        save_total_limit=1,
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, steps // 20),
        prediction_loss_only=cell.task == MLM,
        remove_unused_columns=False,
        disable_tqdm=not os.isatty(2),
        report_to="none",
        **cell.arguments,
    )


def environment() -> dict[str, Any]:
    """Device, versions and date of a training."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def scores_for(task: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` of a GLUE task: its scores, and for classes the calibration error."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if task == "stsb":
            return glue_scores(task, logits[:, 0], labels)
        return glue_scores(task, logits.argmax(-1), labels) | {"calibration_error": calibration_error(logits, labels)}

    return compute


def _last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint. A killed plain Trainer leaves half a checkpoint, without the state it writes last."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        try:
            json.loads((Path(last) / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(last)
        else:
            return last
    return None


def _scores_of(name: str, cell: Cell, metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The scores of one model among the metrics of an evaluation."""
    own = {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items() if key.startswith(f"{prefix}_")}
    if name == STUDENT and cell.learner is None:
        own = {key.removeprefix("student_"): value for key, value in own.items() if key.startswith("student_")}
    names = ("loss", "calibration_error", "accuracy", "matthews_correlation", "pearson", "spearmanr")
    return {key: own[key] for key in names if key in own}


def _flops(trainer: CoDistillationTrainer, schedule: Schedule, batch_size: int) -> float:
    """Floating-point operations of the matrix products of a training.

    They are counted in the forward and the backward of one batch, and scaled to all batches by the number of padded
    tokens.
    """
    inputs = trainer._prepare_inputs(collate([schedule[index] for index in range(batch_size)]))
    trainer.model.train()
    with trainer.compute_loss_context_manager(), sdpa_kernel(SDPBackend.MATH):  # other kernels are not counted on CPUs
        trainer.compute_loss(trainer.model, inputs)  # the first call of a process may try things
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad()
    lengths = [schedule.rows.lengths[index] for index in schedule.order]
    longest = [max(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    return counter.get_total_flops() * sum(longest) / longest[0]
