"""A diagnosis of predictions made by hand equals naive computations, for all kinds of predictions."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import brier_score_loss, cohen_kappa_score
from transformers import BertConfig

from ctcd_trainer.diagnose import Diagnosis, measuring
from ctcd_trainer.diagnose.measuring import Measurements
from ctcd_trainer.losses.reliability import trusted_weight
from ctcd_trainer.tasks import named_task

ROWS, CLASSES = 40, 4
close = partial(pytest.approx, rel=1e-5, abs=1e-6)


def measured(task, logits, labels, config=None, brief=False):
    """Measure logits `(rows, ...)` of teacher and student, in three batches."""
    known = named_task(task, config or BertConfig(num_labels=CLASSES))
    batches = [{"index": at, "labels": labels[at]} for at in torch.arange(len(labels)).chunk(3)]
    run = lambda name, batch: {"logits": logits[name == "student"][batch["index"]]}  # noqa: E731
    return Measurements(run, known, batches, brief)


def diagnosis_of(task, logits, labels, config=None, weight=1.0, training=None):
    train = None if training is None else measured(task, *training, config, brief=True)
    return Diagnosis.of(task, weight, measured(task, logits, labels, config), train)


def logits_of(shape, labels=None, seed=0, scales=(3.0, 1.0)):
    """Random logits of teacher and student; with labels, that know more than nothing."""
    random = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*shape, generator=random) * scale for scale in (2.0, 1.0)]
    if labels is not None:
        onehot = torch.nn.functional.one_hot(labels.clamp(min=0), shape[-1])
        logits = [z + scale * onehot for z, scale in zip(logits, scales, strict=True)]
    return logits


def classes_of(head):
    """Labels and logits of a head: most tokens are ignored, and language models have vocabularies of two sizes."""
    random = torch.Generator().manual_seed(5)
    shape = (ROWS,) if head in ("sequence-classification", "multiple-choice") else (ROWS, 6)
    labels = torch.randint(0, CLASSES, shape, generator=random)
    labels[torch.rand(shape, generator=random) < 0.2] = -100
    labels[:2] = -100  # rows without any label
    logits = logits_of((*shape, CLASSES), labels)
    if head == "masked-lm":
        logits[0] = torch.cat([logits[0], torch.full((*shape, 2), -9.0)], dim=-1)
    if head == "causal-lm":  # the logits of a position predict the next label
        logits = [torch.cat([z[:, 1:], z[:, :1]], dim=1) for z in logits]
        labels[:, 0] = -100
    return logits, labels


def items_of(head, logits, labels):
    """The logits `(items, classes)` of both models, the labels and the rows of the labelled items."""
    if head == "causal-lm":
        logits, labels = [z[:, :-1] for z in logits], labels[:, 1:]
    there = labels != -100
    first, second = (z[there][:, :CLASSES].double().numpy() for z in logits)
    return first, second, labels[there].numpy(), there.nonzero()[:, 0].numpy()


def fold_of_rows(rows):
    """The fold of each row that has a label, as the diagnosis draws them."""
    kept = np.unique(rows)
    folds = np.random.default_rng(0).permutation(len(kept)) % 5
    return dict(zip(kept, folds, strict=True))


def cross_validated(losses, rows):
    """Item losses `(columns, items)`: each at the column that is best on the items of the other folds."""
    folds = np.array([fold_of_rows(rows)[row] for row in rows])
    result = np.empty(losses.shape[1])
    for fold in range(5):
        result[folds == fold] = losses[losses[:, folds != fold].sum(1).argmin()][folds == fold]
    return result


@pytest.mark.parametrize(
    "head", ["sequence-classification", "token-classification", "multiple-choice", "masked-lm", "causal-lm"]
)
def test_one_class_of_several(head, monkeypatch):
    monkeypatch.setattr(measuring, "_ELEMENTS", 7 * CLASSES)  # language models in parts of 7 positions
    logits, labels = classes_of(head)
    found = diagnosis_of(head, logits, labels, weight=0.5, training=(logits_of(logits[1].shape, labels, 7), labels))
    first, second, y, rows = items_of(head, logits, labels)
    n = np.arange(len(y))
    probs = {"teacher": softmax(first, -1), "student": softmax(second, -1)}
    onehot = np.eye(CLASSES)[y]
    assert (found.items, found.rows, found.loss_name) == (len(y), len(set(rows)), "NLL")
    assert found.chance_loss == close(-np.log((np.bincount(y) / len(y))[y]).mean())
    for name, z in (("teacher", first), ("student", second)):
        scores, p = found.models[name], probs[name]
        nll = lambda t, z=z: -log_softmax(z / t, -1)[n, y]  # noqa: E731
        right = p.argmax(1) == y
        assert scores.loss == close(nll(1.0).mean())
        assert scores.accuracy == close(right.mean())
        assert scores.squared_error == close(((p - onehot) ** 2).sum(1).mean())
        assert scores.label_share == close(p[n, y].mean())
        best = minimize_scalar(lambda t, nll=nll: nll(t).mean(), bounds=(0.25, 8), method="bounded")
        assert abs(np.log2(scores.temperature / best.x)) <= 0.25
        assert scores.scaled_loss == close(
            cross_validated(np.stack([nll(t) for t in 2.0 ** (np.arange(-8, 13) / 4)]), rows).mean()
        )
        assert best.fun <= scores.scaled_loss <= scores.loss + 0.05
        bins = (p.max(1) * 15).astype(int)
        gaps = [abs((right - p.max(1))[bins == each].sum()) for each in range(15)]
        assert scores.calibration_error == close(sum(gaps) / len(y))
    _check_mixture(found, probs["teacher"], probs["student"], y, rows)
    _check_edges(found, probs, y, weight=0.5)
    assert found.agreement == close((first.argmax(1) == second.argmax(1)).mean())
    assert found.kappa == close(cohen_kappa_score(first.argmax(1), second.argmax(1)))
    assert found.models["teacher"].training_label_share != found.models["teacher"].label_share
    json.dumps(found.to_dict(), allow_nan=False)


def _check_mixture(found, first, second, y, rows):
    n, shares = np.arange(len(y)), np.linspace(0, 1, 21)
    mixed = np.stack([a * first + (1 - a) * second for a in shares])
    losses, right = -np.log(mixed[:, n, y]), mixed.argmax(-1) == y
    assert found.mixture.losses == close(losses.mean(1).tolist())
    assert found.mixture.accuracies == close(right.mean(1).tolist())
    assert found.mixture.best_share == close(shares[losses.mean(1).argmin()])
    gains = cross_validated(losses[[0, -1]], rows) - cross_validated(losses, rows)
    gain = found.mixture.gain
    assert gain.value == close(gains.mean())
    assert gain.low < gain.value < gain.high
    spread = np.bincount(rows, gains - gains.mean())
    error = np.sqrt((spread**2).sum()) / len(y)  # of a ratio of sums over rows
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * error, rel=0.25)


def _check_edges(found, probs, y, weight):
    n = np.arange(len(y))
    right = {name: p.argmax(1) == y for name, p in probs.items()}
    errors = {name: p - np.eye(CLASSES)[y] for name, p in probs.items()}
    mean = {name: (e**2).sum(1).mean() for name, e in errors.items()}
    product = (errors["teacher"] * errors["student"]).sum(1).mean()
    for learner, source in (("student", "teacher"), ("teacher", "student")):
        edge = found.edges[f"{learner}_from_{source}"]
        p, q = probs[learner], probs[source]
        soft = (q * (np.log(q) - np.log(p))).sum(1)
        assert edge.soft_loss == close(soft.mean())
        assert sum(share for share, _ in edge.cells.values()) == close(1.0)
        for cell, (share, loss) in edge.cells.items():
            inside = (right[source] == (cell[0] == "T")) & (right[learner] == (cell[1] == "T"))
            assert share == close(inside.mean())
            assert loss == (close(soft[inside].mean()) if inside.any() else None)
        assert edge.smoothing == close(weight / (1 + weight) * (1 - q[n, y].mean()))
        chance = ((np.bincount(y) / len(y) - np.eye(CLASSES)[y]) ** 2).sum(1).mean()
        expected = trusted_weight(mean[source], mean[learner], product, chance)
        assert edge.trusted_weight == close(expected)


def test_several_labels():
    """Label 3 of the first row is missing, and the last row has none."""
    labels = torch.randint(0, 2, (ROWS, CLASSES), generator=torch.Generator().manual_seed(1)).float()
    logits = [z + 2 * labels - 1 for z in logits_of((ROWS, CLASSES))]
    labels[0, 3], labels[-1] = np.nan, np.nan
    config = BertConfig(num_labels=CLASSES, problem_type="multi_label_classification")
    found = diagnosis_of("sequence-classification", logits, labels, config)
    y, z = labels[:-1].double().numpy(), [each[:-1].double().numpy() for each in logits]
    probs = {name: expit(each) for name, each in zip(("teacher", "student"), z, strict=True)}
    nll = lambda p: np.nanmean(-y * np.log(p) - (1 - y) * np.log(1 - p), axis=1)  # noqa: E731
    right = lambda p: (((p > 0.5) == (y > 0.5)) | np.isnan(y)).all(1)  # noqa: E731
    for name, p in probs.items():
        assert found.models[name].loss == close(nll(p).mean())
        assert found.models[name].accuracy == close(right(p).mean())
        assert found.models[name].label_share == close(np.exp(-nll(p)).mean())
        assert found.models[name].calibration_error is None
    mixed = [a * probs["teacher"] + (1 - a) * probs["student"] for a in np.linspace(0, 1, 21)]
    assert found.mixture.losses == close([nll(p).mean() for p in mixed])
    assert found.mixture.accuracies == close([right(p).mean() for p in mixed])
    same = (z[0] > 0) == (z[1] > 0)
    assert found.agreement == close(same.mean())
    chance = np.mean([np.mean((z[0] > 0) == x, 0) * np.mean((z[1] > 0) == x, 0) for x in (True, False)], 1).sum()
    assert found.kappa == close((same.mean() - chance) / (1 - chance))
    edge = found.edges["student_from_teacher"]
    q = found.models["teacher"].label_share
    assert edge.smoothing == close(4 / 5 * (1 - q)), "the soft loss of four labels is their sum"
    error = lambda p, q: 2 * np.nanmean((p - y) * (q - y), axis=1).mean()  # noqa: E731
    t, s = probs.values()
    chance = 2 * np.nanmean((y - np.nanmean(y, 0)) ** 2)
    assert edge.trusted_weight == close(trusted_weight(error(t, t), error(s, s), error(t, s), chance, 1 / 4))
    constant = np.broadcast_to(np.nanmean(y, 0), y.shape)
    assert found.chance_loss == close(
        np.mean(-constant[0] * np.log(constant[0]) - (1 - constant[0]) * np.log(1 - constant[0]))
    )


def test_numbers():
    labels = torch.linspace(-2, 2, ROWS)
    logits = [labels[:, None] + z for z in logits_of((ROWS, 1))]
    labels[3] = np.nan
    config = BertConfig(num_labels=1, problem_type="regression")
    training = [labels.nan_to_num()[:, None] + 0.1, labels.nan_to_num()[:, None]], labels
    found = diagnosis_of("sequence-classification", logits, labels, config, training=training)
    keep = ~labels.isnan()
    t, s, y = (x[keep].double().flatten().numpy() for x in (*logits, labels))
    assert (found.loss_name, found.items) == ("MSE", ROWS - 1)
    assert found.models["teacher"].loss == found.models["teacher"].squared_error == close(((t - y) ** 2).mean())
    assert found.mixture.losses == close([((a * t + (1 - a) * s - y) ** 2).mean() for a in np.linspace(0, 1, 21)])
    assert found.edges["teacher_from_student"].soft_loss == close(((t - s) ** 2).mean())
    assert found.models["teacher"].training_loss == close(0.01)
    assert found.agreement is found.kappa is found.mixture.accuracies is found.models["teacher"].accuracy is None
    assert found.edges["student_from_teacher"].cells == {}
    assert found.memorised
    assert found.skill("teacher") == close(1 - ((t - y) ** 2).mean() / y.var())
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_expected_brier_score_is_that_of_scikit_learn():
    labels = torch.arange(ROWS) % CLASSES
    logits = logits_of((ROWS, CLASSES), labels)
    found = diagnosis_of("sequence-classification", logits, labels)
    expected = brier_score_loss(
        labels, torch.softmax(logits[0].double(), -1), labels=range(CLASSES), scale_by_half=False
    )
    assert found.models["teacher"].squared_error == close(expected)


def pair_for(advice):
    """Predictions, of 400 rows, that deserve an advice; with those on training rows."""
    random = torch.Generator().manual_seed(3)
    labels = torch.randint(0, CLASSES, (400,), generator=random)
    noise = [torch.randn(400, CLASSES, generator=random) for _ in range(2)]
    known = torch.nn.functional.one_hot(labels, CLASSES).float()
    strengths = {"teacher useless": (0.0, 0.0), "student useless": (4.0, 0.0), "student far behind": (5.0, 1.0)}
    teacher, student = (a * known + z for a, z in zip(strengths.get(advice, (3.0, 3.0)), noise, strict=True))
    if advice in ("nothing to teach", "calibration"):
        student = teacher * 0.9 + 0.05 * noise[1]
    teacher, student = (2.5 * z for z in (teacher, student))  # calibrated
    if advice == "calibration":
        teacher = 5 * teacher
    if advice == "over-confident":
        student = 5 * student
    training = ([9.0 * known, student], labels) if advice == "memorised" else ([teacher, student], labels)
    return [teacher, student], labels, training


@pytest.mark.parametrize(
    ("advice", "recipe", "weights"),
    [
        ("teacher useless", "train it before it teaches", "until then"),
        ("student useless", "cut it from the teacher", "`teacher_from_student_weight=0.0`"),
        ("student far behind", "better start", "`student_from_teacher_weight="),
        ("over-confident", "for fewer steps", "`student_from_teacher_weight="),
        ("memorised", "unlabelled rows", "`student_from_teacher_weight="),
        ("nothing to teach", "distillation_mode='kd'", "`student_from_teacher_weight="),
        ("calibration", "distillation_mode='kd'", "dividing its logits by"),
        ("complementary", "distillation_mode='ctcd'", "deserve"),
    ],
)
def test_the_advice_follows_from_the_numbers(advice, recipe, weights):
    logits, labels, training = pair_for(advice)
    found = diagnosis_of("sequence-classification", logits, labels, training=training)
    assert len(found.advice) == 2
    assert recipe in found.advice[0], found
    assert weights in found.advice[1], found
    assert str(found).endswith("\n".join(found.advice))


def test_data_that_cannot_be_judged_are_refused():
    logits = logits_of((ROWS, CLASSES))
    with pytest.raises(ValueError, match="No row of the data has a label"):
        measured("sequence-classification", logits, torch.full((ROWS,), -100))
    with pytest.raises(ValueError, match="has 9 rows with a label, and a diagnosis needs 10"):
        diagnosis_of("sequence-classification", logits, (torch.arange(ROWS) >= 9).long() * -100)
    logits[1][7, 0] = np.nan
    with pytest.raises(FloatingPointError, match="The student predicts NaN"):
        measured("sequence-classification", logits, torch.zeros(ROWS, dtype=torch.long))


def test_tables_and_figure(tmp_path):
    logits, labels, training = pair_for("complementary")
    found = diagnosis_of("sequence-classification", logits, labels, training=training)
    for title in ("Each model", "The mixture of both", "Each soft loss", "Where the soft losses pull"):
        assert title in str(found)
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes()[1:4] == b"PNG"
