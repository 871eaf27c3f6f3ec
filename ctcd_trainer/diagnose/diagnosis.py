"""The diagnosis of two models from their measurements: numbers, tables, a figure and advice."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..cards.results import format_number, markdown_table
from ..graph import STUDENT, TEACHER
from ..soft_losses import Point
from .advice import advice_of
from .measuring import BETWEEN, CELLS, Measurements
from .scores import EdgeScores, Mixture, ModelScores, agreement_of, chance_loss, edge_scores, mixture_of, model_scores

_LEAST_ROWS = 10
_SAYS = {"T": "right", "F": "wrong"}


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of a teacher and a student. Printed, it is tables and two sentences of advice.

    Attributes:
        task: Name of the task.
        loss_name: `NLL` or `MSE`.
        rows: Number of held-out rows with a label.
        items: Number of their labelled items: rows, or tokens.
        weight: Weight of the soft losses that was assumed.
        chance_loss: The `loss` of the frequencies of the labels, or of the mean of numbers.
        models: The scores of each model by name.
        mixture: The mixture of both.
        edges: The soft losses by name, such as `student_from_teacher`.
        agreement: Share of decisions that are the same; `None` for numbers.
        kappa: Cohen's kappa: the agreement beyond that of models that decide alike only by chance, 1 at most.
        advice: Which recipe, and which weights.
    """

    task: str
    loss_name: str
    rows: int
    items: int
    weight: float
    chance_loss: float
    models: dict[str, ModelScores]
    mixture: Mixture
    edges: dict[str, EdgeScores]
    agreement: float | None = None
    kappa: float | None = None
    advice: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "advice", advice_of(self))

    @classmethod
    def of(cls, task: str, weight: float, found: Measurements, training: Measurements | None = None) -> "Diagnosis":
        """Compute a diagnosis from the measurements on held-out rows and, if there are any, on training rows.

        Raises:
            ValueError: There are fewer than 10 rows with a label.
        """
        rows = len(found.sums["items"])
        if rows < _LEAST_ROWS:
            raise ValueError(f"`dataset` has {rows} rows with a label, and a diagnosis needs {_LEAST_ROWS} or more.")
        agreement, kappa = agreement_of(found.decisions)
        return cls(
            task=task,
            loss_name="MSE" if isinstance(found.family, Point) else "NLL",
            rows=rows,
            items=int(found.sums["items"].sum()),
            weight=weight,
            chance_loss=chance_loss(found),
            models={name: model_scores(name, found, training) for name in (TEACHER, STUDENT)},
            mixture=mixture_of(found),
            edges={
                edge.loss_name.removesuffix("_loss"): edge_scores(edge, weight, found, training) for edge in BETWEEN
            },
            agreement=agreement,
            kappa=kappa,
        )

    def skill(self, model: str) -> float:
        """Tell which part of `chance_loss` a model takes away after temperature scaling: 1 is perfect, 0 is none."""
        scores = self.models[model]
        loss = scores.loss if scores.scaled_loss is None else scores.scaled_loss
        return 1.0 - loss / self.chance_loss if self.chance_loss else 0.0

    @property
    def memorised(self) -> bool:
        """Whether the teacher's predictions on its training rows are little more than the labels again."""
        teacher = self.models[TEACHER]
        if teacher.training_label_share is not None:
            return teacher.training_label_share > max(0.9, teacher.label_share + 0.05)
        return teacher.training_loss is not None and teacher.training_loss < teacher.loss / 4

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and the advice as dicts and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.task}: {self.items} labelled items in {self.rows} held-out rows"]
        parts += [f"{title}\n\n{_table(*table)}" for title, table in self._tables().items()]
        return "\n\n".join([*parts, "\n".join(self.advice)])

    def _tables(self) -> dict[str, tuple[list[str], list[list[Any]]]]:
        """Lay out the header and the lines of each table, by its title."""
        loss, mixture = self.loss_name, self.mixture
        models = {
            loss: "loss",
            f"{loss} after temperature scaling": "scaled_loss",
            "temperature": "temperature",
            "accuracy": "accuracy",
            "Brier score" if loss == "NLL" else "squared error": "squared_error",
            "calibration error": "calibration_error",
            "share of the label": "label_share",
            f"{loss} on training rows": "training_loss",
            "share of the label on training rows": "training_label_share",
        }
        lines = [[title, *(getattr(each, name) for each in self.models.values())] for title, name in models.items()]
        lines.append(
            [f"part of the {loss} of the label frequencies that it takes away", *map(self.skill, self.models)]
        )
        tables = {"Each model": (["", *self.models], [line for line in lines if line[1] is not None])}
        shown = range(0, len(mixture.shares), 2)
        accuracies = mixture.accuracies and ["accuracy", *(mixture.accuracies[i] for i in shown)]
        tables[
            f"The mixture of both. Best: {mixture.best_share:.2f} of the teacher. Gain over the better model: {loss} "
            f"{mixture.gain}" + (f", accuracy {mixture.accuracy_gain}" if accuracies else "")
        ] = (
            ["share of the teacher", *(f"{mixture.shares[i]:.1f}" for i in shown)],
            [line for line in ([loss, *(mixture.losses[i] for i in shown)], accuracies) if line],
        )
        edges = {
            "mean soft loss": lambda edge: edge.soft_loss,
            f"smoothing at weight {self.weight:g}": lambda edge: edge.smoothing,
            "smoothing on training rows": lambda edge: edge.training_smoothing,
            "w*, the weight it deserves": lambda edge: edge.trusted_weight,
        }
        lines = [[title, *map(get, self.edges.values())] for title, get in edges.items()]
        tables["Each soft loss"] = (["", *self.edges], [line for line in lines if line[1] is not None])
        if self.agreement is not None:
            title = f"Where the soft losses pull. Agreement {self.agreement:.3f}, kappa {self.kappa:.3f}"
            first, second = (edge.cells for edge in self.edges.values())  # with the teacher as source, as learner
            lines = [[_SAYS[c[0]], _SAYS[c[1]], *first[c], second[c[::-1]][1]] for c in CELLS]
            tables[title] = [TEACHER, STUDENT, "share of items", *self.edges], lines
        return tables

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the loss of the mixture, and the part of each soft loss that stems from each cell, as PNG, PDF or SVG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`Diagnosis.plot` needs matplotlib. Install it: `pip install matplotlib`.") from error
        panels = 1 if self.agreement is None else 2
        figure = Figure(figsize=(4.8 * panels, 3.6), dpi=150, layout="constrained")  # without the user's backend
        axes = figure.subplots(1, panels, squeeze=False)[0]
        mixture = self.mixture
        axes[0].plot(mixture.shares, mixture.losses, color="#08306b", label="mixture")
        axes[0].axhline(min(mixture.losses[0], mixture.losses[-1]), color="0.45", ls="--", lw=1, label="better model")
        best = mixture.shares.index(mixture.best_share)
        axes[0].plot(mixture.best_share, mixture.losses[best], "o", color="#e6550d", label="best mixture")
        axes[0].set(
            title=f"Gain {mixture.gain}",
            xlabel="share of the teacher (0: student alone, 1: teacher alone)",
            ylabel=f"held-out {self.loss_name}",
        )
        axes[0].legend(frameon=False)
        if panels == 2:
            colours = {"TT": "#c6dbef", "TF": "#08519c", "FT": "#e6550d", "FF": "0.6"}
            bottom = np.zeros(len(self.edges))
            for cell in CELLS:
                part = np.array(
                    [share * (loss or 0.0) for share, loss in (e.cells[cell] for e in self.edges.values())]
                )
                label = f"source {_SAYS[cell[0]]}, learner {_SAYS[cell[1]]}"
                names = [name.replace("_", " ").replace(" from ", "\nfrom ") for name in self.edges]
                axes[1].bar(names, part, 0.55, bottom=bottom, color=colours[cell], label=label)
                bottom += part
            axes[1].set(
                title="Where the soft losses pull", ylabel="mean soft loss", ylim=(0, 1.45 * bottom.max() or 1)
            )
            axes[1].legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.title.set_size(10)
        figure.savefig(path)


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Lay out a Markdown table whose columns are equally wide."""
    cells = [list(header)] + [[x if isinstance(x, str) else format_number(x) for x in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    header, *lines = ([x.ljust(w) for x, w in zip(line, widths, strict=True)] for line in cells)
    return markdown_table(header, lines)
