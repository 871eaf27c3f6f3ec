"""The ensemble as a source: the mean of several predictions, on whole outputs and in the fused pass."""

import itertools

import numpy as np
import pytest
import torch
from test_fused_linear import make_head, make_labels, naive_logits, naive_losses, tensors_of
from tiny import PROBLEMS, tiny_bert, tiny_rows

from ctcd_trainer import DistillationArguments
from ctcd_trainer.edges import fitted_members
from ctcd_trainer.graph import Edge
from ctcd_trainer.losses.fused_linear import LinearHead, linear_losses
from ctcd_trainer.losses.objective import Objective
from ctcd_trainer.tasks.labelled import SequenceClassification

POOLED = {"ensemble->student": {"weight": 0.7, "temperature": 2.0}, "ensemble->teacher": {"weight": 0.3}}
QUIET = {"teacher_from_student_weight": 0.0, "student_from_teacher_weight": 0.0}


def naive_pool(problem: str, of: str, logits: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    if of == "logits" or problem == "regression":
        return sum(w * z for w, z in zip(weights, logits, strict=True))
    if problem == "single_label":
        return sum(w * z.softmax(-1) for w, z in zip(weights, logits, strict=True)).log()
    probs = sum(w / (1 + (-z).exp()) for w, z in zip(weights, logits, strict=True))
    return (probs / (1 - probs)).log()


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_learners_are_pulled_towards_the_mean_of_their_predictions(problem, of):
    task = SequenceClassification(tiny_bert(1, problem=problem).config)
    make = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, task.num_labels, generator=make).requires_grad_() for _ in range(2)]
    labels = torch.tensor([row["labels"] for row in tiny_rows(6, problem)])
    hard = {"teacher_hard_weight": 0.0, "student_hard_weight": 0.0}
    arguments = DistillationArguments(
        edges=POOLED, ensemble='{"teacher": 3, "student": 1}', ensemble_of=of, **QUIET, **hard
    )
    outputs = {"teacher": {"logits": logits[0]}, "student": {"logits": logits[1]}}
    loss, terms = Objective(task, arguments)(outputs, {"labels": labels})
    source = naive_pool(problem, of, [z.detach() for z in logits], [0.75, 0.25])
    family = task.family({"labels": labels})
    expected = {
        "student_from_ensemble_loss": family.soft_loss(logits[1], source, "kl", 2.0).mean(),
        "teacher_from_ensemble_loss": family.soft_loss(logits[0], source, "kl", 1.0).mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    wanted = torch.autograd.grad(0.7 * expected["student_from_ensemble_loss"], logits[1], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, logits[1]), wanted)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_the_ensemble_in_the_fused_pass(of):
    heads = {name: make_head(width, 37, width) for name, width in (("teacher", 6), ("student", 4))}
    edges = [
        Edge("ensemble", "student", 0.5, temperature=2.0),
        Edge("ensemble", "teacher", 0.4, gate="wsl"),
        Edge("teacher", "student", 0.3),
    ]
    members, labels = {"teacher": 0.6, "student": 0.4}, make_labels(37)
    logits = [naive_logits(heads[name]).detach() for name in members]
    pooled = LinearHead(naive_pool("single_label", of, logits, list(members.values())), torch.eye(37))
    for hard in ({"teacher": 1.0, "student": 0.6}, {}):
        loss, terms = linear_losses(heads, labels, hard, edges, "kl", 1.0, 4, members=members, pool=of)
        expected, values = naive_losses({**heads, "ensemble": pooled}, labels, hard, edges, "kl", 1.0)
        assert terms.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(terms[name], value.detach(), check_dtype=False)
        actual = torch.autograd.grad(loss, tensors_of(heads))
        torch.testing.assert_close(actual, torch.autograd.grad(expected, tensors_of(heads)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_fitted_weights_have_the_least_squared_error(seed):
    generator = np.random.default_rng(seed)
    errors = generator.normal(size=(3, 40)) * np.array([[1.0], [1.5], [4.0]]) + generator.normal(size=40)
    names = ["a", "b", "c"]
    products = {
        (p, q): float((errors[i] * errors[j]).mean())
        for (i, p), (j, q) in itertools.combinations_with_replacement(enumerate(names), 2)
    }
    found = fitted_members(products, names)
    assert sum(found.values()) == pytest.approx(1)
    grid = np.linspace(0, 1, 41)
    tried = [(a, b, 1 - a - b) for a in grid for b in grid if a + b <= 1 + 1e-9]
    least = min(np.square(np.array(weights) @ errors).mean() for weights in tried)
    assert np.square(np.array([found[name] for name in names]) @ errors).mean() <= least + 1e-9
