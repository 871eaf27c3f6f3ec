"""Parts that teacher and student have in common: one set of weights, one computation, two complete models."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer, weights_of
from tiny_models import HEADS, rows_of, tiny_batch, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, TrainerCallback, default_data_collator

from ctcd_trainer import create_student
from ctcd_trainer.pair import shared_layers as shared_parts
from ctcd_trainer.pair.shared_layers import share_modules

#: Families with their heads. ALBERT runs one layer several times, ResNet has no layers, T5 and BART have two stacks.
FAMILIES = {
    "bert": "masked-lm",
    "distilbert": "masked-lm",
    "deberta-v2": "masked-lm",
    "electra": "masked-lm",
    "modernbert": "masked-lm",
    "gpt2": "causal-lm",
    "llama": "causal-lm",
    "gemma2": "causal-lm",
    "t5": "seq2seq-lm",
    "bart": "seq2seq-lm",
    "vit": "image-classification",
    "wav2vec2": "audio-classification",
}
SHARES = ("embeddings", "layers:1", "prefix")


def pair_of(dropout: float = 0.0) -> dict:
    teacher = tiny_bert(3, seed=1, dropout=dropout)
    student = create_student(teacher, 2, layers="first")
    with torch.no_grad():  # what is shared is the teacher's, whatever the student was
        for parameter in student.parameters():
            parameter.add_(0.01)
    return {"model": teacher, "student_model": student}


def pair_of_family(family: str, **settings) -> dict:
    settings |= {"num_decoder_layers": 3} if family == "t5" else {}
    teacher = tiny_model(family, FAMILIES[family], 3, **settings)
    return {"model": teacher, "student_model": create_student(teacher, 2, layers="first")}


def shared_names(share: str) -> tuple[str, ...]:
    layers = {"embeddings": 0, "layers:1": 1, "prefix": 2}[share]
    return "bert.embeddings.", *(f"bert.encoder.layer.{index}." for index in range(layers))


@pytest.mark.parametrize("share", SHARES)
def test_without_soft_losses_it_is_joint_training_written_by_hand(share, tmp_path):
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    trainer = tiny_trainer(tmp_path, **pair_of(), **options, share=share, distillation_mode="standalone")
    models = list(pair_of().values())
    own = [dict(model.named_parameters()) for model in models]
    common = [name for name in own[1] if name.startswith(shared_names(share))]
    assert common
    rows = tiny_rows()
    for step in range(5):
        with torch.no_grad():
            for name in common:
                own[1][name].copy_(own[0][name])
        batch = collate(rows[4 * step : 4 * step + 4])
        for model in models:
            model.train().zero_grad()
            model(**batch).loss.backward()
        with torch.no_grad():
            for name in common:
                own[0][name].grad += own[1][name].grad
            for index, parameters in enumerate(own):
                for name, parameter in parameters.items():
                    if index == 0 or name not in common:
                        parameter.sub_(0.1 * parameter.grad)
    with torch.no_grad():
        for name in common:
            own[1][name].copy_(own[0][name])
    trainer.train()
    assert_same_weights(trainer.teacher_model, models[0], 1e-6)
    assert_same_weights(trainer.student_model, models[1], 1e-6)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_model_is_the_same_alone_in_a_pair_and_when_loaded(family, share, tmp_path):
    head = FAMILIES[family]
    batch = tiny_batch(head)
    options = {"train_dataset": rows_of(batch), "data_collator": default_data_collator, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, **pair_of_family(family), **options, share=share)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    taken = {name: value for name, value in batch.items() if name != "token_type_ids"}
    trainer.pair.eval()
    both = trainer.pair(**taken)
    for name, folder in (("teacher", "saved"), ("student", "saved/student")):
        alone = trainer.pair.learners[name](**taken).logits
        loaded = HEADS[head].from_pretrained(tmp_path / folder)(**taken).logits
        torch.testing.assert_close(both.outputs[name].logits, alone, rtol=0, atol=0)
        torch.testing.assert_close(loaded, alone)


@pytest.mark.parametrize(
    ("share", "shared"),
    [("embeddings", 0), ("layers:1", 1), ("prefix", 2)],
)
def test_shared_layers_are_run_once_a_step(share, shared, tmp_path):
    """Three times in three steps; and once more where each model is run alone, to check that they may be shared."""
    trainer = tiny_trainer(tmp_path, **pair_of(dropout=0.1), share=share, max_steps=3)
    own, others = ([layer.attention for layer in model.bert.encoder.layer] for model in trainer.pair.learners.values())
    counts = dict.fromkeys([*own, *others], 0)

    def count(module, *_):
        counts[module] += 1

    for module in counts:
        module.register_forward_hook(count)
    trainer.train()
    alone = 1 if shared else 0
    for index in range(2):
        assert (own[index] is others[index]) == (index < shared)
        assert counts[own[index]] == (5 if index < shared else 3 + alone)
        assert counts[others[index]] == counts[own[index]]
    assert counts[own[2]] == 3 + alone


@pytest.mark.parametrize("share", SHARES)
def test_it_resumes_bit_for_bit(share, tmp_path):
    whole = tiny_trainer(tmp_path, **pair_of(dropout=0.1), share=share, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = tiny_trainer(tmp_path, **pair_of(dropout=0.1), share=share)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)


def test_both_models_train_what_they_share_and_each_parameter_is_in_one_group(tmp_path):
    trainer = tiny_trainer(tmp_path, **pair_of(), share="prefix", student_learning_rate=1e-3)
    before = weights_of(trainer.student_model)
    trainer.train()
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in trainer.pair.parameters()}
    student = {id(p) for g in trainer.optimizer.param_groups if g["learner"] == "student" for p in g["params"]}
    names = {name for name, p in trainer.student_model.named_parameters() if id(p) in student}
    assert names == {name for name in before if name.startswith(("bert.pooler", "classifier"))}
    for name, value in trainer.student_model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_it_works_with_gradient_checkpointing(tmp_path):
    plain = tiny_trainer(tmp_path / "plain", **pair_of(), share="layers:1")
    plain.train()
    spared = tiny_trainer(tmp_path / "spared", **pair_of(), share="layers:1", gradient_checkpointing=True)
    spared.train()
    assert_same_weights(spared.pair, plain.pair, 1e-6)


def test_the_student_takes_the_dropout_of_the_teacher_where_they_share_layers(tmp_path):
    trainer = tiny_trainer(tmp_path, **pair_of(dropout=0.5), share="prefix")
    batch = collate(tiny_rows(3))
    given = []
    trainer.student_model.bert.encoder.layer[1].register_forward_hook(lambda *each: given.append(each[2]))
    trainer.pair.train()
    trainer.pair(**batch)
    first, second = [each if isinstance(each, torch.Tensor) else each[0] for each in given[-2:]]
    assert torch.equal(first, second)


def test_another_trainer_takes_a_pair_that_shares_already(tmp_path):
    pair = pair_of()
    tiny_trainer(tmp_path / "one", **pair, share="layers:1").train()
    tiny_trainer(tmp_path / "two", **pair, share="layers:1").train()
    with pytest.raises(ValueError, match=r"share a parameter.*set `share`"):
        tiny_trainer(tmp_path / "three", **pair)


def test_new_models_of_a_search_share_as_well(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        model_init=lambda: pair_of()["model"],
        student_model_init=lambda: pair_of()["student_model"],
        share="layers:1",
    )
    trainer.train()
    layers = [model.bert.encoder.layer for model in (trainer.teacher_model, trainer.student_model)]
    assert layers[0][0] is layers[1][0]
    assert layers[0][1] is not layers[1][1]


def test_the_saved_student_is_a_model_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, **pair_of(), share="prefix")
    trainer.train()
    trainer.save_model()
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert_same_weights(student, trainer.student_model)
    assert len(student.bert.encoder.layer) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "layers:0"}, r"`share='layers:0'` is unknown.*layers:K"),
        ({"share": "head"}, r"`share='head'` is unknown.*embeddings.*prefix"),
        ({"share": "layers:3"}, r"`share='layers:3'`: the teacher has 3 layers and the student 2.*at most 2"),
        ({"share": "prefix", "distillation_mode": "kd"}, r"`share='prefix'`.*'kd'.*freezes the teacher"),
        (
            {"share": "prefix", "student_model": tiny_bert(2, hidden_size=8)},
            r"`share='prefix'`: `bert.embeddings.*\(16,\) in the teacher and \(8,\) in the student",
        ),
        (
            {"share": "layers:1", "student_model": tiny_bert(2, intermediate_size=8)},
            r"`bert.encoder.layer.0.intermediate.*\(32,\) in the teacher and \(8,\) in the student",
        ),
        (
            {"share": "embeddings", "student_model": tiny_model("distilbert", "masked-lm")},
            r"their heads are for different tasks",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **{**pair_of(), **options})


@pytest.mark.parametrize("share", ["embeddings", "layers:1", "prefix"])
def test_models_that_have_more_in_common_than_that_are_refused(share, tmp_path):
    teacher = tiny_bert(3, seed=1)
    before = weights_of(teacher)
    student = create_student(teacher, 2, layers="first", init="shared")
    with pytest.raises(ValueError, match=rf"`share='{share}'` does not include `(bert|classifier).*in common"):
        tiny_trainer(tmp_path, model=teacher, student_model=student, share=share)
    assert_same_weights(teacher, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 4}, r"layer.0.attention.self` has `\w+=\d+` in the teacher and \d+ in the student"),
        ({"hidden_act": "relu"}, r"intermediate_act_fn` has `class='GELUActivation'` .* 'ReLU' in the student"),
        ({"layer_norm_eps": 1e-3}, r"`bert.embeddings.LayerNorm` has `eps=1e-12` in the teacher and 0.001"),
    ],
)
def test_a_student_whose_config_would_make_another_model_of_the_shared_part_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=tiny_bert(3), student_model=tiny_bert(2, **settings), share="layers:1")


def test_dropout_may_differ(tmp_path):
    trainer = tiny_trainer(
        tmp_path, model=tiny_bert(3, dropout=0.1), student_model=tiny_bert(2, dropout=0.0), share="layers:1"
    )
    trainer.train()


@pytest.mark.parametrize("which", ["both", "teacher", "student"])
def test_models_with_adapters_share_nothing(which, tmp_path):
    pair = pair_of()
    for argument in pair:
        if which in ("both", {"model": "teacher", "student_model": "student"}[argument]):
            pair[argument] = get_peft_model(pair[argument], LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(
        ValueError, match=r"`share='layers:1'` does not work with adapters, and `(student_)?model` is wrapped by PEFT"
    ):
        tiny_trainer(tmp_path, **pair, share="layers:1")


def test_shared_layers_may_be_frozen(tmp_path):
    """The lower part of both models is computed once and not trained."""
    pair = pair_of()
    pair["model"].bert.embeddings.requires_grad_(False)
    pair["model"].bert.encoder.layer[0].requires_grad_(False)
    trainer = tiny_trainer(tmp_path, **pair, share="layers:1")
    before = weights_of(trainer.pair)
    trainer.train()
    changed = {name for name, value in trainer.pair.state_dict().items() if not torch.equal(value, before[name])}
    lower = {name for name in before if "embeddings" in name or ".layer.0." in name}
    assert changed == before.keys() - lower


def test_rows_without_a_label_train_what_is_shared_as_well(tmp_path):
    """With accumulation, against one batch; and against the losses of both models run apart."""
    rows = [{**row, "labels": row["labels"] if index % 3 else -100} for index, row in enumerate(tiny_rows())]
    settings = {"share": "layers:1", "train_dataset": rows, "learning_rate": 1e-3}
    trainers = [
        tiny_trainer(
            tmp_path,
            **pair_of(),
            **settings,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            gradient_checkpointing=checkpointing,  # both models run the shared layers for themselves
        )
        for size, checkpointing in ((8, False), (1, False), (2, True))
    ]
    for trainer in trainers:
        trainer.train()
    for other in trainers[1:]:
        assert_same_weights(other.pair, trainers[0].pair, 1e-6)


def test_a_loss_of_your_own_is_computed_from_one_run(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    pairs = []
    for function in (own_loss, None):
        trainer = tiny_trainer(tmp_path, **pair_of(dropout=0.1), share="prefix", compute_loss_func=function)
        trainer.train()
        pairs.append(trainer.pair)
    assert_same_weights(*pairs, 1e-6)


def test_a_forward_that_others_have_changed_stays_theirs(tmp_path):
    """As accelerate's hooks change it."""
    trainer = tiny_trainer(tmp_path, **pair_of(), share="layers:1")
    layer = trainer.teacher_model.bert.encoder.layer[0]
    calls, plain = [], layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    own = layer.forward
    with torch.no_grad():
        trainer.pair(**collate(tiny_rows(2)))
    assert layer.forward is own
    assert len(calls) == 1


def test_models_of_two_classes_share_nothing():
    with pytest.raises(ValueError, match="BertForMaskedLM and the student a DistilBertForMaskedLM"):
        share_modules(tiny_model("bert", "masked-lm"), tiny_model("distilbert", "masked-lm"), "embeddings")


def test_layers_that_depend_on_what_the_student_has_for_itself_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_parts, "_BELOW", ())
    rows = rows_of(tiny_batch("seq2seq-lm"))
    trainer = tiny_trainer(
        tmp_path, **pair_of_family("bart"), train_dataset=rows, data_collator=default_data_collator, share="layers:1"
    )
    before = weights_of(trainer.pair)
    with pytest.raises(ValueError, match=r"depend on \['model.encoder.layernorm_embedding"):
        trainer.train()
    assert_same_weights(trainer.pair, before)


def test_a_student_that_gives_the_shared_layers_other_positions_is_refused(tmp_path):
    """They are made outside of the layers, from the config of each model."""
    teacher = tiny_model("llama", "causal-lm", 3)
    cut = create_student(teacher, 2, layers="first")
    config = copy.deepcopy(cut.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 10.0}
    rows = rows_of(tiny_batch("causal-lm"))
    options = {"train_dataset": rows, "data_collator": default_data_collator}
    student = type(cut)(config)
    with pytest.raises(ValueError, match=r"shared layers of a Llama.* other values with the student's config"):
        tiny_trainer(tmp_path, model=teacher, student_model=student, share="layers:1", **options).train()
    tiny_trainer(tmp_path, model=teacher, student_model=cut, share="layers:1", **options).train()


def test_bf16_trains_what_is_shared_close_to_fp32(tmp_path):
    logs = []
    for bf16 in (False, True):
        options = {"share": "prefix", "learning_rate": 1e-3, "max_steps": 6, "logging_steps": 6}
        trainer = tiny_trainer(tmp_path, **pair_of(), **options, bf16=bf16)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in logs[0].keys() - {"learning_rate", "epoch", "step"}:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.02), name
        assert logs[1][name] != logs[0][name]


@pytest.mark.parametrize("share", ["layers:1", "prefix"])
def test_shared_layers_are_not_compiled(share, tmp_path):
    with pytest.raises(ValueError, match=rf"`share='{share}'` and `torch_compile` \(backend 'eager'\).*'embeddings'"):
        tiny_trainer(tmp_path, **pair_of(), share=share, torch_compile_backend="eager")


@pytest.mark.slow
def test_shared_embeddings_are_compiled(tmp_path):
    pairs = []
    for backend in (None, "eager"):
        trainer = tiny_trainer(tmp_path, **pair_of(), share="embeddings", torch_compile_backend=backend, max_steps=3)
        trainer.train()
        pairs.append(trainer.pair)
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert_same_weights(*pairs, 1e-6)


def test_one_layer_that_is_run_several_times_is_not_shared_in_part():
    teacher = tiny_model("albert", "masked-lm", 3)
    with pytest.raises(ValueError, match="runs one layer several times"):
        share_modules(teacher, create_student(teacher, 2), "layers:1")


class SeededSteps(TrainerCallback):
    """Draws the same noise at a step as another training."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def test_neftune_adds_its_noise_once_to_shared_embeddings(tmp_path):
    """The weights are those of a loop that adds it by hand, to the teacher's embeddings and then to the student's."""
    alpha, rate, models = 5.0, 1e-2, pair_of()
    teacher, student = copy.deepcopy(list(models.values()))
    student.bert.embeddings = teacher.bert.embeddings
    trainer = tiny_trainer(
        tmp_path,
        **models,
        share="embeddings",
        neftune_noise_alpha=alpha,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        callbacks=[SeededSteps()],
    )
    trainer.train()

    def noisy(module, args, output):
        bound = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-bound, bound)

    teacher.get_input_embeddings().register_forward_hook(noisy)
    parameters = list(dict.fromkeys([*teacher.parameters(), *student.parameters()]))
    rows = tiny_rows()
    for step in range(5):
        torch.manual_seed(step)
        batch = collate(rows[4 * step : 4 * step + 4])
        outputs = [model(**batch) for model in (teacher, student)]
        loss = sum(output.loss for output in outputs)
        logs = [output.logits.log_softmax(-1) for output in outputs]
        for learner, source in (logs, logs[::-1]):
            loss = loss + F.kl_div(learner, source.detach(), log_target=True, reduction="batchmean")
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= rate * gradient
    assert_same_weights(trainer.teacher_model, teacher, tolerance=1e-6)
    assert_same_weights(trainer.student_model, student, tolerance=1e-6)
    assert not trainer.teacher_model.get_input_embeddings()._forward_hooks
