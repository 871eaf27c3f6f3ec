"""The pair: several models as one module that returns its loss.

One wrap (DDP, FSDP, DeepSpeed), one backward pass, one scaler and one checkpoint call serve all learners, and any
training loop can train them.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..arguments import DistillationArguments
from ..checks import argument_of, explained
from ..graph import PRETRAINED, STUDENT, TEACHER, copied_learner
from ..losses.fused_linear import LinearHead, ScoredPositions
from ..losses.head_tap import HeadTap
from ..losses.objective import Objective, SoftLossFunction
from ..losses.teacher_cache import PretrainedCache
from ..model_structure import base_model, forward_parameters, is_peft_model, is_quantised, layer_classes, main_input_of
from ..tasks import Task
from ..tasks.labels import IGNORE_INDEX, TARGETS
from ..tasks.two_tokenizers import inputs_of_learner
from .bases import AdapterBases
from .copies import Copies
from .feature_links import FeatureLinks
from .fused_heads import FusedHeads
from .learner_view import recorded_calls
from .output import CoDistillationOutput
from .shared_layers import SharedRun


def _of_primary(name: str) -> property:
    """Give the primary learner's attribute in place of the one that `PreTrainedModel` has."""

    def get(self: "CoDistillationModel") -> Any:
        learners = self.__dict__.get("_modules", {}).get("learners")
        return getattr(PreTrainedModel if learners is None else learners[self.primary], name)

    return property(get)


# Pipelines know models by the name of their class. The pair does what its primary learner does.
logging.get_logger("transformers.pipelines.base").addFilter(
    lambda record: "'CoDistillationModel' is not supported" not in record.getMessage()
)

#: Facts about the way in which a model was loaded. The pair was not loaded: no one may take it for such a model.
_LOADING = {"hf_device_map", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"}
_LOADING |= {"quantization_method", "is_parallelizable", "model_parallel"}


class CoDistillationModel(PreTrainedModel):
    """Learners that train together, by name; the first is the primary, whose place is the root of every folder.

    `forward` runs all learners and returns their loss. The pair can be used as its primary learner. It has the config
    of that learner and looks up there the attributes and methods that it does not define. `forward` returns the
    fields of that learner at the top level.

    `save_pretrained` writes each learner as an ordinary model; there is no checkpoint format for the pair. Make a pair
    with `make_pair`, which checks that the models fit together.

    Args:
        learners: The models by name, the primary (the teacher) first.
        task: The task of the models.
        arguments: The weights, the soft loss and the temperature. Learners that no loss trains are frozen: they stay
            in evaluation mode, run without gradients, and their parameters have `requires_grad=False`.
        pretrained: A frozen teacher outside of the pair (Community KD).
        soft_loss_func: The user's own soft loss.
        two_tokenizers: Whether the student has another tokenizer, and so other inputs.
    """

    config_class = PreTrainedConfig
    supports_gradient_checkpointing = True
    active_adapters = _of_primary("active_adapters")
    add_adapter = _of_primary("add_adapter")
    base_model = _of_primary("base_model")
    can_generate = _of_primary("can_generate")
    delete_adapter = _of_primary("delete_adapter")
    disable_adapters = _of_primary("disable_adapters")
    enable_adapters = _of_primary("enable_adapters")
    get_adapter_state_dict = _of_primary("get_adapter_state_dict")
    get_decoder = _of_primary("get_decoder")
    get_encoder = _of_primary("get_encoder")
    input_modalities = _of_primary("input_modalities")
    load_adapter = _of_primary("load_adapter")
    output_modalities = _of_primary("output_modalities")
    set_adapter = _of_primary("set_adapter")

    def __init__(
        self,
        learners: Mapping[str, nn.Module],
        task: Task,
        arguments: DistillationArguments,
        pretrained: nn.Module | None = None,
        soft_loss_func: SoftLossFunction | None = None,
        two_tokenizers: bool = False,
    ) -> None:
        super().__init__(PreTrainedConfig())
        self.__dict__.pop("generation_config", None)  # the primary's
        self.learners = nn.ModuleDict(learners)
        self.primary = next(iter(learners))
        self.task = task
        self.objective = Objective(task, arguments, soft_loss_func)
        self.objective.from_column = pretrained is None and arguments.graph.uses_pretrained
        self.fused_heads = FusedHeads()
        #: Frozen models outside of the pair by name: in no state dict, not wrapped, only learnt from.
        self.sources: dict[str, nn.Module] = {} if pretrained is None else {PRETRAINED: pretrained}
        #: Frozen copies of learners, which are sources too.
        self.copies = Copies(learners, {edge.source for edge in arguments.graph.edges}, arguments.average_decay)
        self.sources |= self.copies.models
        #: Keeps the predictions of the frozen teacher.
        self.teacher_cache: PretrainedCache | None = None
        #: Runs the layers that both learners have in common.
        self.shared_run: SharedRun | None = None
        self.two_tokenizers = two_tokenizers
        self.bases = AdapterBases()
        self.config = getattr(self.learners[self.primary], "config", self.config)
        self.name_or_path = getattr(self.config, "name_or_path", "")
        self.main_input_name = main_input_of(self.learners[self.primary])
        self.frozen = frozenset(arguments.graph.frozen)
        for name in self.frozen:
            self.learners[name].requires_grad_(False)
        #: The inputs that each class of models names.
        self._accepted = {type(base_model(m)): forward_parameters(m) for m in self.models.values()}
        self.known_inputs = frozenset().union(*self._accepted.values())
        links = {edge.learner: FeatureLinks(edge, self.models, arguments) for edge in arguments.graph.features}
        #: The feature loss of each learner that has one.
        self.feature_links: Mapping[str, FeatureLinks] = nn.ModuleDict(links) if links else {}
        self.train(self.training)
        self._made = True

    # ---- The models ----

    @property
    def teacher(self) -> nn.Module:
        """The plain teacher."""
        return self.learners[TEACHER]

    @property
    def student(self) -> nn.Module:
        """The plain student."""
        return self.learners[STUDENT]

    @property
    def models(self) -> dict[str, nn.Module]:
        """All models by name: the learners, and the frozen sources outside of the pair."""
        return {**self.learners, **self.sources}

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The learners that are trained, by name."""
        return {name: model for name, model in self.learners.items() if name not in self.frozen}

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the layers that FSDP shards one by one unless the user names others."""
        return layer_classes(self.learners.values())

    def own_parameters(self, learner: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a learner that no learner before it has, by their name in the learner."""
        before = list(self.learners)[: list(self.learners).index(learner)]
        others = {id(parameter) for name in before for parameter in self.learners[name].parameters()}
        named = self.learners[learner].named_parameters()
        return {name: parameter for name, parameter in named if id(parameter) not in others}

    def optimised_parameters(self, learner: str) -> list[nn.Parameter]:
        """Return the parameters that are trained as a learner's: its own, and the projections of its feature loss."""
        own = list(self.own_parameters(learner).values())
        return own + (list(self.feature_links[learner].parameters()) if learner in self.feature_links else [])

    @contextmanager
    def with_projections(self, learner: str) -> Iterator[None]:
        """Let a learner have the projections of its feature loss as a part, for code that makes its optimizer."""
        if learner not in self.feature_links:
            yield
            return
        model = self.learners[learner]
        model.feature_projections = self.feature_links[learner].projections
        try:
            yield
        finally:
            del model.feature_projections

    def folder_of(self, learner: str, root: str) -> str:
        """Return the folder of a learner in an output folder: the root for the primary, its name for the others."""
        return root if learner == self.primary else os.path.join(root, learner)

    def train(self, mode: bool = True) -> "CoDistillationModel":
        """Set training mode on the learners that are trained; frozen ones stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.learners[name].eval()
        return self

    # ---- The pair as its primary learner ----

    def __getattr__(self, name: str) -> Any:
        """Look an attribute up in the primary learner that neither the pair nor its class has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in _LOADING or "learners" not in self.__dict__.get("_modules", {}):
                raise
        primary = self.learners[self.primary]
        try:
            return getattr(primary, name)
        except AttributeError:
            raise AttributeError(
                f"Neither the pair nor its {self.primary}, a {type(primary).__name__}, has {name!r}. The plain models "
                f"are `trainer.teacher_model` and `trainer.student_model`, or `pair.learners[...]` for one of "
                f"{list(self.learners)}."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the primary learner that the pair does not have, such as `generation_config`."""
        own = name.startswith("_") or name in self.__dict__ or name in self.__dict__.get("_modules", {})
        if own or hasattr(type(self), name) or not self.__dict__.get("_made"):
            return super().__setattr__(name, value)
        primary = self.learners[self.primary]
        return setattr(primary, name, value) if hasattr(primary, name) else super().__setattr__(name, value)

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the primary learner."""
        return self.learners[self.primary].get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embeddings of the primary learner."""
        self.learners[self.primary].set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer of the primary learner; `None` if it is no language model."""
        return self.learners[self.primary].get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of the primary learner."""
        self.learners[self.primary].set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of every learner, which read the same token ids; see `PreTrainedModel`.

        Returns:
            The input embeddings of the primary learner.

        Raises:
            ValueError: The learners have two tokenizers or share parts; or a model is frozen, so that nothing would
                train its new rows; or a model is quantised or has adapters. Nothing is changed.
        """
        if new_num_tokens is None and not (args or kwargs):
            return self.get_input_embeddings()
        obstacles = {
            "the models have two tokenizers": self.two_tokenizers,
            "the models share parameters": any(
                len(self.own_parameters(name)) < len(list(model.parameters())) for name, model in self.learners.items()
            ),
        }
        for name, model in self.models.items():
            obstacles[f"the {name} model is frozen, so that its new rows would not be trained"] = (
                name not in self.trained
            )
            obstacles[f"the {name} model is quantised"] = is_quantised(model)
            obstacles[f"the {name} model has adapters, which are saved without its embeddings"] = is_peft_model(model)
        for obstacle, holds in obstacles.items():
            if holds:
                raise ValueError(
                    f"`resize_token_embeddings({new_num_tokens})` of the pair: {obstacle}. Resize the plain models "
                    "before you make the pair, and before PEFT wraps them."
                )
        resized = [model.resize_token_embeddings(new_num_tokens, *args, **kwargs) for model in self.learners.values()]
        self.fused_heads = FusedHeads()  # the output layers are others
        return resized[0]

    # ---- The loss ----

    @torch.compiler.disable(recursive=False)  # the models are compiled, the bookkeeping between them is not
    def forward(
        self,
        *inputs: Tensor,
        learner: str | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **batch: Any,
    ) -> CoDistillationOutput | Any:
        """Run the learners and compute all hard and soft losses.

        Each model receives the inputs that its `forward` names: a DistilBERT student gets no `token_type_ids`.

        Args:
            *inputs: Inputs by position, as the primary learner takes them.
            learner: Name of a learner. Only this learner runs, and its own output is returned, with its hard loss as
                the `loss`.
            num_items_in_batch: Scored items in the whole accumulated batch, by which every term is divided: a number,
                or those of labels and rows; see `Objective.__call__`. `None` takes the mean over this batch.
            return_logits: Whether the models return their logits. By default they do, except language models in
                training mode where the losses can be computed without them (`fused_lm_head`).
            **batch: Tensors `(rows, ...)`, with labels. Without labels there is no loss.

        Returns:
            The loss, its terms, the primary learner's fields and the outputs of all learners; see
            `CoDistillationOutput`.
        """
        if batch.pop("return_dict", None) is False:
            output = self.forward(
                *inputs, learner=learner, num_items_in_batch=num_items_in_batch, return_logits=return_logits, **batch
            )
            return output.to_tuple()
        if inputs:
            names = inspect.signature(base_model(self.learners[self.primary]).forward).parameters
            batch = dict(zip(names, inputs, strict=False)) | batch
        batch = {
            name: value for name, value in batch.items() if value is not None or name not in self.task.label_names
        }
        labelled = self.objective.is_labelled(batch)
        if learner is not None:
            output = self._run(learner, batch, labelled, num_items_in_batch=num_items_in_batch)
            if labelled:
                with _without_autocast(self.device.type):
                    output = self.task.with_loss(output, self.objective.hard_loss(output, batch, num_items_in_batch))
            return output
        if return_logits is None:
            return_logits = not (self.training and torch.is_grad_enabled())
        fused = labelled and not return_logits and self._is_fused(batch)
        if not self.feature_links or not (labelled or self.training):
            return self._run_and_compare(batch, labelled, num_items_in_batch, fused)
        with ExitStack() as recordings:
            for links in self.feature_links.values():
                recordings.enter_context(links.recording())
            output = self._run_and_compare(batch, labelled, num_items_in_batch, fused)
            if output.loss is None:
                return output
            with _without_autocast(self.device.type):
                share = self.objective.share_of_rows(batch, num_items_in_batch)
                for links in self.feature_links.values():
                    value = links.loss(self._parts_for(links, batch)) * share
                    output.losses[links.edge.loss_name] = value
                    output.loss = output.loss + links.edge.weight * value
        return output

    def _parts_for(self, links: FeatureLinks, batch: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the parts of a batch of the two models of a feature loss, by name."""
        labels = self.task.label_names
        return {name: inputs_of_learner(name, batch, labels, self.known_inputs) for name in links.taps}

    def _run_and_compare(
        self, batch: Mapping[str, Any], labelled: bool, num_items_in_batch: Tensor | int | None, fused: bool
    ) -> CoDistillationOutput:
        """Run all models, and compute the hard and soft losses, without logits if `fused`; see `forward`."""
        if fused:
            targets, alone = self.task.targets(batch), self.objective.arguments.graph.features_alone
            scored = ScoredPositions(torch.full_like(targets, IGNORE_INDEX) if alone else targets)
            heads = self._run_all(batch, head_at=scored) | self.run_sources(batch, scored)
            if alone:
                return CoDistillationOutput(loss=targets.new_zeros((), dtype=torch.float32), losses={})
            loss, losses = self.objective.fused(heads, scored.labels, num_items_in_batch)
            return CoDistillationOutput(loss=loss, losses=losses)
        outputs = self._run_all(batch, labelled, num_items_in_batch=num_items_in_batch)
        loss, losses = None, {}
        if labelled or self.training:
            every_output = {**outputs, **self.run_sources(batch)}
            with _without_autocast(self.device.type):
                loss, losses = self.objective(every_output, batch, num_items_in_batch)
        first = outputs[self.primary]
        fields = dict(self.task.named(first))
        return CoDistillationOutput({"loss": None, **fields} | {"loss": loss, "losses": losses, "outputs": outputs})

    def _is_fused(self, batch: Mapping[str, Any]) -> bool:
        """Tell whether the learners run without logits."""
        if not self.task.language_model:
            return False
        if self.fused_heads.used is None:
            inputs = {name: self.inputs_of(model, batch) for name, model in self.models.items()}
            with explained({argument_of(name): (self.models[name], part) for name, part in inputs.items()}, self.task):
                return self.fused_heads.decide(self.objective, self.models, inputs, batch)
        return self.fused_heads.used

    def _run_all(self, batch: Mapping[str, Any], labelled: bool = False, **options: Any) -> dict[str, Any]:
        """Run every learner on a batch, layers that they share only once."""
        run = partial(self._run, batch=batch, labelled=labelled, **options)
        if self.shared_run is not None:
            return self.shared_run.run(self.learners, run)
        return {name: run(name) for name in self.learners}

    def _run(
        self,
        name: str,
        batch: Mapping[str, Any],
        labelled: bool = False,
        head_at: ScoredPositions | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run one learner on its part of a batch."""
        wanted = not self.training or self.objective.arguments.graph.hard_weights[name] > 0
        if labelled and wanted and self.objective.learner_loss is not None:
            return self._run_by_user(name, batch, num_items_in_batch)
        compute = labelled and self.objective.models_compute_loss(batch)
        if compute:
            batch = {**batch, **self.task.trainable_labels(batch)}
        batch = inputs_of_learner(name, batch, self.task.label_names, self.known_inputs, self.two_tokenizers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen):
            output = self.run(self.learners[name], batch, compute, head_at and self.fused_heads.taps[name], head_at)
        # As accelerate does with the outputs of a model under autocast: the loss functions expect fp32.
        autocast = head_at is None and torch.is_autocast_enabled(self.device.type)
        return convert_to_fp32(output) if autocast else output

    @torch.compiler.disable  # the code of users is not compiled, as without a pair
    def _run_by_user(self, name: str, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None) -> Any:
        """Let the user's code run one learner on its part of a batch and compute its loss, the output's `loss`."""
        nothing = self.task.counted(batch).eq(IGNORE_INDEX).all()  # the loss of nothing is NaN, and has weight 0
        labels = {key: batch[key].masked_fill(nothing, 0) for key in self.task.label_names if key in batch}
        batch = inputs_of_learner(
            name, {**batch, **labels}, self.task.label_names, self.known_inputs, self.two_tokenizers
        )
        model, number = self.learners[name], num_items_in_batch
        number = number.reshape(-1)[0] if isinstance(number, Tensor) else number
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen),
            recorded_calls(model, self.device.type) as calls,
        ):
            loss, output = self.objective.learner_loss(name, self.inputs_of(model, batch), number)
            if output is None or not set(self.task.compared_outputs) <= self.task.named(output).keys():
                if not calls:
                    raise ValueError(
                        f"`compute_loss` has not called the {name} that it was given as `model`, so that there are no "
                        f"outputs to compare. Call it, or return outputs with {list(self.task.compared_outputs)}."
                    )
                output = calls[-1]
            return self.task.with_loss(output, torch.where(nothing, 0.0 * loss, loss))

    def run_sources(self, batch: Mapping[str, Any], head_at: ScoredPositions | None = None) -> dict[str, Any]:
        """Run the frozen models outside of the pair, or look their predictions up.

        Args:
            batch: The batch.
            head_at: The scored positions, to stop before the output layers of language models.

        Returns:
            The outputs by name.
        """
        outputs = {}
        for name, model in self.sources.items():
            like = copied_learner(name) or name
            inputs = inputs_of_learner(like, batch, self.task.label_names, self.known_inputs, self.two_tokenizers)
            tap = head_at and self.fused_heads.taps[name]
            labelled = self.task.needs_labels(base_model(model), inputs)
            run = partial(self._run_frozen, model, labelled, tap)
            cache = self.teacher_cache if name == PRETRAINED else None
            if cache is None or (self.task.language_model and tap is None):  # whole logits would fill the disk
                outputs[name] = run(inputs, head_at)
            else:
                taken = self.inputs_of(model, self.task.unlabelled(base_model(model), inputs))
                outputs[name] = cache.outputs(run, inputs, taken, tap, head_at, self.objective.progress.epoch)
        return outputs

    def _run_frozen(
        self, model: nn.Module, labelled: bool, tap: HeadTap | None, inputs: Mapping[str, Any], head_at: Any
    ) -> Any:
        with torch.no_grad():
            return self.run(model, inputs, labelled, tap, head_at)

    def run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labelled: bool = True,
        tap: HeadTap | None = None,
        head_at: ScoredPositions | None = None,
    ) -> Any | LinearHead:
        """Run one model on its part of a batch.

        Args:
            model: A learner or a source.
            inputs: The batch.
            labelled: Whether the model gets the labels.
            tap: Its output layer, to stop before it.
            head_at: The scored positions, with a `tap`.
        """
        if not labelled or tap is not None:
            inputs = self.task.unlabelled(base_model(model), inputs)
        inputs = self.inputs_of(model, inputs)
        name = next(name for name, each in self.models.items() if each is model)
        with explained({argument_of(name): (model, inputs)}, self.task):
            return model(**inputs) if tap is None else tap.run(model, inputs, head_at)

    def inputs_of(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Select the part of a batch that a model takes (`named_inputs`), with the primary learner's `use_cache`.

        Trainer sets `use_cache` in the config of the primary learner; the configs of the others are not changed.
        """
        named = self.named_inputs(model, inputs)
        if "use_cache" in self._accepted_by(model):
            named.setdefault("use_cache", getattr(self.config, "use_cache", False))
        return named

    def named_inputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Select the part of a batch that a model takes: inputs that its `forward` names or that no model names."""
        accepted = self._accepted_by(model)
        ours = self.known_inputs | {TARGETS}
        return {key: value for key, value in inputs.items() if key in accepted or key not in ours}

    def _accepted_by(self, model: nn.Module) -> frozenset[str]:
        """Names of the inputs of a model, also where FSDP2 has made its class a subclass."""
        return next(self._accepted[cls] for cls in type(base_model(model)).__mro__ if cls in self._accepted)

    # ---- Saving ----

    def weights_of(self, learner: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select the weights of a learner, under its own names, from a state dict of the pair."""
        prefix = f"learners.{learner}."
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the primary learner in the folder itself and every other learner in a folder of its name.

        Each is complete and loads with its own `from_pretrained`, without this package; see `AdapterBases` for
        adapters. Of a module without `save_pretrained` the weights are saved alone.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            state_dict: State of the whole pair where it is gathered from several processes.
            **kwargs: Passed to each learner's `save_pretrained`.
        """
        for name, model in self.learners.items():
            folder = self.folder_of(name, os.fspath(save_directory))
            weights = state_dict and self.weights_of(name, state_dict)
            if hasattr(model, "save_pretrained"):
                self.bases.save(name, model, folder, weights, is_main_process=is_main_process, **kwargs)
            elif is_main_process:  # as Trainer saves a plain module
                os.makedirs(folder, exist_ok=True)
                save_file(weights or model.state_dict(), os.path.join(folder, SAFE_WEIGHTS_NAME), {"format": "pt"})


def _without_autocast(device: str) -> AbstractContextManager:
    """Compute losses from whole outputs in fp32, as Trainer does: accelerate's autocast is for the models."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
