"""The facts that model cards state. Nothing here can hold a path or a token: see `_SHOWN` and `repo_id`."""

import os
from collections.abc import Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..arguments import DistillationArguments, ModeDefault
from ..graph import EDGES
from ..model_structure import config_of, is_peft_model
from ..students.costs import Latencies, cpu_name, latencies_of
from ..tasks.base import Task
from .results import Results

#: The only training arguments that a card shows, beside `_SHOWN_OF_LEARNERS` of each learner (`student_hard_weight`).
_SHOWN = (
    *("recipe", "warm_start_epochs", "warm_start_steps", "warm_start_learning_rate"),
    *("distillation_mode", "soft_loss", "temperature", "soft_warmup_ratio", "share", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "label_smoothing_factor", "optim", "bf16", "fp16", "seed"),
    *("eval_strategy", "load_best_model_at_end", "edges"),
    *(f"{edge.name}_{setting}" for edge in EDGES for setting in ("weight", "schedule", "gate")),
    *("feature_loss", "feature_layers", "feature_source"),
)
_SHOWN_OF_LEARNERS = ("hard_weight", "feature_weight", "learning_rate", "weight_decay", "max_grad_norm")
_PACKAGES = ("ctcd_trainer", "transformers", "peft", "torch", "accelerate", "datasets", "tokenizers")
#: The times of a short card.
NOT_MEASURED = Latencies({}, "")


@dataclass(frozen=True, eq=False)
class CardFacts:
    """The facts about a run that its model cards state.

    Attributes:
        learners: The models by name, the primary first.
        task: The task of the models.
        distillation: The arguments of co-distillation.
        args: The training arguments.
        state: Trainer's state, with the logs.
        repositories: Repository on the Hub by learner; a name without an owner is not shown.
        processing_classes: Tokenizer or processor by learner.
        train_dataset: The training data.
        own_soft_loss: Whether a function of the user compares the predictions.
        sharded: Whether each process has only a part of each model.
        warm_start: The costs of the time when the teacher was trained alone, as metrics of the training.
    """

    learners: Mapping[str, nn.Module]
    task: Task
    distillation: DistillationArguments
    args: TrainingArguments
    state: TrainerState
    repositories: Mapping[str, str | None]
    processing_classes: Mapping[str, Any]
    train_dataset: Any = None
    own_soft_loss: bool = False
    sharded: bool = False
    warm_start: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def results(self) -> Results:
        """The evaluations and the training losses."""
        return Results.of(self.state, list(self.learners), self.args.load_best_model_at_end)

    @property
    def primary(self) -> str:
        """Name of the learner at the root of the output folder."""
        return next(iter(self.learners))

    @property
    def amount(self) -> str:
        """How long the training was, as sentences."""
        args, state = self.args, self.state
        if not state.global_step:
            return "Nothing was trained before this card was written."
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        epochs = f" ({state.epoch:.2f} epochs)" if state.epoch else ""
        text = f"The training took {state.global_step:,} optimizer steps{epochs}. Each step used {batch:,} rows"
        if isinstance(self.train_dataset, Sized):
            text += f" of the training data, which have {len(self.train_dataset):,} rows"
        text += f". The learning rate was {args.learning_rate:g} and the seed {args.seed}."
        if "warm_start_steps" in self.warm_start:
            steps = self.warm_start["warm_start_steps"]
            text += f" Before, the {self.primary} was trained alone for {steps:,} steps, and the student made from it."
        seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
        if not seconds:
            return text
        device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else cpu_name()
        processes = f" in {args.world_size} processes" if args.world_size > 1 else ""
        time = f"{seconds[-1] / 60:,.1f} minutes" if seconds[-1] >= 60 else f"{seconds[-1]:.1f} seconds"
        return f"{text} The last run took {time}{processes} on {device}."

    @property
    def shown_arguments(self) -> dict[str, str]:
        """The training arguments of the white list that differ from their defaults.

        Weights that follow from the mode are left out.
        """
        names = {*_SHOWN, *(f"{name}_{what}" for name in self.learners for what in _SHOWN_OF_LEARNERS)}
        values = {field: getattr(self.args, field.name) for field in fields(self.args) if field.name in names}
        return {
            field.name: str(value.value if isinstance(value, Enum) else value)
            for field, value in values.items()
            if value is not None and value != field.default and not isinstance(value, ModeDefault)
        }

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the installed packages by name; PEFT's only if a learner is an adapter."""
        adapters = any(map(is_peft_model, self.learners.values()))
        return {name: found for name, found in _versions().items() if adapters or name != "peft"}

    def started_from(self, learner: str) -> str:
        """The model whose weights a learner started from, as its config names it; empty for random weights."""
        model = self.learners[learner]
        name = getattr(config_of(model), "_name_or_path", None)
        return name or (is_peft_model(model) and model.active_peft_config.base_model_name_or_path) or ""

    def repository(self, learner: str) -> str | None:
        """Repository of a learner, `owner/name`, if that is known."""
        name = repo_id(self.repositories.get(learner))
        return name if name is not None and "/" in name else None

    def measured(self) -> Latencies:
        """Time the models, which takes about a second."""
        if self.sharded:
            return Latencies({}, "The latency was not measured: the models are divided among processes.")
        return latencies_of(self.learners)


@cache  # reading them takes longer than writing a short card
def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def repo_id(name: Any) -> str | None:
    """A name if it can be the name of a repository on the Hub; `None` for a folder or an empty name."""
    if not isinstance(name, str) or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
