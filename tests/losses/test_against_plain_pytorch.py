"""Both models' weights after training equal those of an independent computation with two models and two optimizers."""

import copy

import pytest
import torch
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer

LEARNING_RATE, STEPS, BATCH, WEIGHT_DECAY, MAX_NORM = 1e-3, 5, 4, 0.1, 0.5
# teacher trained, student trained, w(S<-T), w(T<-S), w(S<-P), w(T<-P): the table of design and paper, written again
TABLE = {
    "standalone": (True, True, 0, 0, 0, 0),
    "kd": (False, True, 1, 0, 0, 0),
    "reversed": (True, False, 0, 1, 0, 0),
    "ctcd": (True, True, 1, 1, 0, 0),
    "community": (True, True, 1, 1, 1, 1),
}


def hard_loss(logits, labels, problem):
    if problem == "single_label":
        return -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels].sum() / len(labels)
    if problem == "multi_label":
        p = torch.sigmoid(logits)
        return -(labels * torch.log(p) + (1 - labels) * torch.log(1 - p)).mean()
    return ((logits[:, 0] - labels) ** 2).sum() / len(labels)


def kl_loss(learner, source, problem, tau):
    source = source.detach()
    if problem == "single_label":
        p, q = torch.softmax(source / tau, -1), torch.softmax(learner / tau, -1)
        return tau**2 * (p * (p / q).log()).sum() / len(p)
    if problem == "multi_label":
        p, q = torch.sigmoid(source / tau), torch.sigmoid(learner / tau)
        return tau**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / len(p)
    return ((learner - source) ** 2).sum() / len(learner)


def naive_adamw(model):
    no_decay = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    decay = [p for n, p in model.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=1e-4, fused=False, foreach=False)


def naive_training(teacher, student, pretrained, rows, mode, problem, tau, weights=(1, 1, None)):
    train_t, train_s, s_from_t, t_from_s, s_from_p, t_from_p = TABLE[mode]
    optimizers = [(m, naive_adamw(m)) for m, trained in ((teacher, train_t), (student, train_s)) if trained]
    for step in range(STEPS):
        batch = collate(rows[step * BATCH : (step + 1) * BATCH])
        labels = batch.pop("labels")
        z_t, z_s, z_p = (m(**batch).logits for m in (teacher, student, pretrained))
        loss = 0
        if train_t:
            loss = loss + hard_loss(z_t, labels, problem)
            loss = loss + t_from_s * kl_loss(z_t, z_s, problem, tau) + t_from_p * kl_loss(z_t, z_p, problem, tau)
        if train_s:
            loss = loss + hard_loss(z_s, labels, problem)
            loss = loss + s_from_t * kl_loss(z_s, z_t, problem, tau) + s_from_p * kl_loss(z_s, z_p, problem, tau)
        loss.backward()
        for model, optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / STEPS)
            norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= min(1.0, MAX_NORM / (norm + 1e-6))
            optimizer.step()
        for model in (teacher, student):
            model.zero_grad()


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("mode", list(TABLE))
def test_five_steps_give_the_weights_of_two_models_with_two_optimizers(mode, problem, tau, tmp_path):
    teacher, student, pretrained = (tiny_bert(layers, seed, problem) for layers, seed in ((3, 1), (2, 2), (2, 3)))
    rows = tiny_rows(STEPS * BATCH, problem)
    trainer = tiny_trainer(
        tmp_path,
        problem,
        model=copy.deepcopy(teacher),
        student_model=copy.deepcopy(student),
        pretrained_teacher=copy.deepcopy(pretrained) if mode == "community" else None,
        train_dataset=rows,
        distillation_mode=mode,
        temperature=tau,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
    )
    start = {name: copy.deepcopy(model.state_dict()) for name, model in trainer.pair.learners.items()}
    trainer.train()

    naive_training(teacher, student, pretrained, rows, mode, problem, tau)

    assert_same_weights(trainer.teacher_model, teacher, tolerance=1e-6)
    assert_same_weights(trainer.student_model, student, tolerance=1e-6)
    for name, model in trainer.pair.learners.items():
        weight = "classifier.weight"
        assert torch.equal(model.state_dict()[weight], start[name][weight]) == (name in trainer.graph.frozen)
