"""Model cards: one for each learner of a pair, from a template, with valid metadata for the Hub."""

import os
import shutil
from collections.abc import Mapping, Sized
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from torch import nn
from transformers.modelcard import METRIC_TAGS, TASK_TAG_TO_NAME_MAPPING
from transformers.utils import logging

from ..graph import PRETRAINED
from ..model_structure import count_parameters, is_peft_model
from ..students.costs import Latencies, latencies_of, weight_bytes
from . import facts, tables
from .figures import COMPARISON, CURVES, draw_pictures
from .results import Metrics, Results, baseline_of, is_agreement, lower_is_better

if TYPE_CHECKING:
    from ..trainer import CoDistillationTrainer

logger = logging.get_logger(__name__)

_FILE = "README.md"
#: First words of a card, by which a later save knows that it may replace it.
_SHORT = "ctcd_trainer has written this short card when the model was saved."
_FULL = "ctcd_trainer has written this card from what the trainer knew."
#: A title that only the empty card has which PEFT writes beside each adapter.
_PEFT_STUB = "# Model Card for Model ID"
#: Metrics that are known on the Hub under these names.
_HUB_METRICS = frozenset({*METRIC_TAGS, "exact_match", "mae", "mse", "perplexity"})


@cache  # compiling takes longer than all the rest of a short card
def _template() -> Template:
    return Template(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))


def write_model_cards(
    trainer: "CoDistillationTrainer",
    baseline: Any = None,
    folder: str | os.PathLike | None = None,
    revision: str | None = None,
    **given: Any,
) -> None:
    """Write the card of each learner, `README.md`, where the learner is saved, with pictures beside it.

    While a training goes on, the cards are short ones: without measured latencies and pictures.

    Args:
        trainer: A trainer with a pair.
        baseline: Metrics of models that were trained otherwise, to state the gain; see `card_results.baseline_of`.
        folder: Output or checkpoint folder; by default the output folder.
        revision: Branch of the repositories that the cards are for; by default `hub_revision`.
        **given: The arguments of `Trainer.create_model_card`. `model_name` is the primary learner's, and the others'
            is `<model_name>-<learner>` unless they have a repository. `finetuned_from` is the primary learner's, or
            names by learner; an empty name is a model that was trained from scratch.

    Raises:
        ValueError: `baseline` or `finetuned_from` does not fit the pair.
    """
    learners = list(trainer.pair.learners)
    origins = given.get("finetuned_from")
    if isinstance(origins, Mapping) and set(origins) - set(learners):
        raise ValueError(
            f"`finetuned_from` names {sorted(set(origins) - set(learners))}, but the models are {learners}: use these "
            "names."
        )
    found = baseline_of(baseline, learners) if baseline is not None else {}
    root = str(folder if folder is not None else trainer.args.output_dir)
    cards = _Cards(trainer, root, found, given, revision=revision)
    if not trainer.is_in_train:
        cards.measure()
    for learner in learners:
        cards.write(learner)


def save_model_cards(trainer: "CoDistillationTrainer", folder: str | os.PathLike, only: str | None = None) -> None:
    """Write short cards into a folder in which the models have just been saved, unless it has others.

    A card that cannot be made is no reason to lose a checkpoint: then there is a warning.

    Args:
        trainer: A trainer with a pair.
        folder: Output or checkpoint folder.
        only: Name of a learner that has the folder for itself.

    Raises:
        OSError: The files could not be written.
    """
    try:
        cards = _Cards(trainer, str(folder), {}, {}, only)
        for learner in [only] if only is not None else trainer.pair.learners:
            path = cards.folder(learner) / _FILE
            text = path.read_text(encoding="utf-8") if path.exists() else _SHORT
            if _SHORT in text or _PEFT_STUB in text:
                cards.write(learner)
    except OSError:
        raise
    except Exception as error:
        logger.warning("The model cards in %s could not be written: %r", folder, error)


class _Cards:
    """The cards of a pair in a folder.

    Args:
        trainer: A trainer with a pair.
        root: The folder.
        baseline: Metrics of models that were trained otherwise.
        given: The arguments of `Trainer.create_model_card`.
        alone: Name of a learner that has the folder for itself; the others are beside it.
        revision: Branch of the repositories; by default `hub_revision`.
    """

    def __init__(
        self,
        trainer: "CoDistillationTrainer",
        root: str,
        baseline: Metrics,
        given: Mapping[str, Any],
        alone: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.trainer, self.pair, self.args = trainer, trainer.pair, trainer.args
        self.models: dict[str, nn.Module] = dict(trainer.pair.learners)
        self.root, self.baseline, self.given, self.alone = root, baseline, given, alone
        self.results = Results.of(trainer.state, list(self.models), self.args.load_best_model_at_end)
        self.metric = self.results.main_metric(self.args.metric_for_best_model)
        self.revision = revision or self.args.hub_revision
        self.latencies = Latencies({}, "")
        self.pictures: dict[str, str] = {}

    def folder(self, learner: str) -> Path:
        """Where a learner is."""
        if self.alone is not None:
            return Path(
                self.root if learner == self.alone else self.pair.folder_of(learner, os.path.dirname(self.root))
            )
        return Path(self.pair.folder_of(learner, self.root))

    def measure(self) -> None:
        """Time the models, and draw the pictures."""
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            self.latencies = Latencies({}, "The latency was not measured: the models are divided among processes.")
        else:
            self.latencies = latencies_of(self.models)
        millions = {name: count_parameters(model) / 1e6 for name, model in self.models.items()}
        sizes = {"million parameters": millions, "ms for one sequence (CPU)": self.latencies.milliseconds}
        root = self.folder(self.pair.primary)
        self.pictures = draw_pictures(root, self.results, self.metric, sizes, self.baseline)
        for learner in self.models.keys() - {self.pair.primary}:
            self.folder(learner).mkdir(parents=True, exist_ok=True)
            for name in self.pictures:
                shutil.copy(root / name, self.folder(learner) / name)

    def write(self, learner: str) -> None:
        """Write the card of a learner."""
        folder = self.folder(learner)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = self.metadata(learner).to_yaml()
        text = str(
            ModelCard(_template().render(card_data=metadata, **self.description(learner), **self.numbers(learner)))
        )
        if self.args.hub_token:
            text = text.replace(self.args.hub_token, "***")
        (folder / _FILE).write_text(text.rstrip() + "\n", encoding="utf-8")

    # ---- Names ----

    def repository(self, learner: str) -> str | None:
        """Repository of a learner on the Hub, if it is known."""
        name = self.trainer.hub_model_id or self.args.hub_model_id
        if self.trainer.uploads is not None:
            name = self.trainer.uploads.repositories[learner]
        elif name is not None and learner != self.pair.primary:
            name = getattr(self.args, f"{learner}_hub_model_id", None) or f"{name}-{learner}"
        name = facts.repo_id(name)
        return name if name is not None and "/" in name else None  # otherwise only the Hub knows whose it is

    def name(self, learner: str) -> str:
        """Title of the card of a learner."""
        name = self.given.get("model_name") or os.path.basename(os.path.abspath(self.args.output_dir))
        if learner == self.pair.primary:
            return name
        repository = self.repository(learner)
        return repository.split("/")[-1] if repository is not None else f"{name}-{learner}"

    def origin(self, learner: str) -> facts.Origin:
        """Where the weights of a learner came from."""
        given = self.given.get("finetuned_from")
        if isinstance(given, Mapping):
            name = (given[learner] or "") if learner in given else None
        else:
            name = given if learner == self.pair.primary else None
        return facts.Origin.of(self.models[learner], name)

    def place_of(self, partner: str, learner: str) -> str:
        """A link from the card of a learner to its partner."""
        repository = self.repository(partner)
        if repository is not None:
            return facts.link(repository)
        path = os.path.relpath(self.folder(partner), self.folder(learner))
        return f"in the folder [`{path}`]({path}/{_FILE})"

    # ---- Metadata ----

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is known of the data; see `card_facts.dataset_settings`."""
        evaluated, trained = self.trainer.eval_dataset, self.trainer.train_dataset
        return facts.dataset_settings(trained if evaluated is None else evaluated, self.given)

    @property
    def tasks(self) -> list[str]:
        """The tasks as the Hub calls them."""
        tasks = self.given.get("tasks") or self.trainer.task.pipeline_tag
        return [tasks] if isinstance(tasks, str) else list(tasks or [])

    def metadata(self, learner: str) -> ModelCardData:
        """The block at the head of a card."""
        model, edges = self.models[learner], self.trainer.graph.edges
        links = {(edge.source, edge.learner) for edge in edges}
        tags = [tags] if isinstance(tags := self.given.get("tags") or [], str) else list(tags)
        tags += ["generated_from_trainer"] + ["knowledge-distillation"] * bool(edges)
        tags += ["ctcd", "co-distillation"] * any((other, own) in links for own, other in links)
        if is_peft_model(model):
            tags.append(str(getattr(model.active_peft_config.peft_type, "value", "adapter")).lower())
        own = {key: value for key, value in self.results.final_metrics[learner].items() if not is_agreement(key)}
        tags_of_data, data_names, args = (self.data[key] for key in ("tags", "names", "args"))
        results = [
            EvalResult(
                task_type=task,
                task_name=TASK_TAG_TO_NAME_MAPPING.get(task, task.replace("-", " ").title()),
                dataset_type=(tags_of_data or ["unknown"])[0],
                dataset_name=(data_names or ["unknown"])[0],
                dataset_config=str(args[0]) if args else None,
                dataset_split=self.data["split"],
                metric_type=key,
                metric_name=key.replace("_", " ").capitalize(),
                metric_value=value,
            )
            for task in self.tasks[:1]
            for key, value in own.items()
        ]
        return ModelCardData(
            language=self.given.get("language"),
            license=self.given.get("license"),
            library_name="peft" if is_peft_model(model) else "transformers",
            base_model=self.origin(learner).repo,
            tags=tags,
            datasets=tags_of_data or None,
            metrics=[key for key in own if key in _HUB_METRICS] or None,
            pipeline_tag=next(iter(self.tasks), None),
            model_name=self.name(learner),
            eval_results=results or None,
        )

    # ---- Text ----

    def description(self, learner: str) -> dict[str, Any]:
        """What the template says in words."""
        trainer, origin = self.trainer, self.origin(learner)
        processing_class = trainer.processing_class_of(learner)
        repository, notes = self.repository(learner), []
        code = facts.loading_code(
            self.models[learner],
            trainer.task,
            repository or ".",
            origin,
            processing_class,
            revision=self.revision if repository is not None else None,
        )
        if repository is None:
            notes.append('Run this in the folder of this card, or put the path of the folder in the place of `"."`.')
        if is_peft_model(self.models[learner]):
            notes.append("It needs the very model that the adapter was trained on, with all its layers.")
            if origin.repo is None:
                notes.append("It is not on the Hub: make or load it first, as `base_model`.")
        task = (self.tasks or [trainer.task.name])[0].replace("-", " ")
        return {
            "marker": _FULL if self.latencies.conditions else _SHORT,
            "name": self.name(learner),
            "learner": learner,
            "task": task,
            "distilled": bool(trainer.graph.edges),
            "data": " and ".join(f"the data set {name}" for name in self.data["names"]),
            "origin": origin.text,
            "partners": [
                {"learner": other, "link": self.place_of(other, learner), "origin": self.origin(other).text}
                for other in self.models.keys() - {learner}
            ],
            "code": code,
            "code_note": " ".join(notes),
            "method": self.method(),
            "amount": self.amount(),
            "arguments": facts.training_arguments(self.args),
            "arguments_class": type(self.args).__name__,
            "use": self.use(learner, task),
            "versions": facts.framework_versions(any(map(is_peft_model, self.models.values()))),
        }

    def method(self) -> list[str]:
        """Who has learnt from whom."""
        graph, distillation, lines = self.trainer.graph, self.trainer.distillation, []
        for name in self.models:
            hard = graph.hard_weights.get(name, 0.0)
            sources = [f"the labels (weight {hard:g})"] * bool(hard)
            for edge in graph.edges:
                if edge.learner == name:
                    source = "a frozen pre-trained model" if edge.source == PRETRAINED else f"the {edge.source}"
                    sources.append(f"the predictions of {source} (weight {edge.weight:g})")
            learns = f"learns from {' and from '.join(sources)}" if sources else "is frozen, and was not changed"
            lines.append(f"The {name} {learns}.")
        if graph.edges:
            how = f"by `{distillation.soft_loss}`, at temperature {distillation.temperature:g}"
            how = "by a function of the user" if self.trainer.soft_loss_func is not None else how
            lines.append(f"Predictions are compared {how} (mode `{distillation.distillation_mode}`).")
        return lines

    def amount(self) -> str:
        """How long was trained, and on how much."""
        state, rows = self.trainer.state, self.trainer.train_dataset
        if not state.global_step:
            return "Nothing was trained by this trainer."
        text = f"{state.global_step:,} optimizer steps"
        text += f", {state.epoch:.2f} epochs" if state.epoch else ""
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        text += f", with {batch} rows in each step" + (f" of {len(rows):,} rows" if isinstance(rows, Sized) else "")
        return f"{text}; learning rate {self.args.learning_rate:g}, seed {self.args.seed}."

    def use(self, learner: str, task: str) -> str:
        """What the model is for, and what is not known of it."""
        text = f"For {task}, on data like those that it was trained on: for other data, measure it first. "
        if not self.results.final_metrics[learner]:
            text += "It was not evaluated. "
        text += "Whether it is fair, robust or safe was not measured. "
        text += "What the training data have of errors and prejudices, it may have as well"
        return f"{text}, and so may what it has learnt from its partner." if self.trainer.graph.edges else f"{text}."

    # ---- Tables and pictures ----

    def numbers(self, learner: str) -> dict[str, Any]:
        """The tables and pictures of the template."""
        final = self.results.final
        return {
            "final_table": tables.final_table(self.results, learner),
            "final_when": f"at step {final.step:,}" if final is not None else "",
            "agreement": tables.agreement(self.results),
            "baseline_table": tables.gain_table(self.results, self.baseline, learner),
            "lower": ", ".join(filter(lower_is_better, self.baseline.get(learner, {}))).replace("_", " "),
            "size_table": tables.size_table(
                learner,
                {name: count_parameters(model) for name, model in self.models.items()},
                {name: weight_bytes(self.folder(name)) for name in self.models},
                self.latencies.milliseconds,
            ),
            "latency": self.latencies.conditions,
            "evaluations_table": tables.evaluations_table(self.results),
            **{
                key: {"file": name, "text": self.pictures[name]} if name in self.pictures else None
                for key, name in (("curves", CURVES), ("comparison", COMPARISON))
            },
        }
