"""A made-up grid of the paper's runner: every value follows from a formula that tests repeat."""

import statistics as naive
from typing import Any

Result = dict[str, Any]

SHAPES = {"teacher": (6, 22_713_216), "student": (3, 17_389_824)}
TRAINED = {"kd": ("student",), "reversed": ("teacher",)}
#: Differences that each method makes to the losses of the teacher and of the student.
GAINS = {
    "alone": (0.0, 0.0),
    "kd": (0.0, -0.06),
    "reversed": (0.03, 0.0),
    "ctcd": (-0.05, -0.10),
    "student-from-teacher": (0.0, -0.08),
    "teacher-from-student": (-0.02, 0.0),
    "community": (-0.07, -0.12),
    "community-kd": (-0.03, -0.09),
}
SOFT = {
    "hard_weight": 1.0,
    "soft_weight": 1.0,
    "teacher_soft_weight": None,
    "temperature": 1.0,
    "soft_warmup_ratio": 0.0,
}
SEEDS = (0, 1, 2)
GLUE = ("cola", "rte", "stsb")
LATENCY = {
    "conditions": {"sequence_length": 128, "threads": 1},
    "models": [
        {"name": "a", "layers": 6, "parameters": 22_600_000, "latency_ms": 19.2},
        {"name": "b", "layers": 3, "parameters": 17_200_000, "latency_ms": 10.8},
    ],
}


def loss_of(method: str, learner: str, seed: int, task: str = "mlm", shift: float = 0.0) -> float:
    """The validation loss; the loss on the dev set is 1.5 times that."""
    noise = 0.01 * ((seed * 7 + 3 * len(method) + len(learner) + len(task)) % 5)
    return 5.0 + 0.2 * (learner == "student") + GAINS[method][learner == "student"] + noise + shift


def scores_of(task: str, loss: float) -> dict[str, float]:
    if task == "mlm":
        return {"loss": loss}
    if task == "stsb":
        return {"loss": loss, "pearson": 1.4 - loss / 5, "spearmanr": 1.5 - loss / 5}
    metric = "matthews_correlation" if task == "cola" else "accuracy"
    return {"loss": loss, metric: 1.7 - loss / 5, "calibration_error": loss / 100}


def make_cell(
    task: str,
    method: str,
    seed: int,
    shift: float = 0.0,
    learners: tuple[str, ...] | None = None,
    scored_as: str | None = None,
    **fields: Any,
) -> Result:
    """A finished cell.

    Args:
        task, method, seed, fields: Of the cell.
        shift: What is added to its losses.
        learners: The models that it trained, if not those of the method.
        scored_as: The method whose losses it has.
    """
    cell = {
        **{"scale": "nano", "task": task, "method": method, "seed": seed, "learner": None, "start": None},
        **{"teacher_init": "pretrained", "student_init": "pretrained"},
        **{"rows": None, "steps": 200, "epochs": None, "batch_size": 16, "learning_rate": 5e-4},
        **{"student_learning_rate": None, "weight_decay": 0.01, "warmup_ratio": 0.1, "bf16": True},
        "pretrained_teacher": "alone" if method.startswith("community") else None,
        **(dict.fromkeys(SOFT) if method == "alone" else SOFT),
        **fields,
    }
    models = learners or TRAINED.get(method, ("teacher", "student"))
    loss = {name: loss_of(scored_as or method, name, seed, task, shift) for name in models}
    steps = cell["steps"] or 100
    return {
        "key": str(sorted({**cell, "as": scored_as}.items(), key=str)),
        "cell": cell,
        "models": {
            name: {
                "layers": SHAPES[name][0],
                "parameters": SHAPES[name][1],
                "scores": {"dev": scores_of(task, 1.5 * loss[name]), "validation": scores_of(task, loss[name])},
            }
            for name in models
        },
        "curve": [
            {"step": step, **{name: scores_of(task, loss[name] + 4.0 * (1 - step / steps) ** 3) for name in models}}
            for step in range(steps // 5, steps + 1, steps // 5)
        ],
        "compute": {"steps": steps, "tokens": steps * 2048, "flops": steps * 2e11, "seconds": 500.0 + 10 * seed},
        "environment": {"device": "cpu", "threads": 1, "torch": "2.13.0", "date": "2026-11-22"},
    }


def make_grid(seeds: tuple[int, ...] = SEEDS) -> list[Result]:
    """Pre-training by every method with ablations, fine-tuning of each model, co-training on the tasks."""
    results = []
    for seed in seeds:
        starts = [make_cell("mlm", method, seed) for method in GAINS]
        for start in starts:
            for task in GLUE:
                for name in start["models"]:
                    origin = {"start": start["key"], "learner": name, "learners": (name,)}
                    method = start["cell"]["method"]
                    results.append(make_cell(task, "alone", seed, scored_as=method, steps=None, epochs=3.0, **origin))
        results += starts
        for steps in (100, 400):
            results += [make_cell("mlm", method, seed, steps=steps, shift=9.0) for method in ("alone", "kd")]
            results.append(make_cell("mlm", "ctcd", seed, steps=steps, shift=9.0 + steps / 1e5))
        for rows in (400, 800):
            results += [make_cell("mlm", method, seed, rows=rows) for method in ("alone", "ctcd")]
        for name, value, shift in (
            ("soft_weight", 0.5, 0.01),
            ("teacher_soft_weight", 0.25, 0.02),
            ("temperature", 2.0, 0.03),
            ("soft_warmup_ratio", 0.3, -0.04),
        ):
            results.append(make_cell("mlm", "ctcd", seed, shift=shift, **{name: value}))
        results.append(make_cell("mlm", "ctcd", seed, temperature=8.0, soft_weight=4.0))  # two axes at once
        for method in ("alone", "kd", "reversed", "ctcd", "community", "community-kd"):
            for task in GLUE:
                for rows, shift in ((2000, 0.5), (None, 0.0)):
                    results.append(make_cell(task, method, seed, rows=rows, shift=shift, steps=None, epochs=4.0))
    return results


def parse(text: str) -> dict[str, list[list[dict[str, str]]]]:
    """The tables below each heading: rows by column."""
    found: dict[str, list[list[dict[str, str]]]] = {}
    heading = ""
    for block in text.split("\n\n"):
        if block.startswith("#"):
            heading = block.lstrip("# ").strip()
        elif block.startswith("|"):
            lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in block.strip().split("\n")]
            rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
            found.setdefault(heading, []).append(rows)
    return found


def row_of(table: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    (row,) = [row for row in table if all(row[name.replace("_", " ")] == value for name, value in wanted.items())]
    return row


def over_seeds(values: list[float], digits: int) -> str:
    return f"{naive.mean(values):.{digits}f} ± {naive.stdev(values):.{digits}f}"


def metric_of(method: str, learner: str, seed: int, task: str, shift: float = 0.0) -> float:
    base = {"cola": 1.7, "rte": 1.7, "stsb": 1.45}[task]
    return 100 * (base - loss_of(method, learner, seed, task, shift) / 5)
