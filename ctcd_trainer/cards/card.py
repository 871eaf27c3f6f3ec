"""Model cards: a `README.md` for each learner of a run, with metadata that the Hub understands."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Template
from transformers import PreTrainedTokenizerBase
from transformers.modelcard import METRIC_TAGS, TASK_TAG_TO_NAME_MAPPING
from transformers.utils import logging

from ..graph import PRETRAINED
from ..model_structure import base_model, count_parameters, forward_parameters, is_peft_model
from ..pair.bases import has_own_base
from ..students.costs import Latencies, weight_bytes
from ..tasks.labels import own_labels
from .facts import NOT_MEASURED, CardFacts, repo_id
from .figures import draw_curves
from .results import Metrics, baseline_of, heads, is_agreement, markdown_table, words

logger = logging.get_logger(__name__)

FILE = "README.md"
FIGURE = "learning_curves.png"
#: Every card begins with this text until somebody edits it: a push may replace such a card on the Hub.
MARKER = "ctcd_trainer has written this"
#: The beginning of a card that the next save may replace.
_SHORT = f"{MARKER} short card"
#: The title of the empty card that PEFT writes beside each adapter.
_PEFT_STUB = "# Model Card for Model ID"
#: Metrics that the Hub knows by these names.
_HUB_METRICS = frozenset({*METRIC_TAGS, "exact_match", "mae", "mse", "perplexity"})


@dataclass(frozen=True)
class CardOptions:
    """The arguments of `Trainer.create_model_card`, in its order, and two more.

    Attributes:
        language, license, tags, tasks, dataset_tags, dataset, dataset_args: As in Trainer.
        model_name: Title of the primary learner's card; another learner's is the name of its repository, or else
            `<model_name>-<learner>`.
        finetuned_from: The model that the primary learner started from; or a dict by learner, with an empty name for
            random weights. By default the config of each model tells.
        baseline: Metrics of models that were trained in another way; see `baseline_of`.
        revision: Branch of the repositories that the cards are for; by default `hub_revision`.
    """

    language: str | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | Mapping[str, str | None] | None = None
    tasks: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    dataset_args: str | list[str] | None = None
    baseline: Any = None
    revision: str | None = None


def write_model_cards(
    facts: CardFacts, folder: str | os.PathLike, options: CardOptions = CardOptions(), complete: bool = True
) -> None:
    """Write the card of each learner beside its model, in place of any that is there.

    Args:
        facts: The facts to state.
        folder: Output folder: the primary learner's, with a folder for each other learner.
        options: The user's additions.
        complete: Whether to time the models and draw the figure. A card without these is replaced by the next save.

    Raises:
        ValueError: `baseline` or `finetuned_from` does not fit the learners.
    """
    names, origins = list(facts.learners), options.finetuned_from
    if isinstance(origins, Mapping) and set(origins) - set(names):
        raise ValueError(
            f"`finetuned_from` names {sorted(set(origins) - set(names))}, but the models are {names}: use these names."
        )
    baseline = baseline_of(options.baseline, names) if options.baseline is not None else {}
    folders = _folders(facts, Path(folder))
    latencies = facts.measured() if complete else NOT_MEASURED
    metric = facts.results.main_metric(facts.args.metric_for_best_model)
    figure = draw_curves(facts.results, metric, baseline) if complete else None
    for learner in names:
        _Card(facts, learner, folders, options, baseline, latencies, figure).write()


def save_model_cards(facts: CardFacts, folder: str | os.PathLike, only: str | None = None) -> None:
    """Write short cards beside models that were just saved. Cards that are complete or edited stay.

    A card that cannot be made is no reason to lose a checkpoint: then there is a warning.

    Args:
        facts: The facts to state.
        folder: Output or checkpoint folder.
        only: The learner to which the whole folder belongs, if it is not a folder of all learners.

    Raises:
        OSError: The files could not be written.
    """
    folders = _folders(facts, Path(folder)) if only is None else _folders(facts, Path(folder).parent)
    folders |= {} if only is None else {only: Path(folder)}
    try:
        for learner in facts.learners if only is None else [only]:
            path = folders[learner] / FILE
            text = path.read_text(encoding="utf-8") if path.exists() else _SHORT
            if _SHORT in text or _PEFT_STUB in text:
                _Card(facts, learner, folders).write()
    except OSError:
        raise
    except Exception as error:
        logger.warning("The model cards in %s could not be written: %r", folder, error)


def _folders(facts: CardFacts, root: Path) -> dict[str, Path]:
    return {name: root if name == facts.primary else root / name for name in facts.learners}


@cache  # compiling takes longer than all the rest of a short card
def _template() -> Template:
    return Template(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Card:
    """The card of one learner; the template reads it.

    Attributes:
        facts: The facts to state.
        learner: Name of the learner.
        folders: Folders of all learners.
        options: The user's additions.
        baseline: Metrics of models that were trained in another way.
        latencies: Measured times, or why they are missing; empty on a short card.
        figure: The figure as a PNG file, with its alternative text.
    """

    facts: CardFacts
    learner: str
    folders: Mapping[str, Path]
    options: CardOptions = CardOptions()
    baseline: Metrics = field(default_factory=dict)
    latencies: Latencies = NOT_MEASURED
    figure: tuple[bytes, str] | None = None

    def write(self) -> None:
        """Write the card, and its figure if there is one."""
        folder = self.folders[self.learner]
        folder.mkdir(parents=True, exist_ok=True)
        if self.figure is not None:
            (folder / FIGURE).write_bytes(self.figure[0])
        text = _template().render(card=self, facts=self.facts, results=self.facts.results, figure=FIGURE)
        (folder / FILE).write_text(text.rstrip() + "\n", encoding="utf-8")

    @property
    def marker(self) -> str:
        """The comment by which a later save or push knows the card."""
        return f"{MARKER} card." if self.latencies.conditions else f"{_SHORT} while saving the model."

    @property
    def name(self) -> str:
        """Title of the card."""
        name = self.options.model_name or Path(self.facts.args.output_dir).absolute().name
        if self.learner == self.facts.primary:
            return name
        repository = self.facts.repository(self.learner)
        return repository.split("/")[-1] if repository is not None else f"{name}-{self.learner}"

    @property
    def has_base(self) -> bool:
        """Whether an adapter is saved with its base."""
        return has_own_base(self.folders[self.learner])

    @property
    def tasks(self) -> list[str]:
        """The Hub's names of the tasks."""
        return _as_list(self.options.tasks or self.facts.task.pipeline_tag)

    @property
    def dataset_tags(self) -> list[str]:
        """Names of the data sets on the Hub."""
        return [tag for tag in _as_list(self.options.dataset_tags) if repo_id(tag) is not None]

    @property
    def dataset_names(self) -> list[str]:
        """Names of the data sets for people; of a path, its last part."""
        return [_without_folder(name) for name in _as_list(self.options.dataset)] or self.dataset_tags

    def origin(self, learner: str) -> tuple[str | None, str]:
        """The repository that a learner's weights came from, if they did, and a sentence about it."""
        given, model = self.options.finetuned_from, self.facts.learners[learner]
        given = given if isinstance(given, Mapping) else {} if given is None else {self.facts.primary: given}
        name = (given[learner] or "") if learner in given else self.facts.started_from(learner)
        repository, adapter = repo_id(name), is_peft_model(model)
        what = f"It is {'an adapter of ' * adapter}a `{type(base_model(model)).__name__}`"
        if not name:
            return None, f"{what} {'with random weights' if adapter else 'that was trained from scratch'}."
        source = _link(repository) if repository is not None else "a model that is not on the Hub"
        return repository, f"{what} that started from the weights of {source}."

    def link_to(self, partner: str) -> str:
        """A link to another learner."""
        repository = self.facts.repository(partner)
        if repository is not None:
            return _link(repository)
        path = os.path.relpath(self.folders[partner], self.folders[self.learner])
        return f"in the folder [`{path}`]({path}/{FILE})"

    def sources(self, learner: str) -> list[str]:
        """Describe what a learner learns from; empty if it is frozen."""
        graph = self.facts.distillation.graph
        weight = graph.hard_weights.get(learner, 0.0)
        sources = [f"the labels (weight {weight:g})"] * bool(weight)
        for edge in (*graph.edges, *graph.features):
            if edge.learner == learner:
                source = "a frozen pre-trained model" if edge.source == PRETRAINED else f"the {edge.source}"
                own = ["weight from held-out rows" if edge.auto else f"weight {edge.weight:g}"]
                own += [f"schedule {edge.schedule}"] * (edge.schedule != "constant")
                own += [f"gate {edge.gate}"] * (edge.gate != "none")
                what = "layers" if edge in graph.features else "predictions"
                sources.append(f"the {what} of {source} ({', '.join(own)})")
        return sources

    def metadata(self) -> ModelCardData:
        """The block at the head of the card."""
        facts, options = self.facts, self.options
        model, edges = facts.learners[self.learner], facts.distillation.graph.edges
        links = {(edge.source, edge.learner) for edge in edges}
        tags = [*_as_list(options.tags), "generated_from_trainer", *["knowledge-distillation"] * bool(edges)]
        tags += ["ctcd", "co-distillation"] * any((learner, source) in links for source, learner in links)
        if is_peft_model(model):
            tags.append(str(getattr(model.active_peft_config.peft_type, "value", "adapter")).lower())
        metrics = facts.results.final_metrics[self.learner]
        metrics = {key: value for key, value in metrics.items() if not is_agreement(key)}
        config = _as_list(options.dataset_args)
        results = [
            EvalResult(
                task_type=task,
                task_name=TASK_TAG_TO_NAME_MAPPING.get(task, task.replace("-", " ").title()),
                dataset_type=(self.dataset_tags or ["unknown"])[0],
                dataset_name=(self.dataset_names or ["unknown"])[0],
                dataset_config=_without_folder(str(config[0])) if config else None,
                metric_type=key,
                metric_name=words(key).capitalize(),
                metric_value=value,
            )
            for task in self.tasks[:1]
            for key, value in metrics.items()
        ]
        return ModelCardData(
            language=options.language,
            license=options.license,
            library_name="peft" if is_peft_model(model) else "transformers",
            base_model=self.origin(self.learner)[0],
            tags=tags,
            datasets=self.dataset_tags or None,
            metrics=[key for key in metrics if key in _HUB_METRICS] or None,
            pipeline_tag=next(iter(self.tasks), None),
            model_name=self.name,
            eval_results=results or None,
        )

    def code(self) -> str | None:
        """Python code that loads the model; `None` if its class is the user's own.

        An adapter whose base is saved with it loads as a whole model does. For another adapter of a model that is not
        on the Hub, the code expects that model as `base_model`.
        """
        facts = self.facts
        model, processing_class = facts.learners[self.learner], facts.processing_classes.get(self.learner)
        kind = type(base_model(model))
        adapter = is_peft_model(model) and not self.has_base
        base, repository = self.origin(self.learner)[0], facts.repository(self.learner)
        loader = getattr(facts.task, "auto_model", kind)
        if not hasattr(model, "config") or (loader is kind and not kind.__module__.startswith("transformers.")):
            return None
        revision = (self.options.revision or facts.args.hub_revision) if repository is not None else None
        where = f'"{repository or "."}"' + (f', revision="{revision}"' if revision else "")
        loader, imports, lines = loader.__name__, [], []
        if base is not None or not adapter:
            names = own_labels(model.config)
            named = f"id2label={dict(enumerate(names))!r}" if names else f"num_labels={model.config.num_labels}"
            labels = f", {named}" if "Classification" in loader else ""
            place = f'"{base}"{labels}' if adapter else where
            imports.append(loader)
            lines.append(f"{'base_model' if adapter else 'model'} = {loader}.from_pretrained({place})")
        if adapter:
            lines.append(f"model = PeftModel.from_pretrained(base_model, {where})")
        tokenized = isinstance(processing_class, PreTrainedTokenizerBase)
        if type(processing_class).__module__.startswith("transformers."):
            # `AutoProcessor` would not load a feature extractor alone.
            imports.append("AutoTokenizer" if tokenized else type(processing_class).__name__)
            lines.append(f"{'tokenizer' if tokenized else 'processor'} = {imports[-1]}.from_pretrained({where})")
        tag = facts.task.pipeline_tag
        classifies = tokenized and tag in ("text-classification", "token-classification")
        if classifies and set(processing_class.model_input_names) <= forward_parameters(model):
            imports.append("pipeline")
            lines.append(f'classify = pipeline("{tag}", model=model, tokenizer=tokenizer)')
            lines.append('print(classify("Put your own text here."))')
        head = ["from peft import PeftModel"] * adapter
        head += [f"from transformers import {', '.join(sorted(imports))}"] * bool(imports)
        return "\n".join([*head, "", *lines])

    def size_table(self) -> str:
        """Parameters, size on disk and, if measured, latency of all learners."""
        models, times = self.facts.learners, self.latencies.milliseconds
        rows = []
        for head, (name, model) in zip(heads(models, self.learner), models.items(), strict=True):
            size = weight_bytes(self.folders[name])
            row = [head, f"{count_parameters(model) / 1e6:.4g}", f"{size / 1e6:.4g}" if size else "not saved"]
            rows.append([*row, f"{times[name]:.4g}"] if times else row)
        return markdown_table(["model", "parameters (M)", "on disk (MB)", *["latency (ms)"] * bool(times)], rows)


def _link(repository: str) -> str:
    return f"[{repository}](https://huggingface.co/{repository})"


def _without_folder(name: str) -> str:
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or os.path.exists(name) else name


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
