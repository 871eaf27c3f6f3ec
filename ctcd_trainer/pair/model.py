"""The pair as one module, so that one wrap, one backward, one scaler and one checkpoint call serve all learners."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..graph import STUDENT, TEACHER
from ..losses.fused_linear import LinearHead, ScoredPositions
from ..losses.head_tap import HeadTap
from ..model_structure import base_model, forward_parameters, layer_classes
from ..tasks.base import Task
from ..tasks.two_tokenizers import inputs_of_learner
from .shared_layers import SharedRun


class CoDistillationModel(PreTrainedModel):
    """Learners that train together, by name; the first one is the primary, whose place is the root of every folder.

    Its `config` is the primary learner's. It is made by the trainer and has no checkpoint format of its own:
    `save_pretrained` writes each learner as the ordinary model that it is.

    Args:
        learners: The models by name, the primary (the teacher) first.
        task: What they are for.
        frozen: Names of the learners that are not trained. They stay in evaluation mode (no dropout, no update of
            running statistics), run without gradients, and their parameters have `requires_grad=False`.
        bystanders: Models that are run on the same batches outside of the pair. No learner is given an input that only
            they name.
        two_tokenizers: Whether the student has a tokenizer, and so inputs, of its own.
    """

    config_class = PreTrainedConfig
    supports_gradient_checkpointing = True

    def __init__(
        self,
        learners: Mapping[str, nn.Module],
        task: Task,
        frozen: Collection[str] = (),
        bystanders: Collection[nn.Module] = (),
        two_tokenizers: bool = False,
    ) -> None:
        super().__init__(PreTrainedConfig())
        self.learners = nn.ModuleDict(learners)
        self.task = task
        self.two_tokenizers = two_tokenizers
        #: The output layers of the learners, where they are run without them (`head_at`).
        self.taps: dict[str, HeadTap] = {}
        #: Runs the layers that both learners have in common.
        self.shared: SharedRun | None = None
        self.primary = next(iter(learners))
        self.config = self.learners[self.primary].config
        self.main_input_name = base_model(self.learners[self.primary]).main_input_name
        self.frozen = frozenset(frozen)
        for name in self.frozen:
            self.learners[name].requires_grad_(False)
        #: The inputs that any of the models names.
        self._accepted = {type(base_model(m)): forward_parameters(m) for m in [*learners.values(), *bystanders]}
        self.known_inputs = frozenset().union(*self._accepted.values())
        self.train(self.training)

    @property
    def teacher(self) -> nn.Module:
        """The plain teacher."""
        return self.learners[TEACHER]

    @property
    def student(self) -> nn.Module:
        """The plain student."""
        return self.learners[STUDENT]

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The learners that are trained, by name."""
        return {name: model for name, model in self.learners.items() if name not in self.frozen}

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers, of all learners, that FSDP shards one by one unless the user names others."""
        return layer_classes(self.learners.values())

    def own_parameters(self, learner: str) -> dict[str, nn.Parameter]:
        """Parameters of a learner that none before it has, by their name in the learner."""
        before = list(self.learners)[: list(self.learners).index(learner)]
        others = {id(parameter) for name in before for parameter in self.learners[name].parameters()}
        own = self.learners[learner].named_parameters()
        return {name: parameter for name, parameter in own if id(parameter) not in others}

    def folder_of(self, learner: str, root: str) -> str:
        """Folder of a learner in an output or checkpoint folder: the root for the primary, its name for the others."""
        return root if learner == self.primary else os.path.join(root, learner)

    def train(self, mode: bool = True) -> "CoDistillationModel":
        """Set training mode on the learners that are trained; frozen ones stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.learners[name].eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the primary learner."""
        return base_model(self.learners[self.primary]).get_input_embeddings()

    def forward(
        self,
        learner: str | None = None,
        labelled: bool = True,
        head_at: ScoredPositions | None = None,
        **inputs: Any,
    ) -> Any:
        """Run every learner on the same inputs, or one of them.

        Each receives the inputs that its `forward` names: a DistilBERT student gets no `token_type_ids`.

        Args:
            learner: Name of the only learner to run; all of them by default.
            labelled: Whether the learners get the labels of the batch, and compute their loss.
            head_at: The positions that matter, to run the heads at these alone and to stop before the output layers
                (`taps`).
            **inputs: Tensors of the batch, `(rows, ...)`.

        Returns:
            The outputs by name of the learner, or the output of the one that was asked for; `LinearHead`s with
            `head_at`.
        """
        if learner is not None:
            return self._run(learner, inputs, labelled, head_at)
        run = partial(self._run, inputs=inputs, labelled=labelled, head_at=head_at)
        if self.shared is not None:
            return self.shared.run(self.learners, run)
        return {name: run(name) for name in self.learners}

    def _run(self, name: str, inputs: Mapping[str, Any], labelled: bool, head_at: ScoredPositions | None) -> Any:
        inputs = inputs_of_learner(name, inputs, self.task.label_names, self.known_inputs, self.two_tokenizers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen):
            tap = None if head_at is None else self.taps[name]
            return self.run(self.learners[name], inputs, labelled, tap, head_at)

    def run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labelled: bool = True,
        tap: HeadTap | None = None,
        head_at: ScoredPositions | None = None,
    ) -> Any | LinearHead:
        """Run a learner or a bystander on a batch; see `forward`.

        Args:
            model: The model.
            inputs: The batch.
            labelled: Whether it gets the labels.
            tap: Its output layer, to stop before it.
            head_at: The positions that matter, with a `tap`.
        """
        if not labelled or tap is not None:
            inputs = self.task.unlabelled(base_model(model), inputs)
        own = self.inputs_of(model, inputs)
        return model(**own) if tap is None else tap.run(model, own, head_at)

    def inputs_of(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that a model takes (`named_inputs`), with `use_cache`.

        Caches for generation are as Trainer sets them for the primary learner (`use_cache`), without a change to the
        config of the others.
        """
        own = self.named_inputs(model, inputs)
        if "use_cache" in self._accepted_by(model):
            own.setdefault("use_cache", getattr(self.config, "use_cache", False))
        return own

    def named_inputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that a model takes: what its `forward` names, and what nobody names."""
        accepted = self._accepted_by(model)
        return {key: value for key, value in inputs.items() if key in accepted or key not in self.known_inputs}

    def _accepted_by(self, model: nn.Module) -> frozenset[str]:
        """Names of the inputs of a model, also where FSDP2 has made its class a subclass."""
        return next(self._accepted[cls] for cls in type(base_model(model)).__mro__ if cls in self._accepted)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the primary learner in the folder itself and every other learner in a folder of its name.

        Each is complete and loads with its own `from_pretrained`, without this package.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            state_dict: State of the whole pair where it is gathered from several processes.
            **kwargs: Passed to each learner's `save_pretrained`.
        """
        for name, model in self.learners.items():
            prefix = f"learners.{name}."
            own = state_dict and {
                key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
            }
            folder = self.folder_of(name, os.fspath(save_directory))
            model.save_pretrained(folder, is_main_process=is_main_process, state_dict=own, **kwargs)


@dataclass
class LearnerView:
    """One learner of a pair, called through whatever wraps the pair (DDP and the like need their own forward).

    Attributes:
        model: The pair, wrapped or not.
        learner: Name of the learner that a call runs.
        outputs: What the last call returned.
    """

    model: nn.Module
    learner: str
    outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        """Output of the learner on the inputs."""
        self.outputs = self.model(learner=self.learner, **inputs)
        return self.outputs
