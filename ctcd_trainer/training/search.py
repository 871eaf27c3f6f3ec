"""Hyperparameter search over the arguments of both models and of what is between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.hyperparameter_search import default_hp_search_backend
from transformers.trainer_utils import BestRun, HPSearchBackend

from ..graph import EDGES, STUDENT, TEACHER
from .computing_losses import PairLossTrainer


@dataclass(frozen=True)
class Range:
    """The values of a number that a search tries.

    Attributes:
        low: The smallest one.
        high: The largest one.
        log: Whether it is its logarithm that is drawn evenly.
    """

    low: float
    high: float
    log: bool = False


#: The default space, for the arguments that have an effect: the rates of both models, the weights of the soft losses
#: that the mode has, their temperature and their warm-up.
DEFAULT_SPACE: dict[str, Range] = {
    "learning_rate": Range(1e-5, 3e-4, log=True),
    "student_learning_rate": Range(1e-5, 1e-3, log=True),
    **{edge.weight_name: Range(0.03, 3.0, log=True) for edge in EDGES},
    "temperature": Range(1.0, 4.0),
    "soft_warmup_ratio": Range(0.0, 0.5),
}


class PairSearchTrainer(PairLossTrainer):
    """What Trainer does for hyperparameter search, for two models."""

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: str | HPSearchBackend | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search with new models in each trial (`model_init`, `student_model_init`); see Trainer.

        Args:
            hp_space: The space, as the backend takes it; by default, with Optuna or Ray, `DEFAULT_SPACE`.
            compute_objective: The objective, from the metrics of both models. By default `metric_for_best_model`,
                which may be a metric of either model; without it, the sum of the losses of the trained models.
            n_trials: Number of trials.
            direction: "minimize" or "maximize"; by default, what is better for the default objective.
            backend: "optuna", "ray" or "wandb"; by default what is installed.
            **kwargs: Other arguments of Trainer's method and of the backend.
        """
        if self.pair is not None:
            backend = HPSearchBackend(backend or default_hp_search_backend())
            if hp_space is None and backend in (HPSearchBackend.OPTUNA, HPSearchBackend.RAY):
                hp_space = self._suggest if backend == HPSearchBackend.OPTUNA else self._ray_space
            if compute_objective is None:
                compute_objective = self._objective_of
                metric = self.args.metric_for_best_model
                direction = direction or ("maximize" if metric and self.args.greater_is_better else "minimize")
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", backend, **kwargs
        )

    @property
    def _space(self) -> dict[str, Range]:
        """The part of the default space that has an effect here."""
        graph = self.graph
        without = {edge.weight_name for edge in EDGES} - {edge.weight_name for edge in graph.edges}
        without |= {"temperature", "soft_warmup_ratio"} if not graph.edges else set()
        without |= {"student_learning_rate"} if STUDENT in graph.frozen else set()
        without |= {"learning_rate"} if TEACHER in graph.frozen else set()
        return {
            name: values for name, values in DEFAULT_SPACE.items() if name not in without and hasattr(self.args, name)
        }

    def _suggest(self, trial: Any) -> dict[str, float]:
        """The default space for Optuna."""
        return {
            name: trial.suggest_float(name, values.low, values.high, log=values.log)
            for name, values in self._space.items()
        }

    def _ray_space(self, _trial: Any) -> dict[str, Any]:
        """The default space for Ray."""
        from ray import tune

        return {
            name: (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
            for name, values in self._space.items()
        }

    def _objective_of(self, metrics: dict[str, float]) -> float:
        """The default objective.

        Raises:
            KeyError: There is no such metric; names the ones that there are.
        """
        metric = self.args.metric_for_best_model
        if metric is None:
            prefixes = {TEACHER: "eval_", STUDENT: f"eval_{STUDENT}_"}
            return sum(metrics[f"{prefixes[name]}loss"] for name in self.graph.trained)
        key = metric if metric.startswith("eval_") else f"eval_{metric}"
        if key not in metrics:
            raise KeyError(
                f"`metric_for_best_model={metric!r}`: the evaluation has no {key!r}, only {sorted(metrics)}."
            )
        return metrics[key]

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the arguments of a trial.

        Raises:
            ValueError: They are not valid.
        """
        if self.pair is None or trial is None or self.hp_search_backend is None:
            return super()._hp_search_setup(trial)
        # Trainer gives a value the type of the old one: a weight would become one that follows the mode.
        own = {edge.weight_name: getattr(self.distillation, edge.weight_name) for edge in EDGES}
        for name in own:
            setattr(self.distillation, name, None)
        super()._hp_search_setup(trial)
        for name, value in own.items():
            if getattr(self.distillation, name) is None:
                setattr(self.distillation, name, value)
        self.distillation.check()
