"""The tables of a model card, in Markdown."""

import math
from collections.abc import Mapping, Sequence

from .results import Evaluation, Metrics, Results, is_agreement, metric_names

#: Rows of the table of evaluations; of more evaluations, as many are shown, evenly spaced.
MAX_ROWS = 20


def final_table(results: Results, learner: str) -> str:
    """The metrics of all learners at the end; empty without an evaluation.

    Args:
        results: The evaluations.
        learner: The one whose card it is.
    """
    metrics = results.final_metrics
    rows = [
        [words(key), *(format_number(own.get(key)) for own in metrics.values())]
        for key in metric_names(metrics)
        if not is_agreement(key)
    ]
    return markdown_table(["metric", *_heads(metrics, learner)], rows) if rows else ""


def agreement(results: Results) -> str:
    """How often the learners predict the same at the end, in words."""
    metrics = results.final_metrics
    sentences = []
    for key in filter(is_agreement, metric_names(metrics)):
        name = words(key.removesuffix("agreement")).strip()
        share = next(own[key] for own in metrics.values() if key in own)
        sentences.append(
            f"Both predict the same at {100 * share:.1f} % of the scored positions{f' of {name}' if name else ''}."
        )
    return " ".join(sentences)


def gain_table(results: Results, baseline: Metrics, learner: str) -> str:
    """The metrics of a learner beside those of its baseline; empty where none is in both."""
    own = results.final_metrics[learner]
    rows = [
        [words(key), format_number(old), format_number(own[key]), f"{own[key] - old:+.4f}"]
        for key, old in baseline.get(learner, {}).items()
        if key in own
    ]
    return markdown_table(["metric", "baseline", "this model", "difference"], rows) if rows else ""


def size_table(
    learner: str, parameters: Mapping[str, int], sizes: Mapping[str, int], milliseconds: Mapping[str, float]
) -> str:
    """Parameters, size on disk and, if it was measured, the latency of all learners.

    Args:
        learner: The one whose card it is.
        parameters: Number of parameters of each.
        sizes: Bytes of the weight files of each, 0 for none.
        milliseconds: Latency of each, or nothing.
    """
    rows = []
    for head, name in zip(_heads(parameters, learner), parameters, strict=True):
        size = f"{sizes[name] / 1e6:.4g}" if sizes[name] else "not saved"
        rows.append([head, f"{parameters[name] / 1e6:.4g}", size])
        rows[-1] += [f"{milliseconds[name]:.4g}"] if milliseconds else []
    header = ["model", "parameters (M)", "on disk (MB)", *(["latency (ms)"] if milliseconds else [])]
    return markdown_table(header, rows)


def evaluations_table(results: Results) -> str:
    """The metrics of all learners by step while they were trained; empty without an evaluation."""
    during = results.during
    columns = {}
    for key in dict.fromkeys(key for each in during for key in metric_names(each.metrics)):
        # What belongs to all of them is one column.
        names = results.learners[:1] if is_agreement(key) else results.learners
        for name in names:
            if any(key in each.metrics[name] for each in during):
                columns[name, key] = words(key) if is_agreement(key) else f"{name} {words(key)}"
    rows = [
        [
            str(each.step),
            f"{each.epoch:.2f}" if each.epoch is not None else "-",
            *(format_number(each.metrics[name].get(key)) for name, key in columns),
        ]
        for each in thinned(during)
    ]
    return markdown_table(["step", "epoch", *columns.values()], rows, texts=0) if rows else ""


def thinned(evaluations: Sequence[Evaluation], limit: int = MAX_ROWS) -> list[Evaluation]:
    """At most so many evaluations, evenly spaced, with the first and the last one."""
    last = len(evaluations) - 1
    if last < limit:
        return list(evaluations)
    return [evaluations[round(index * last / (limit - 1))] for index in range(limit)]


def format_number(value: float | None) -> str:
    """A metric as text, `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:,.1f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table, of which all columns but the first ones hold numbers.

    Args:
        header: Names of the columns.
        rows: The cells.
        texts: Number of columns that hold text.
    """
    rule = ["---" if index < texts else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def words(key: str) -> str:
    """Name of a metric for people."""
    return key.replace("_", " ")


def _heads(learners: Mapping[str, object], learner: str) -> list[str]:
    return [f"**{name}** (this model)" if name == learner else name for name in learners]
