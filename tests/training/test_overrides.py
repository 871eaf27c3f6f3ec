"""Subclasses that override hooks of Trainer: each learner gets what the plain subclass gives it alone."""

import copy
import pickle

import pytest
import torch
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from ctcd_trainer import CoDistillationTrainer
from ctcd_trainer.losses.objective import Progress

# ---- compute_loss ----


class ClassWeights:
    """The override of Trainer's documentation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.get("logits"), labels, weight=torch.tensor([1.0, 3.0, 0.5]))
        return (loss, outputs) if return_outputs else loss


class Regulariser:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert isinstance(model, nn.Module)
        assert self.model is model
        loss = loss + 0.01 * outputs.logits.square().mean() + 0.01 * sum(p.square().sum() for p in model.parameters())
        return (loss, outputs) if return_outputs else loss


class WithoutCount:
    """As people write it who do not know of the count."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


class MeanOfBatch:
    """As Trainer's documentation has it for a loss that is the mean of the micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 2.0 * (outputs["loss"] if isinstance(outputs, dict) else outputs[0])
        return (loss, outputs) if return_outputs else loss


class DividesByCount:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / num_items_in_batch
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


class Perturbed:
    """Two calls, between which the weights change; the first through the wrapped model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = self.model_wrapped(**inputs)
        loss, weight = outputs.loss, model.classifier.weight
        if model.training:
            (step,) = torch.autograd.grad(loss, weight, retain_graph=True)
            weight.data.add_(step)
            loss = loss + model(**inputs).loss
            weight.data.sub_(step)
        return (loss, outputs) if return_outputs else loss


class FirstWeights:
    """A frozen copy of the model, made during the first call, is the anchor of the others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.anchors = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model not in self.anchors:
            self.anchors[model] = copy.deepcopy(model).eval()
        outputs = model(**inputs)
        with torch.no_grad():
            anchor = self.anchors[model](**inputs).logits
        loss = outputs.loss + (outputs.logits - anchor).square().mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_weights(copied, self.model)
        return super().prediction_step(copied, inputs, prediction_loss_only, ignore_keys)


class OwnStep:
    """As people write it: the mean of each micro-batch, divided by their number."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class DropsCount(ClassWeights):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs)


class Nothing:
    pass


def train_both(override, tmp_path, evaluate=True, tolerance=0, models=None, **options):
    """Train a pair with the override and without soft losses, and each model with the plain subclass."""
    models = models or (lambda: (tiny_bert(3, seed=1), tiny_bert(2, seed=2)))
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "optim": "sgd", **options}
    results = []
    pair = type("Pair", (override, CoDistillationTrainer), {})
    teacher, student = models()
    args = tiny_args(tmp_path, distillation_mode="standalone", **settings)
    trainer = pair(teacher, args, collate, tiny_rows(), tiny_rows(), student_model=student)
    trainer.train()
    for name, model in zip(("", "student_"), models(), strict=True):
        plain = type("Plain", (override, Trainer), {})(
            model, tiny_args(tmp_path, **settings), collate, tiny_rows(), tiny_rows()
        )
        plain.train()
        learner = trainer.student_model if name else trainer.teacher_model
        assert_same_weights(learner, model, tolerance)
        if evaluate:
            results.append((f"eval_{name}loss", plain.evaluate()["eval_loss"]))
    metrics = trainer.evaluate() if evaluate else {}
    assert {name: metrics[name] for name, _ in results} == pytest.approx(dict(results), rel=tolerance)
    return trainer


@pytest.mark.parametrize(
    "override",
    [ClassWeights, Regulariser, WithoutCount, MeanOfBatch, DividesByCount, FirstWeights, OwnStep, DropsCount],
)
def test_compute_loss_is_the_task_loss_of_each_model(override, tmp_path):
    known = override is not MeanOfBatch or hasattr(Trainer, "loss_is_scaled_for_ga")
    train_both(override, tmp_path, tolerance=0 if known else 1e-7)


@pytest.mark.parametrize(
    ("override", "options"),
    [(Regulariser, {"bf16": True}), (Perturbed, {"bf16": True}), (Regulariser, {"label_smoothing_factor": 0.1})],
)
def test_compute_loss_under_autocast_and_with_label_smoothing(override, options, tmp_path):
    train_both(override, tmp_path, **options)


@pytest.mark.slow  # importing torch's compiler takes seconds
def test_compute_loss_of_a_compiled_pair(tmp_path):
    cls = type("Pair", (MeanOfBatch, CoDistillationTrainer), {})
    options = {"student_model": Perceptron(8, 1), "task": "sequence-classification"}
    trainer = cls(Perceptron(16, 0), tiny_args(tmp_path), collate, tiny_rows(), **options)
    batch = collate(tiny_rows(4))
    losses = [
        trainer.compute_loss(model, dict(batch))
        for model in (torch.compile(trainer.pair, backend="eager"), trainer.pair)
    ]
    torch.testing.assert_close(*losses)


def test_compute_loss_that_returns_the_loss_alone(tmp_path):
    class LossAlone:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    train_both(LossAlone, tmp_path, evaluate=False)


def test_compute_loss_of_the_class_under_the_mixin(tmp_path):
    """As a Trainer class of another package has it: the mixin stands above it."""
    from ctcd_trainer import CoDistillationMixin

    class Theirs(ClassWeights, Trainer):
        pass

    class Mine(CoDistillationMixin, Theirs):
        pass

    weights = []
    for cls in (Mine, type("Above", (ClassWeights, CoDistillationTrainer), {})):
        trainer = cls(
            tiny_bert(3, seed=1), tiny_args(tmp_path), collate, tiny_rows(), student_model=tiny_bert(2, seed=2)
        )
        trainer.train()
        weights.append(trainer.pair)
    assert_same_weights(*weights, tolerance=0)


def test_the_soft_losses_are_added_to_the_losses_of_compute_loss(tmp_path):
    cls = type("Pair", (ClassWeights, CoDistillationTrainer), {})
    teacher, student = tiny_bert(3, seed=1), tiny_bert(2, seed=2)
    rows = tiny_rows(4)
    trainer = cls(teacher, tiny_args(tmp_path, temperature=2.0), collate, rows, student_model=student)
    batch = collate(rows)
    expected = copy.deepcopy((teacher, student))
    logits = [model.train()(batch["input_ids"], batch["attention_mask"]).logits for model in expected]
    log_p, log_q = (F.log_softmax(z / 2.0, -1) for z in logits)
    weight = torch.tensor([1.0, 3.0, 0.5])
    loss = sum(F.cross_entropy(z, batch["labels"], weight=weight) for z in logits)
    loss = loss + 4.0 * F.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
    loss = loss + 4.0 * F.kl_div(log_p, log_q.detach(), log_target=True, reduction="batchmean")
    loss.backward()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        wrapped = DistributedDataParallel(trainer.model)
        ours = trainer.compute_loss(wrapped, dict(batch))
        ours.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(ours, loss)
    for model, copied in zip((teacher, student), expected, strict=True):
        for parameter, other in zip(model.parameters(), copied.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)


def test_compute_loss_of_language_models_takes_whole_logits(tmp_path):
    rows = rows_of(tiny_batch("causal-lm", 8))

    def losses(override):
        args = tiny_args(tmp_path, max_steps=2, logging_steps=1, optim="sgd")
        models = (tiny_model("llama", "causal-lm", layers, seed=layers) for layers in (2, 1))
        cls = type("Pair", (override, CoDistillationTrainer), {})
        trainer = cls(next(models), args, default_data_collator, rows, student_model=next(models))
        trainer.train()
        return trainer

    class Same:
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    ours, fused = losses(Same), losses(Nothing)
    assert fused.pair.fused_heads.used
    assert not ours.pair.fused_heads.used
    assert_same_weights(ours.pair, fused.pair, tolerance=1e-6)


def test_rows_without_labels_give_no_nan(tmp_path):
    rows = [{**row, "labels": -100} for row in tiny_rows(4)] + tiny_rows(4)
    cls = type("Pair", (ClassWeights, CoDistillationTrainer), {})
    args = tiny_args(tmp_path, max_steps=2)
    trainer = cls(tiny_bert(3, seed=1), args, collate, rows, student_model=tiny_bert(2, seed=2))
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.pair.parameters())


def test_compute_loss_that_never_calls_the_model_is_refused(tmp_path):
    class Blind(CoDistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return next(model.parameters()).sum()

    args = tiny_args(tmp_path)
    trainer = Blind(tiny_bert(3, seed=1), args, collate, tiny_rows(), student_model=tiny_bert(2, seed=2))
    with pytest.raises(ValueError, match="`compute_loss` has not called the teacher"):
        trainer.train()


def test_a_compute_loss_that_is_assigned_is_refused_before_training(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: 0.0
    with pytest.raises(ValueError, match=r"Override the method in a subclass, or pass `compute_loss_func`"):
        trainer.train()


# ---- create_optimizer ----


class Discriminative:
    """The body and the head have rates of their own, told by the names of the parameters."""

    body = 1e-3

    def create_optimizer(self, *args):
        named = list(self.model.named_parameters())
        head = [parameter for name, parameter in named if name.startswith("classifier.")]
        body = [parameter for name, parameter in named if name.startswith("bert.")]
        assert len(head) + len(body) == len(named)
        groups = [{"params": body, "lr": self.body}, {"params": head, "lr": 10 * self.args.learning_rate}]
        self.optimizer = torch.optim.SGD(groups, weight_decay=self.args.weight_decay)
        return self.optimizer


def test_create_optimizer_sees_one_model_with_its_own_names(tmp_path):
    trainer = train_both(Discriminative, tmp_path, evaluate=False, tolerance=5e-7)
    assert [group["learner"] for group in trainer.optimizer.param_groups] == ["teacher"] * 2 + ["student"] * 2


def test_the_rate_of_the_student_holds_in_an_overridden_create_optimizer(tmp_path):
    cls = type("Pair", (Discriminative, CoDistillationTrainer), {})
    args = tiny_args(tmp_path, learning_rate=1e-3, student_learning_rate=4e-3, student_weight_decay=0.1)
    trainer = cls(tiny_bert(3, seed=1), args, collate, tiny_rows(), student_model=tiny_bert(2, seed=2))
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-2, 1e-3, 4e-2]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0, 0.1, 0.1]


@pytest.mark.parametrize("argument", ["student_learning_rate", "student_weight_decay"])
def test_an_argument_that_create_optimizer_ignores_is_refused(argument, tmp_path):
    class Fixed(CoDistillationTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    args = tiny_args(tmp_path, **{argument: 0.5})
    trainer = Fixed(tiny_bert(3, seed=1), args, collate, tiny_rows(), student_model=tiny_bert(2, seed=2))
    with pytest.raises(ValueError, match=rf"`{argument}=0.5` has no effect: `create_optimizer`"):
        trainer.train()


class Lookahead(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Around(torch.optim.Optimizer):
    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(self.inner.param_groups, self.inner.defaults)


class Prodigy(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Lookahead, r"Lookahead, which keeps parameters in \['slow'\]"),
        (Around, r"Around, which keeps parameters in \['inner'\]"),
        (Prodigy, "Prodigy, which has one step size"),
    ],
)
def test_an_optimizer_that_would_not_see_the_other_model_is_refused(optimizer, message, tmp_path):
    class Own:
        def create_optimizer(self):
            self.optimizer = optimizer(self.model.parameters())
            return self.optimizer

    models = {"student_model": tiny_bert(2, seed=2)}
    cls = type("Pair", (Own, CoDistillationTrainer), {})
    with pytest.raises(ValueError, match=message):
        cls(tiny_bert(3, seed=1), tiny_args(tmp_path), collate, tiny_rows(), **models).create_optimizer()
    args = tiny_args(tmp_path, distillation_mode="kd")  # one model is trained
    assert isinstance(cls(tiny_bert(3, seed=1), args, collate, tiny_rows(), **models).create_optimizer(), optimizer)


def test_the_names_that_decay_are_asked_of_each_model(tmp_path):
    class NoDecay:
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if name.startswith("classifier.")]

    train_both(NoDecay, tmp_path, evaluate=False, tolerance=5e-7, weight_decay=0.5)


# ---- Evaluation ----


class Probabilities:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        assert isinstance(model, type(self.model))
        assert len(list(model.parameters())) == len(list(self.model.parameters()))
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, None if logits is None else logits.softmax(-1), labels


def test_prediction_step_gets_the_logits_of_one_model_at_a_time(tmp_path):
    cls = type("Pair", (Probabilities, CoDistillationTrainer), {})
    teacher, student = tiny_bert(3, seed=1), tiny_bert(2, seed=2)
    trainer = cls(teacher, tiny_args(tmp_path), collate, student_model=student)
    output = trainer.predict(tiny_rows(), student_predictions=True)
    for model, predictions in zip((teacher, student), (output.predictions, output.student_predictions), strict=True):
        plain = type("Plain", (Probabilities, Trainer), {})(model, tiny_args(tmp_path), collate)
        assert (predictions == plain.predict(tiny_rows()).predictions).all()
    loss, logits, labels = trainer.prediction_step(trainer.model, collate(tiny_rows(4)), False)
    assert logits.shape == (4, 3)
    assert loss.ndim == 0
    assert labels.shape == (4,)


def test_other_hooks_may_be_overridden(tmp_path):
    seen = {}

    class Mine(CoDistillationTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen["rows"] = len(inputs["labels"])
            return super().training_step(model, inputs, num_items_in_batch)

        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            seen["predictions"] = output.predictions.shape
            return output

        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_mine": 1.0}

        def get_train_dataloader(self):
            seen["loader"] = super().get_train_dataloader()
            return seen["loader"]

        def log(self, logs, start_time=None):
            seen.setdefault("logs", []).append(dict(logs))
            super().log(logs, start_time)

    rows = tiny_rows(8)
    args = tiny_args(tmp_path, max_steps=2, logging_steps=1)
    metrics = lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}  # noqa: E731
    trainer = Mine(
        tiny_bert(3, seed=1), args, collate, rows, rows, student_model=tiny_bert(2, seed=2), compute_metrics=metrics
    )
    trainer.train()
    assert trainer.evaluate()["eval_mine"] == 1.0
    assert seen["rows"] == 4
    assert seen["predictions"] == (8, 3)
    assert any("loss" in logs for logs in seen["logs"])


# ---- Models that are no usual models ----


def test_models_that_return_tuples(tmp_path):
    def models():
        return tiny_bert(3, seed=1, return_dict=False), tiny_bert(2, seed=2, return_dict=False)

    trainer = train_both(Nothing, tmp_path, models=models, tolerance=5e-7)
    plain = Trainer(trainer.teacher_model, tiny_args(tmp_path), collate)
    assert (trainer.predict(tiny_rows()).predictions == plain.predict(tiny_rows()).predictions).all()
    assert 0 <= trainer.evaluate()["eval_agreement"] <= 1
    named = tiny_trainer(tmp_path, optim="sgd", gradient_accumulation_steps=2, max_steps=3)
    tuples = tiny_trainer(
        tmp_path, optim="sgd", gradient_accumulation_steps=2, max_steps=3, model=models()[0], student_model=models()[1]
    )
    for each in (named, tuples):
        each.train()
    assert_same_weights(named.pair, tuples.pair, tolerance=0)
    overridden = type("Pair", (MeanOfBatch, CoDistillationTrainer), {})
    teacher, student = models()
    overridden(teacher, tiny_args(tmp_path), collate, tiny_rows(), student_model=student).train()


class Perceptron(nn.Module):
    """A module without a config."""

    def __init__(self, width: int, seed: int, form: str = "tuple") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.classifier = nn.Embedding(48, width), nn.Linear(width, 3)
        self.form = form

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.classifier(self.embed(input_ids).mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.form == "output":
            return SequenceClassifierOutput(loss=loss, logits=logits)
        return (logits,) if labels is None else (loss, logits)


def agreement_loss(teacher, student, inputs):
    return (student[1] - teacher[1]).square().mean()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("tuple", {"task": "sequence-classification"}),
        ("output", {"task": "sequence-classification"}),
        ("tuple", {"soft_loss_func": agreement_loss}),
    ],
)
def test_modules_without_a_config(form, options, tmp_path):
    rows = tiny_rows()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "student_learning_rate": 0.05}
    trained = []
    for mode in ("ctcd", "standalone"):
        args = tiny_args(tmp_path / mode, distillation_mode=mode, **settings)
        given = options if mode == "ctcd" else {"task": "sequence-classification"}
        models = Perceptron(16, 0, form), Perceptron(8, 1, form)
        trainer = CoDistillationTrainer(models[0], args, None, rows, rows, student_model=models[1], **given)
        trainer.train()
        trained.append(trainer)
    ctcd, alone = trained
    plain = Trainer(Perceptron(16, 0, form), tiny_args(tmp_path / "plain", max_steps=4), None, rows, rows)
    plain.train()
    assert_same_weights(alone.teacher_model, plain.model, tolerance=0)
    assert alone.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert (alone.predict(rows).predictions == plain.predict(rows).predictions).all()
    assert not torch.equal(ctcd.student_model.embed.weight, alone.student_model.embed.weight)
    # Resuming gives the same models, and the saved weights are those of a plain module.
    models = Perceptron(16, 0, form), Perceptron(8, 1, form)
    again = CoDistillationTrainer(models[0], ctcd.args, None, rows, student_model=models[1], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "ctcd/checkpoint-2"))
    assert_same_weights(again.pair, ctcd.pair, tolerance=0)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "ctcd/checkpoint-4/student/model.safetensors")
    assert saved.keys() == ctcd.student_model.state_dict().keys()
    assert all(torch.equal(value, ctcd.student_model.state_dict()[name]) for name, value in saved.items())


# ---- The pair as the model in callbacks ----


def test_callbacks_use_the_model_as_the_teacher(tmp_path):
    class Unfreeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for layer in model.bert.encoder.layer[:2]:
                layer.requires_grad_(False)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.bert.encoder.layer[1].requires_grad_(True)

    trainer = tiny_trainer(tmp_path, callbacks=[Unfreeze()], max_steps=2)
    first = trainer.teacher_model.bert.encoder.layer[0].attention.self.query.weight.clone()
    trainer.train()
    assert torch.equal(first, trainer.teacher_model.bert.encoder.layer[0].attention.self.query.weight)
    assert trainer.teacher_model.bert.encoder.layer[1].attention.self.query.weight.requires_grad


def test_an_attribute_that_the_teacher_has_is_set_on_the_teacher(tmp_path):
    teacher = tiny_model("gpt2", "causal-lm", 2, seed=1)
    rows = rows_of(tiny_batch("causal-lm", 4))
    trainer = CoDistillationTrainer(
        teacher,
        tiny_args(tmp_path),
        default_data_collator,
        rows,
        student_model=tiny_model("gpt2", "causal-lm", 1, seed=2),
    )
    config = copy.deepcopy(teacher.generation_config)
    trainer.model.generation_config = config
    assert teacher.generation_config is config
    head = nn.Linear(teacher.config.n_embd, teacher.config.vocab_size, bias=False)
    trainer.model.lm_head = head
    assert teacher.lm_head is head
    trainer.model.note = 1
    assert not hasattr(teacher, "note")
    assert trainer.model.objective.progress == Progress()
