"""Training arguments of co-distillation: the weights of the graph, the soft loss and the per-model optimisation."""

import copy
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import TrainingArguments

from .edges import AUTO, GATES, POOLS, SCHEDULES, check_setting, read_edges, read_members, setting_of
from .feature_losses import FEATURE_LOSSES, parse_layers
from .graph import (
    AVERAGE,
    EDGES,
    ENSEMBLE,
    LEARNERS,
    MADE_EDGES,
    MODES,
    PRETRAINED,
    STUDENT,
    TEACHER,
    Edge,
    FeatureEdge,
    Graph,
    copied_learner,
)
from .recipes import RECIPES
from .soft_losses import SOFT_LOSSES

#: Values of the argument `share`; `LAYERS` is followed by a number.
EMBEDDINGS, PREFIX, LAYERS = "embeddings", "prefix", "layers:"
#: The arguments of `TrainingArguments` that can be set for one learner, as `<learner>_<name>`.
PER_LEARNER = ("learning_rate", "weight_decay", "max_grad_norm")

#: The metrics whose direction is known, by the last words of their names. Key: whether a larger value is better.
DIRECTIONS: dict[bool, str] = {
    True: "accuracy acc agreement ap auc auprc auroc bertscore bleu bleurt chrf combined_score comet correlation "
    "dice em exact exact_match f1 f_beta fbeta hits iou jaccard kappa kendall kendalltau log_likelihood map matthews "
    "mcc meteor miou mrr ndcg npv pass pearson pearsonr ppv precision psnr r2 recall reward rewards rouge rougel "
    "rougelsum sacrebleu sensitivity similarity spearman spearmanr specificity ssim success tnr tpr win",
    False: r"\w*loss bits_per_byte bits_per_character bpb bpc brier cer cross_entropy crossentropy der deviance "
    "distance divergence ece eer error errors fid fnr fpr hamming kl mae mape mase mer mse msle "
    "negative_log_likelihood neg_log_likelihood nll perplexity ppl rmse rmsle runtime smape ter wer wil",
}
#: Words after the name of a metric that leave its direction as it is: `f1_macro`, `error_rate`, `recall@10`.
_QUALIFIERS = r"(_(at|average|avg|binary|k|macro|mean|micro|mm|norm|overall|rate|samples|score|top|weighted|\d+))*"
_DIRECTIONS = {
    greater: re.compile(rf"(.*_)?({'|'.join(names.split())})\d*{_QUALIFIERS}") for greater, names in DIRECTIONS.items()
}


def greater_is_better(metric: str) -> bool | None:
    """Tell whether a larger value of a metric is a better one.

    Args:
        metric: Its name, which may begin with `eval_`, a learner or a data set.

    Returns:
        `None` if the direction is not known (`DIRECTIONS`), or turned round (`neg_mean_squared_error`).
    """
    name = re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_")
    if re.search(r"(^|_)(inverse|neg|negative)_(?!log_likelihood)", name):
        return None
    return next((greater for greater in (False, True) if _DIRECTIONS[greater].fullmatch(name)), None)


def _known_direction(argument: str, metric: str, direction: str) -> bool:
    """Return the direction of a metric; raise `ValueError` if it has to be given as the argument `direction`."""
    greater = greater_is_better(metric)
    if greater is None:
        raise ValueError(
            f"`{argument}={metric!r}`, and it is not known whether a larger value of it is a better one. Set "
            f"`{direction}` to True or False (it is None)."
        )
    return greater


class ModeDefault(float):
    """A number that nobody gave: a weight follows the mode when that is changed (`dataclasses.replace`, a search)."""


class AutoDefault(str):
    """The weight `auto` that the argument `edges` has filled in: it follows that argument."""


def parse_share(share: str) -> int | None:
    """Number of shared layers: 0 if only the embeddings are shared, `None` for all layers of the student.

    Raises:
        ValueError: The value is unknown.
    """
    if share == EMBEDDINGS:
        return 0
    if share == PREFIX:
        return None
    number = share.removeprefix(LAYERS)
    if share.startswith(LAYERS) and number.isdecimal() and int(number) > 0:
        return int(number)
    raise ValueError(
        f"`share={share!r}` is unknown. Valid values: {EMBEDDINGS}, {LAYERS}K with K of 1 or more, {PREFIX}."
    )


def _argument(default: Any, text: str, choices: Collection[str] | None = None) -> Any:
    """A field with a help text; with `choices`, a table whose keys are the valid values.

    The command line reads the table when a parser is made, so that it knows the keys that were added to it.
    """
    return field(default=default, metadata={"help": text} | ({} if choices is None else {"choices": choices}))


def _summaries(table: Mapping[str, Any]) -> str:
    return " ".join(f"`{name}`: {entry.summary}." for name, entry in table.items())


def _described(table: Mapping[str, str]) -> str:
    return " ".join(f"`{name}`: {text}." for name, text in table.items())


def _weight(learner: str, source: str) -> Any:
    return _argument(
        None,
        f"Weight of the loss that trains the {learner} on the {source}; `auto` sets it from held-out rows at each "
        "evaluation. Default: set by the mode.",
    )


def _schedule(learner: str, source: str) -> Any:
    forms = " ".join(f"`{schedule.form}`: {schedule.summary}." for schedule in SCHEDULES.values())
    text = f"Factor of `{learner}_from_{source}_weight` over the steps. {forms} Default: `soft_warmup_ratio`."
    return _argument(None, text.replace("%", "%%"))


def _gate(learner: str, source: str) -> Any:
    text = f"Factor of each item in the loss that trains the {learner} on the {source}. {_summaries(GATES)}"
    return _argument(None, text, GATES)


@dataclass
class DistillationArguments:
    """The arguments of co-distillation alone, to be mixed into any `TrainingArguments` class.

    Directions are named after the model that learns: `student_from_teacher_weight` weighs the loss that trains the
    student on the teacher's predictions.

    Raises:
        ValueError: An argument is out of range or unknown, contradicts another one, or has no effect in this mode; or
            no weight is above 0.
    """

    distillation_mode: str = _argument(
        "ctcd", f"Who learns from whom. {_summaries(MODES)} Sets the soft weights that are not given.", MODES
    )
    recipe: str | None = _argument(
        None,
        f"Arguments that go together. {_summaries(RECIPES)} What you set yourself stays. Default: none.",
        RECIPES,
    )
    teacher_hard_weight: float = _argument(1.0, "Weight of the teacher's own task loss.")
    student_hard_weight: float = _argument(1.0, "Weight of the student's own task loss.")
    student_from_teacher_weight: float | str | None = _weight("student", "teacher")
    teacher_from_student_weight: float | str | None = _weight("teacher", "student")
    student_from_pretrained_weight: float | str | None = _weight("student", "pretrained")
    teacher_from_pretrained_weight: float | str | None = _weight("teacher", "pretrained")
    student_from_teacher_schedule: str | None = _schedule("student", "teacher")
    teacher_from_student_schedule: str | None = _schedule("teacher", "student")
    student_from_pretrained_schedule: str | None = _schedule("student", "pretrained")
    teacher_from_pretrained_schedule: str | None = _schedule("teacher", "pretrained")
    student_from_teacher_gate: str | None = _gate("student", "teacher")
    teacher_from_student_gate: str | None = _gate("teacher", "student")
    student_from_pretrained_gate: str | None = _gate("student", "pretrained")
    teacher_from_pretrained_gate: str | None = _gate("teacher", "pretrained")
    edges: dict | str | None = _argument(  # noqa: RUF009
        None,
        "All settings of edges, a dict or JSON: weight, schedule, gate, rows (all, labelled, unlabelled), temperature "
        'and soft_loss, as {"student->teacher": {"weight": "auto", "rows": "all", "temperature": 2.0}}.',
    )
    ensemble: dict | str | None = _argument(  # noqa: RUF009
        None,
        "Weights of the members of the source `ensemble` of `edges`, a dict or JSON by name (teacher, student, "
        "pretrained), or `auto`: those with the least error on held-out rows. Default: equal weights of the learners.",
    )
    ensemble_of: str = _argument("logits", f"The mean that the ensemble is. {_described(POOLS)}", POOLS)
    average_decay: float = _argument(
        0.999, "Decay, at each step, of the averages of weights that are sources of `edges` (`teacher_average`, ...)."
    )
    temperature: float = _argument(
        1.0, "Temperature of the soft losses, which are multiplied by its square to keep their scale."
    )
    soft_loss: str = _argument("kl", f"How predictions are compared. {_summaries(SOFT_LOSSES)}", SOFT_LOSSES)
    soft_warmup_ratio: float = _argument(
        0.0,
        "Share of the steps over which the soft weights rise linearly from 0: the schedule `rise` of all edges "
        "without another schedule.",
    )
    student_feature_weight: float = _argument(
        0.0, "Weight of the loss that pulls the layers of the student towards those of the teacher."
    )
    feature_loss: str = _argument("hidden", f"How layers are compared. {_summaries(FEATURE_LOSSES)}", FEATURE_LOSSES)
    feature_layers: str | None = _argument(
        None,
        "The layers that are compared, the student's before the teacher's, from 0: `0:1,1:3,2:5`. Default: for hidden "
        "states, each layer of the student with the end of the span that it replaces; otherwise the last layers.",
    )
    feature_source: str = _argument(
        TEACHER,
        "The model whose layers the student learns from: the `teacher`, or the frozen `pretrained` teacher.",
        (TEACHER, PRETRAINED),
    )
    student_learning_rate: float | None = _argument(
        None, "Initial learning rate of the student. Default: `learning_rate`."
    )
    student_weight_decay: float | None = _argument(None, "Weight decay of the student. Default: `weight_decay`.")
    student_max_grad_norm: float | None = _argument(
        None, "Norm to which the student's gradients are clipped, 0 for no clipping. Default: `max_grad_norm`."
    )
    warm_start_epochs: float | None = _argument(
        None,
        "Number of epochs for which the teacher is trained alone, before the student is made from it and both are "
        "trained for `num_train_epochs`. Default: 0.",
    )
    warm_start_steps: int = _argument(
        0, "The same as a number of optimizer steps; above 0 it overrides `warm_start_epochs`."
    )
    warm_start_learning_rate: float | None = _argument(
        None, "Initial learning rate of the teacher while it is trained alone. Default: `learning_rate`."
    )
    share: str | None = _argument(
        None,
        "Parts that the student has in common with the teacher, with the teacher's weights: `embeddings`, `layers:K` "
        "for these and the K lowest layers, or `prefix` for these and all layers of the student. Default: nothing.",
    )
    fused_lm_head: bool = _argument(
        True,
        "Whether language models compute all losses in one chunked pass over the scored positions, without the logits "
        "of all positions. Models that do not allow it use whole logits.",
    )
    pretrained_cache_dir: str | None = _argument(
        None,
        "Folder for the predictions of the frozen pre-trained teacher, so that later epochs and later trainings do "
        "not run it. Default: it runs on every batch.",
    )
    student_metric_for_best_model: str | None = _argument(
        None,
        "Metric of the student, such as `loss` or `accuracy`. The student that is best by it is kept in "
        "`best-student/`, beside the checkpoints. Default: none is kept.",
    )
    student_greater_is_better: bool | None = _argument(
        None,
        "Whether a larger `student_metric_for_best_model` is a better one. Default: known by the name of the metric "
        "(`perplexity`, `accuracy`); for another metric it must be given.",
    )
    student_hub_model_id: str | None = _argument(
        None, "Repository of the student alone on the Hub. Default: `<hub_model_id>-student`."
    )

    def __post_init__(self) -> None:
        #: The arguments that the recipe has set.
        self.by_recipe: set[str] = set()
        #: A line for each argument that the recipe has set or left, with the reason.
        self.recipe_log: list[str] = []
        if self.recipe is not None:
            self._follow_recipe()
        self.check()
        metric = getattr(self, "metric_for_best_model", None)
        if metric is not None and self.greater_is_better is None:  # Trainer would look for "loss" at its end
            self.greater_is_better = _known_direction("metric_for_best_model", metric, "greater_is_better")
        parent = super()
        if hasattr(parent, "__post_init__"):  # the `TrainingArguments` that this class is mixed into
            parent.__post_init__()

    def _follow_recipe(self) -> None:
        """Set what the recipe sets and the user has left at its default.

        Raises:
            ValueError: The recipe is unknown.
        """
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe={self.recipe!r}` is unknown. Valid values: {', '.join(sorted(RECIPES))}.")
        defaults = {each.name: each.default for each in fields(self)}
        for setting in RECIPES[self.recipe].settings:
            value, name = setting.value_for(self), setting.name
            if value is None or name not in defaults:
                self.recipe_log += [setting.left_out] if setting.left_out and name in defaults else []
                continue
            old = getattr(self, name)
            # The same value may come from `dataclasses.replace` of arguments with this recipe.
            if old in (defaults[name], value) or isinstance(old, ModeDefault):
                setattr(self, name, value)
                self.by_recipe.add(name)
                self.recipe_log.append(f"`{name}={value!r}`: {setting.reason}.")
            else:
                self.recipe_log.append(f"`{name}={old!r}` is yours and stays; the recipe has {value!r}.")

    def check(self) -> None:
        """Fill in the weights that the mode sets, and check all arguments of co-distillation.

        Raises:
            ValueError: See the class.
        """
        tables = {"distillation_mode": MODES, "soft_loss": SOFT_LOSSES, "feature_loss": FEATURE_LOSSES}
        for name, table in (tables | {"feature_source": (TEACHER, PRETRAINED), "ensemble_of": POOLS}).items():
            if getattr(self, name) not in table:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is unknown. Valid values: {', '.join(sorted(table))}."
                )
        self.edges = read_edges(self.edges) or None
        self.ensemble = read_members(self.ensemble)
        for edge in EDGES:
            setattr(self, edge.weight_name, self._weight(edge))
        if self.warm_start_epochs is None:
            self.warm_start_epochs = ModeDefault(0.0)
        self._check_numbers()
        self._check_frozen()
        for edge in EDGES:
            self._check_edge(edge)
        self._check_made_edges()
        if self.share is not None:
            parse_share(self.share)
        self._check_features()
        # Each of these has an effect only together with another one.
        if self.pretrained_cache_dir is not None and not self.graph.uses_pretrained:
            raise ValueError(
                f"`pretrained_cache_dir={self.pretrained_cache_dir!r}` has no effect: with `distillation_mode="
                f"'{self.distillation_mode}'` and its weights no model learns from a frozen pre-trained teacher. "
                "Leave it out, or set `distillation_mode='community'` or a weight `..._from_pretrained_weight`."
            )
        if self.warm_start_learning_rate is not None and not self.warm_start:
            raise ValueError(
                f"`warm_start_learning_rate={self.warm_start_learning_rate}` has no effect with `warm_start_epochs=0` "
                "and `warm_start_steps=0`. Set one of them, or leave it out."
            )
        metric = self.student_metric_for_best_model
        if metric is not None and self.student_greater_is_better is None:
            _known_direction("student_metric_for_best_model", metric, "student_greater_is_better")
        if self.student_greater_is_better is not None and metric is None:
            raise ValueError(
                f"`student_greater_is_better={self.student_greater_is_better}` has no effect without "
                "`student_metric_for_best_model` (None). Set both, or leave it out."
            )

    def _check_features(self) -> None:
        """Refuse arguments of the feature loss that have no effect, or contradict others."""
        if self.feature_layers is not None:
            parse_layers(self.feature_layers)
        defaults = {"feature_loss": "hidden", "feature_layers": None, "feature_source": TEACHER}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if changed and not self.graph.features:
            raise ValueError(
                f"`{changed[0]}={getattr(self, changed[0])!r}` has no effect with `student_feature_weight="
                f"{self.student_feature_weight}`. Set that weight above 0 (1.0 suits every model), or leave it out."
            )
        if not self.graph.features:
            return
        weight = f"`student_feature_weight={self.student_feature_weight}`"
        if self.share not in (None, EMBEDDINGS):
            raise ValueError(
                f"{weight} and `share={self.share!r}`: the student has layers of the teacher, which are the same "
                f"already. Leave one of them out, or set `share={EMBEDDINGS!r}`."
            )
        if self.feature_source == PRETRAINED and self.pretrained_cache_dir is not None:
            raise ValueError(
                f"`feature_source={PRETRAINED!r}` takes the layers of the frozen teacher, and `pretrained_cache_dir="
                f"{self.pretrained_cache_dir!r}` keeps its predictions alone. Leave one of them out."
            )

    def _check_numbers(self) -> None:
        """Check the range of every number, and make floats of them: a search gives a new value the old one's type."""
        ranges = {f"{learner}_hard_weight": "of 0 or more" for learner in LEARNERS}
        ranges |= {edge.weight_name: "of 0 or more" for edge in EDGES if getattr(self, edge.weight_name) != AUTO}
        ranges |= {"temperature": "above 0", "soft_warmup_ratio": "from 0 to 1.0", "warm_start_epochs": "of 0 or more"}
        ranges["student_feature_weight"] = "of 0 or more"
        ranges["average_decay"] = "from 0 to 1.0"
        optional = [f"{learner}_{name}" for learner in LEARNERS for name in PER_LEARNER] + ["warm_start_learning_rate"]
        ranges |= {name: "of 0 or more" for name in optional if getattr(self, name, None) is not None}
        for name, valid in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "temperature" and not value) or (valid[:4] == "from" and value > 1):
                auto = f", or {AUTO!r}" if "_from_" in name else ""
                raise ValueError(f"`{name}={value!r}` is not valid: it must be a finite number {valid}{auto}.")
            if isinstance(value, int):
                setattr(self, name, float(value))
        steps = self.warm_start_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"`warm_start_steps={steps!r}` is not valid: it must be a whole number of 0 or more.")

    def _check_frozen(self) -> None:
        """Refuse what would train a learner that the mode freezes, and weights that train nothing."""
        trained = MODES[self.distillation_mode].trained
        weights = [(f"{learner}_hard_weight", learner, 1.0) for learner in LEARNERS]
        weights.append(("student_feature_weight", STUDENT, 0.0))
        for name, learner, default in [*weights, *((edge.weight_name, edge.learner, 0.0) for edge in EDGES)]:
            if getattr(self, name) not in (default, 0.0) and learner not in trained:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` has no effect: `distillation_mode='{self.distillation_mode}'` "
                    f"freezes the {learner}. Leave the weight out or choose a mode that trains the {learner}."
                )
        if not self.graph.trained:
            raise ValueError(
                f"Nothing would be trained: all weights of the models that `distillation_mode="
                f"'{self.distillation_mode}'` trains ({', '.join(trained)}) are 0. Set at least one hard, soft "
                "or feature weight above 0."
            )
        if self.share is not None and self.graph.frozen:
            raise ValueError(
                f"`share={self.share!r}` is for models that are all trained, and `distillation_mode="
                f"'{self.distillation_mode}'` with its weights freezes the {self.graph.frozen[0]}. Choose another "
                "mode, or leave it out."
            )

    def _check_edge(self, edge: Edge) -> None:
        """Refuse settings of an edge that are not valid, or have no effect."""
        for setting in ("schedule", "gate"):
            name = f"{edge.name}_{setting}"
            if getattr(self, name) is not None:
                check_setting(setting, getattr(self, name), name)
        given = self.settings_of(edge).keys() - {"weight"}
        weight = getattr(self, edge.weight_name)
        if given and not weight:
            own = [f"{edge.name}_{setting}" for setting in ("schedule", "gate")]
            named = next((name for name in own if getattr(self, name) is not None), f"edges[{edge.arrow!r}]")
            learning = ", ".join(edge.arrow for edge in self.graph.edges) or "none"
            raise ValueError(
                f"`{named}` has no effect: `{edge.weight_name}` is {weight:g} with `distillation_mode="
                f"'{self.distillation_mode}'`. Set the weight, or leave the setting out. With a weight: {learning}."
            )
        self._check_auto(edge, weight)

    def _check_auto(self, edge: Edge, weight: Any) -> None:
        """Refuse a weight from held-out rows of a learner without a hard loss, of which it is a multiple."""
        hard = f"{edge.learner}_hard_weight"
        if weight == AUTO and not getattr(self, hard):
            raise ValueError(
                f"`{edge.weight_name}='{AUTO}'` is a multiple of `{hard}`, which is 0. Set one of them to a number "
                "above 0."
            )

    def _check_made_edges(self) -> None:
        """Refuse edges from the ensemble and from copies of learners that are not valid, and settings without them."""
        given = [edge for edge in MADE_EDGES if edge.arrow in (self.edges or {})]
        for edge in given:
            self._check_auto(edge, self.edges[edge.arrow].get("weight"))
            if edge.learner not in MODES[self.distillation_mode].trained:
                raise ValueError(
                    f"`edges[{edge.arrow!r}]` has no effect: `distillation_mode='{self.distillation_mode}'` freezes "
                    f"the {edge.learner}. Leave the edge out or choose a mode that trains the {edge.learner}."
                )
            if edge.source == ENSEMBLE and self.edges[edge.arrow].get("weight") == AUTO:
                raise ValueError(
                    f"`edges[{edge.arrow!r}]['weight']='{AUTO}'` is not valid: held-out rows set the weights of its "
                    f"members. Give the edge a number, and set `ensemble='{AUTO}'`."
                )
        sources = {edge.source for edge in given}
        known = (*LEARNERS, PRETRAINED)
        unknown = [name for name in self.ensemble if name not in known] if isinstance(self.ensemble, dict) else []
        if unknown:
            raise ValueError(f"`ensemble` has the unknown member {unknown[0]!r}. Valid names: {', '.join(known)}.")
        unused = {
            "ensemble": self.ensemble is not None and ENSEMBLE not in sources,
            "ensemble_of": self.ensemble_of != "logits" and ENSEMBLE not in sources,
            "average_decay": self.average_decay != 0.999 and not any(s.endswith(f"_{AVERAGE}") for s in sources),
        }
        for name, no_effect in unused.items():
            if no_effect:
                example = f"{ENSEMBLE}->student" if name != "average_decay" else f"teacher_{AVERAGE}->student"
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no effect without an edge such as `edges={{'{example}': "
                    "{'weight': 1.0}}`. Add the edge, or leave it out."
                )

    def _weight(self, edge: Edge) -> float | str:
        """Weight of an edge: the one that was given, or the one of the mode."""
        weight = getattr(self, edge.weight_name)
        if isinstance(weight, str) and weight != AUTO:  # from the command line
            with suppress(ValueError):
                weight = float(weight)
        given = None if isinstance(weight, (ModeDefault, AutoDefault)) else weight
        weight = setting_of(edge, "weight", self.edges or {}, given)
        if given is not None:
            return weight
        if weight is None:
            weight = MODES[self.distillation_mode].default_weight(edge.source, edge.learner)
        return AutoDefault(AUTO) if weight == AUTO else ModeDefault(weight)

    def settings_of(self, edge: Edge) -> dict[str, Any]:
        """Return the settings of an edge that were given, its weight only if it is in the argument `edges`."""
        edges = self.edges or {}
        own = dict(edges.get(edge.arrow, {}))
        for setting in ("schedule", "gate"):
            own[setting] = setting_of(edge, setting, edges, getattr(self, f"{edge.name}_{setting}"))
        return {name: value for name, value in own.items() if value is not None}

    @property
    def warm_start(self) -> bool:
        """Tell whether the teacher is trained alone before the student is made from it."""
        return self.warm_start_steps > 0 or self.warm_start_epochs > 0

    @property
    def graph(self) -> Graph:
        """The learners, their hard weights and the edges between them that these arguments describe."""
        mode = MODES[self.distillation_mode]
        hard_weights = {
            name: getattr(self, f"{name}_hard_weight") if name in mode.trained else 0.0 for name in LEARNERS
        }
        made = {edge: self.edges[edge.arrow] for edge in MADE_EDGES if edge.arrow in (self.edges or {})}
        edges = []
        for edge in (*EDGES, *made):
            weight, learner = (
                made[edge].get("weight", edge.weight) if edge in made else self._weight(edge),
                edge.learner,
            )
            weight, auto = (hard_weights[learner], True) if weight == AUTO else (float(weight), False)
            if weight <= 0:
                continue
            # On rows without a label nothing would correct what a weaker source says.
            below = (copied_learner(edge.source) or edge.source) in LEARNERS[1:] and learner == LEARNERS[0]
            settings = {
                "schedule": f"rise:{self.soft_warmup_ratio!r}" if self.soft_warmup_ratio else "constant",
                "rows": "labelled" if below and hard_weights[learner] > 0 else "all",
                **(made[edge] if edge in made else self.settings_of(edge)),
            }
            edges.append(replace(edge, **settings | {"weight": weight, "auto": auto}))
        members: dict[str, float] = {}
        if any(edge.source == ENSEMBLE for edge in edges):
            members = self.ensemble if isinstance(self.ensemble, dict) else dict.fromkeys(LEARNERS, 1.0)
            if self.ensemble == AUTO and any(edge.source == PRETRAINED for edge in edges):
                members[PRETRAINED] = 1.0
            members = {name: weight / sum(members.values()) for name, weight in members.items()}
        feature = FeatureEdge(self.feature_source, STUDENT, float(self.student_feature_weight))
        features = (feature,) if feature.weight > 0 and STUDENT in mode.trained else ()
        fits_members = bool(members) and self.ensemble == AUTO
        return Graph(hard_weights, tuple(edges), features, members, fits_members)


def learner_arguments(args: TrainingArguments, learner: str) -> TrainingArguments:
    """The arguments as a Trainer of one learner alone would see them.

    Args:
        args: The arguments of the co-training; they are not changed.
        learner: Name of the learner.

    Returns:
        `args` itself, or a shallow copy in which each `<learner>_<name>` that is set (`student_learning_rate`,
        `student_weight_decay`, `student_max_grad_norm`) replaces `<name>`.
    """
    view = args
    for name in PER_LEARNER:
        value = getattr(args, f"{learner}_{name}", None)
        if value is not None:
            view = copy.copy(args) if view is args else view
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
