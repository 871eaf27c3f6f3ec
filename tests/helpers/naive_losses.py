"""Co-distillation as one writes it by hand: the whole logits of plain models, `F.cross_entropy` and `F.kl_div`.

Nothing of the package is used here: it is what the package is compared with.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNERS = ("teacher", "student")
LABELS = ("labels", "start_positions", "end_positions")


def run_model(model: nn.Module, batch: Mapping[str, Tensor], labelled: bool = False) -> Any:
    """Output of a model on those inputs of a batch that its `forward` names (that of the model in a PEFT wrapper)."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    names = inspect.signature(type(plain).forward).parameters
    inputs = {k: v for k, v in batch.items() if k in names and (labelled or k not in LABELS)}
    if "decoder_input_ids" in names and "decoder_input_ids" not in inputs:
        start = torch.full_like(batch["labels"][:, :1], model.config.decoder_start_token_id)
        shifted = torch.cat([start, batch["labels"][:, :-1]], dim=1)
        inputs["decoder_input_ids"] = torch.where(shifted == -100, model.config.pad_token_id, shifted)
    return model(**inputs)


def distributions(head: str, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits `(scored, outcomes)` of the scored positions of any head but question answering, and their labels."""
    logits, labels = output.logits, batch["labels"]
    if head == "causal-lm":
        logits = logits[:, -labels.shape[1] :]  # without those of virtual tokens (prompt tuning)
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100], labels[labels != -100]


def divergence(learner: Tensor, source: Tensor, tau: float) -> Tensor:
    """Mean over the rows of KL(source || learner) on the outcomes that both have."""
    shared = min(learner.shape[-1], source.shape[-1])
    log_q = F.log_softmax(learner[:, :shared] / tau, -1)
    log_p = F.log_softmax(source[:, :shared].detach() / tau, -1)
    return tau**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def answer_terms(outputs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[dict, dict]:
    """Hard losses of question answering, and the logits of the starts and ends that are inside the input.

    The cross-entropy of transformers is over all tokens, those of padding too; the distributions that two models
    compare are over the tokens that are none.
    """
    length = batch["input_ids"].shape[1]
    hard, compared = {}, {}
    for name, output in outputs.items():
        ends = (output.start_logits, batch["start_positions"]), (output.end_logits, batch["end_positions"])
        inside = [(z[positions < length], positions[positions < length]) for z, positions in ends]
        hard[name] = sum(F.cross_entropy(*pair) for pair in inside) / 2
        compared[name] = [
            z[row : row + 1, : batch["attention_mask"][row].sum()]
            for z, positions in ends
            for row in range(len(z))
            if positions[row] < length
        ]
    return hard, compared


def naive_losses(
    head: str,
    teacher: nn.Module,
    student: nn.Module,
    batch: Mapping[str, Tensor],
    tau: float = 1.0,
    pretrained: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Every hard and soft loss of the models without its weight, e.g. `teacher_hard`, `student_from_teacher`."""
    models = {"teacher": teacher, "student": student, "pretrained": pretrained}
    outputs = {name: run_model(model, batch) for name, model in models.items() if model is not None}
    if head == "question-answering":
        hard, compared = answer_terms(outputs, batch)
    else:
        scored = {name: distributions(head, output, batch) for name, output in outputs.items()}
        hard = {name: F.cross_entropy(*pair) for name, pair in scored.items()}
        compared = {name: [logits] for name, (logits, _) in scored.items()}
    losses = {f"{name}_hard": hard[name] for name in LEARNERS}
    for learner in LEARNERS:
        for source in compared.keys() - {learner}:
            pairs = list(zip(compared[learner], compared[source], strict=True))
            losses[f"{learner}_from_{source}"] = sum(divergence(*pair, tau) for pair in pairs) / len(pairs)
    return losses


def naive_loss(
    head: str,
    teacher: nn.Module,
    student: nn.Module,
    batch: Mapping[str, Tensor],
    weights: Mapping[str, float],
    tau: float = 1.0,
    pretrained: nn.Module | None = None,
) -> Tensor:
    """The weighted sum of the losses; weights are those of the training arguments, without `_weight`."""
    losses = naive_losses(head, teacher, student, batch, tau, pretrained)
    return sum(weight * losses[name] for name, weight in weights.items() if weight)
