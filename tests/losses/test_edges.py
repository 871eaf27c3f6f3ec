"""Schedules, gates and the settings of each edge, against naive computations."""

import math

import pytest
import torch
from naive_losses import distributions
from scipy.special import expit, softmax
from scipy.stats import entropy
from test_fused_linear import check, make_head, make_labels
from tiny import assert_same_weights, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import BertConfig, default_data_collator
from transformers.utils.logging import warning_once

from ctcd_trainer import make_pair
from ctcd_trainer.arguments import DistillationArguments
from ctcd_trainer.edges import GATES, find_schedule
from ctcd_trainer.graph import EDGES, Edge
from ctcd_trainer.losses.fused_linear import LinearHead
from ctcd_trainer.losses.objective import HeldOut, Objective, Progress
from ctcd_trainer.soft_losses import SOFT_LOSSES
from ctcd_trainer.tasks import TASKS
from ctcd_trainer.tasks.labelled import SequenceClassification

GATED = [name for name in GATES if name != "none"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", [1] * 10),
        ("rise:0.4", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("rise:0.35", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("rise:1e-05", [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("fall:0.4", [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0]),
        ("window:0.2-0.5", [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]),
        ("window:0-1", [1] * 10),
        ("burn-in:0.1", [1] * 10),
    ],
)
def test_a_schedule_is_a_factor_of_each_step(text, expected):
    schedule = find_schedule(text)
    assert [schedule.factor(step, 10) for step in range(10)] == pytest.approx(expected)
    assert schedule.factor(0, 0) == 1.0, "of a training of unknown length"


@pytest.mark.parametrize(
    "text",
    [
        *("", "linear", "rise", "rise:", "rise:2", "rise:0", "rise:-1", "rise:nan", "fall:0", "fall:a", "window:0.5"),
        *("window:0.5-0.5", "window:0.6-0.5", "burn-in", "constant:1"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_valid_forms(text):
    with pytest.raises(
        ValueError, match=r"is no schedule.*constant, rise:0.2, fall:0.44, window:0.1-0.5, burn-in:0.1"
    ):
        find_schedule(text)


def test_an_edge_has_the_weight_of_its_schedule_and_of_held_out_rows(caplog):
    arguments = DistillationArguments(
        "community",
        teacher_hard_weight=0.5,
        soft_warmup_ratio=0.5,
        student_from_teacher_weight=0.8,
        teacher_from_student_weight="auto",
        student_from_pretrained_schedule="burn-in:0.1",
        edges={"pretrained->teacher": {"schedule": "fall:0.5", "weight": 2.0}},
    )
    objective = Objective(SequenceClassification(BertConfig()), arguments)
    caplog.set_level("WARNING", logger="ctcd_trainer")
    warning_once.cache_clear()  # other tests may have seen it
    weights = {}
    for step in (0, 1, 2, 4):
        objective.progress = Progress(step, 8)
        weights[step] = [edge.weight for edge in objective.edges()]
    assert weights == {0: [0.0, 0, 0, 2.0], 1: [0.2, 0, 0, 1.5], 2: [0.4, 0, 0, 1.0], 4: [0.8, 0, 0, 0.0]}
    assert "`teacher_from_student_weight='auto'` is 0 until the first evaluation" in caplog.text
    objective.held_out = HeldOut({"teacher_from_student": 0.3}, {"student_from_pretrained"})
    assert [edge.weight for edge in objective.edges()] == [0.8, 0.3, 1.0, 0.0]
    objective.progress = Progress(1, 8)
    assert objective.changing_weights() == pytest.approx(
        {
            "student_from_teacher_weight": 0.2,
            "teacher_from_student_weight": 0.3 * 0.25,
            "student_from_pretrained_weight": 1.0,
            "teacher_from_pretrained_weight": 1.5,
        }
    )


# ---- Gates on whole outputs ----


def naive_gate(gate, problem, learner, source, label):
    """The factor of one item, from its logits as lists."""
    if problem == "regression":
        assert gate == "wsl"
        return 0.0 if math.isnan(label) else 1 - math.exp(-((learner[0] - label) ** 2) / (source[0] - label) ** 2)
    if problem == "multi_label":
        p, q = expit(learner), expit(source)
        there = [i for i, value in enumerate(label) if not math.isnan(value)]
        if gate == "confident":
            return 1 - sum(entropy([x, 1 - x]) for x in q) / len(q) / math.log(2)
        if not there:
            return 0.0
        if gate == "correct":
            return float(all((q[i] > 0.5) == (label[i] > 0.5) for i in there))
        loss = lambda p: -sum(math.log(p[i] if label[i] > 0.5 else 1 - p[i]) for i in there)  # noqa: E731
        return 1 - math.exp(-loss(p) / loss(q))
    p, q = softmax(learner), softmax(source)
    if gate == "confident":
        return 1 - entropy(q) / math.log(len(q))
    if label < 0:
        return 0.0
    return float(q.argmax() == label) if gate == "correct" else 1 - math.exp(-math.log(p[label]) / math.log(q[label]))


@pytest.mark.parametrize(
    ("gate", "problem"),
    [(gate, problem) for gate in GATED for problem in ("single_label", "multi_label")] + [("wsl", "regression")],
)
@pytest.mark.parametrize("rows", ["all", "labelled", "unlabelled"])
def test_a_gate_multiplies_the_loss_and_the_gradient_of_each_row(gate, problem, rows):
    """The mean is over the rows on which the edge holds: a closed one counts as 0."""
    if rows == "unlabelled" and GATES[gate].needs_labels:
        rows = "all"
    model = tiny_bert(1, problem=problem)
    task = SequenceClassification(model.config)
    make = torch.Generator().manual_seed(0)
    logits = [(2 * torch.randn(12, task.num_labels, generator=make)).requires_grad_() for _ in range(2)]
    labels = torch.tensor([row["labels"] for row in tiny_rows(12, problem)])
    labels[[1, 4]] = -100 if problem == "single_label" else math.nan
    if problem == "multi_label":
        labels[2, 3] = math.nan
    edges = {"teacher->student": {"gate": gate, "rows": rows, "temperature": 2.0, "soft_loss": "js", "weight": 0.7}}
    hard = {"teacher_hard_weight": 0.0, "teacher_from_student_weight": 0.0, "student_hard_weight": 0.0}
    objective = Objective(task, DistillationArguments(edges=edges, **hard))
    outputs = {"teacher": {"logits": logits[0]}, "student": {"logits": logits[1]}}
    loss, terms = objective(outputs, {"labels": labels})
    values = task.family({"labels": labels}).soft_loss(logits[1], logits[0].detach(), "js", 2.0)
    has_label = [index not in (1, 4) for index in range(12)]
    holds = [rows == "all" or has_label[i] == (rows == "labelled") for i in range(12)]
    gates = [
        naive_gate(gate, problem, s.tolist(), t.tolist(), y.tolist()) for t, s, y in zip(*logits, labels, strict=True)
    ]
    assert any(g < 0.5 for g in gates)
    assert any(g > 0.3 for g in gates)
    expected = sum(g * value for g, value, held in zip(gates, values, holds, strict=True) if held) / sum(holds)
    torch.testing.assert_close(terms["student_from_teacher_loss"], expected, check_dtype=False)
    mean = sum(g for g, held in zip(gates, holds, strict=True) if held) / sum(holds)
    assert terms["student_from_teacher_gate"].item() == pytest.approx(mean, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits[1], retain_graph=True)
    (wanted,) = torch.autograd.grad(0.7 * expected, logits[1])
    torch.testing.assert_close(gradient, wanted, check_dtype=False)
    number = torch.tensor([99, 20, 24])  # of a batch that has these rows and others
    _, parts = objective(outputs, {"labels": labels}, number)
    total = {"all": 24, "labelled": 20, "unlabelled": 4}[rows]
    for name in ("student_from_teacher_loss", "student_from_teacher_gate"):
        assert parts[name].item() == pytest.approx(terms[name].item() * sum(holds) / total, rel=1e-5)


@pytest.mark.parametrize("head", ["token-classification", "question-answering", "multiple-choice", "masked-lm"])
@pytest.mark.parametrize("gate", GATED)
def test_gates_of_every_scored_position(head, gate, tmp_path):
    """The mean of a gate over the positions, of the fused pass and of whole outputs."""
    models = [tiny_model("bert", head, 2, seed=1), tiny_model("bert", head, 1, seed=2)]
    batch = tiny_batch(head, 6)
    arguments = DistillationArguments(edges={"teacher->student": {"gate": gate}})
    pair = make_pair(*models, arguments)
    losses = pair(**batch).losses
    with torch.no_grad():
        outputs = [model(**batch) for model in models]
    if head == "question-answering":
        names = ("start_logits", "start_positions"), ("end_logits", "end_positions")
        rows = [
            (*(output[z][row, : batch["attention_mask"][row].sum()] for output in outputs), batch[y][row])
            for row in range(6)
            for z, y in names
        ]
    else:
        (teacher, labels), (student, _) = (distributions(head, output, batch) for output in outputs)
        rows = list(zip(teacher, student, labels, strict=True))
    gates = [naive_gate(gate, "single_label", s.tolist(), t.tolist(), y.item()) for t, s, y in rows]
    assert losses["student_from_teacher_gate"].item() == pytest.approx(sum(gates) / len(gates), rel=1e-4, abs=1e-6)
    assert "teacher_from_student_gate" not in losses


def test_items_without_a_label_are_closed_by_gates_that_need_one():
    """A data set of tokens without labels, as for soft losses alone."""
    task = next(task for task in TASKS if task.name == "token-classification")(BertConfig())
    labels = task.labels({"attention_mask": torch.ones(2, 3)})
    assert (labels == -100).all()


# ---- Gates in the fused pass ----


@pytest.mark.parametrize("gate", GATED)
@pytest.mark.parametrize("name", list(SOFT_LOSSES))
def test_gates_of_the_fused_pass_equal_full_logits(name, gate):
    """Vocabularies of different sizes, a softcap, a frozen source, chunks; the other direction has no gate."""
    heads = {"teacher": make_head(6, 40, 1, softcap=5.0), "student": make_head(4, 37, 2)}
    frozen = make_head(5, 37, 3)
    heads["pretrained"] = LinearHead(frozen.hidden.detach(), frozen.weight.detach(), frozen.bias.detach())
    gates = (gate, "none", gate, "confident")
    weights = (0.5, 2.0, 0.3, 0.7)
    edges = [Edge(e.source, e.learner, w, gate=g) for e, w, g in zip(EDGES, weights, gates, strict=True)]
    for hard in ({"teacher": 1.0, "student": 0.6}, {"student": 1.0}, {}):
        check(heads, make_labels(37), hard, edges, name, 2.0, chunk_size=4)


def test_each_edge_of_the_fused_pass_has_its_own_temperature_and_loss():
    heads = {name: make_head(width, 37, width) for name, width in (("teacher", 6), ("student", 4), ("pretrained", 5))}
    settings = [("kl", 1.0, "none"), ("mse", None, "wsl"), (None, None, "none"), ("js", 3.0, "correct")]
    edges = [
        Edge(e.source, e.learner, 0.3 + index, temperature=tau, soft_loss=loss, gate=gate)
        for index, (e, (loss, tau, gate)) in enumerate(zip(EDGES, settings, strict=True))
    ]
    for hard in ({"teacher": 1.0, "student": 0.6}, {"student": 1.0}, {}):
        check(heads, make_labels(37), hard, edges, "reverse_kl", 2.0)


def test_gates_are_exact_in_double_precision():
    heads = {"teacher": make_head(6, 37, 1, torch.float64), "student": make_head(4, 37, 2, torch.float64)}
    edges = [Edge("teacher", "student", gate="wsl"), Edge("student", "teacher", gate="confident")]
    check(heads, make_labels(37), {"teacher": 1.0, "student": 1.0}, edges, "kl", 2.0, rtol=1e-12)


# ---- Trainings ----


@pytest.mark.parametrize("fused", [True, False])
def test_accumulating_gated_micro_batches_equals_one_batch(fused, tmp_path):
    rows = rows_of(tiny_batch("masked-lm", 16))
    options = {"train_dataset": rows, "data_collator": default_data_collator, "max_steps": 2, "logging_steps": 1}
    options |= {"student_from_teacher_gate": "wsl", "fused_lm_head": fused, "teacher_from_student_schedule": "fall:1"}
    options["edges"] = {"student->teacher": {"gate": "confident", "temperature": 2.0, "soft_loss": "js"}}
    trainers = []
    for size in (8, 1):
        models = {
            "model": tiny_model("bert", "masked-lm", 2, 1),
            "student_model": tiny_model("bert", "masked-lm", 1, 2),
        }
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainers.append(tiny_trainer(tmp_path, **models, **options, **batches))
        trainers[-1].train()
    assert_same_weights(trainers[1].pair, trainers[0].pair, 1e-5)
    for one, many in zip(*(trainer.state.log_history[:2] for trainer in trainers), strict=True):
        names = [name for name in one if name.endswith(("_loss", "_gate", "_weight"))]
        assert {"student_from_teacher_gate", "teacher_from_student_gate", "teacher_from_student_weight"} < set(names)
        assert {name: many[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)
    assert [log["teacher_from_student_weight"] for log in trainers[0].state.log_history[:2]] == [1.0, 0.5]


def test_a_gate_that_lets_nothing_through_is_reported(tmp_path, caplog):
    caplog.set_level("WARNING", logger="ctcd_trainer")
    warning_once.cache_clear()
    student = tiny_bert(2, seed=2)
    with torch.no_grad():
        student.classifier.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    rows = [{**row, "labels": 1} for row in tiny_rows(8)]
    options = {"teacher_from_student_gate": "correct", "max_steps": 1, "logging_steps": 1, "train_dataset": rows}
    tiny_trainer(tmp_path, student_model=student, **options).train()
    assert "The gate 'correct' of teacher_from_student lets less than 1 % through" in caplog.text
