"""Bad input: a clear error, with both values and a remedy, before anything is trained."""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB_SIZE, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer, train_alone, weights_of
from tiny_models import tiny_model
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from ctcd_trainer import CoDistillationTrainer, Mixup, make_pair
from ctcd_trainer.arguments import DistillationArguments
from ctcd_trainer.checks.arguments import check_arguments, check_optimizer, check_strategy
from ctcd_trainer.tasks import UnknownHead, find_task


def test_a_different_number_of_labels_is_refused(tmp_path):
    student = tiny_bert(2, 2, "multi_label", problem_type=None)
    with pytest.raises(
        ValueError, match=r"`model` has `num_labels=3` and `student_model` has `num_labels=4`.*num_labels=3"
    ):
        tiny_trainer(tmp_path, student_model=student)


def test_a_different_problem_type_is_refused(tmp_path):
    student = tiny_bert(2, 2, problem_type="multi_label_classification")
    message = "`problem_type='single_label_classification'` and `student_model` has `problem_type='multi_label"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, student_model=student)


def test_a_pretrained_teacher_must_fit_as_well(tmp_path):
    with pytest.raises(ValueError, match="`pretrained_teacher` has `num_labels=5`"):
        tiny_trainer(tmp_path, distillation_mode="community", pretrained_teacher=tiny_bert(2, 3, num_labels=5))


@pytest.mark.parametrize("as_dataset", [True, False], ids=["Dataset", "list"])
@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_label_out_of_range_is_refused(which, label, as_dataset, tmp_path):
    rows = tiny_rows(6)
    rows[4]["labels"] = label
    data = Dataset.from_list(rows) if as_dataset else rows
    with pytest.raises(
        ValueError, match=rf"`{which}`: Label {label} of row 4 is out of range.*`num_labels=3`.* 0 to 2"
    ):
        tiny_trainer(tmp_path / "out", **{which: data})
    assert not (tmp_path / "out").exists(), "nothing is written before the check"


def test_a_student_larger_than_its_teacher_is_warned_of(tmp_path, caplog):
    caplog.set_level("WARNING", logger="ctcd_trainer")
    tiny_trainer(tmp_path)
    assert "wrong way round" not in caplog.text
    tiny_trainer(tmp_path, model=tiny_bert(1), student_model=tiny_bert(2))
    assert re.search(r"`student_model` has \d+ parameters, more than the \d+ of `model`", caplog.text)


def test_labels_of_the_wrong_shape_or_value_are_refused(tmp_path):
    rows = tiny_rows(6, "multi_label")
    rows[2]["labels"] = [0.0, 1.0, 2.0, 0.0]
    with pytest.raises(ValueError, match=r"row 2 is \[0.0, 1.0, 2.0, 0.0\]: every value must be from 0 to 1"):
        tiny_trainer(tmp_path, "multi_label", train_dataset=rows)
    rows = [{**row, "labels": row["labels"][:3]} for row in tiny_rows(6, "multi_label")]
    with pytest.raises(ValueError, match=r"`num_labels=4` and the labels have shape \(6, 3\)"):
        tiny_trainer(tmp_path, "multi_label", train_dataset=rows)
    rows = tiny_rows(6, "regression")
    rows[3]["labels"] = math.inf
    with pytest.raises(ValueError, match="The score of row 3 is inf: scores must be finite"):
        tiny_trainer(tmp_path, "regression", train_dataset=rows)


@pytest.mark.parametrize("mode", ["ctcd", "kd", "reversed", "community"])
def test_a_mode_that_needs_a_student_is_refused_without_one(mode, tmp_path):
    with pytest.raises(ValueError, match=f"`distillation_mode='{mode}'` needs a student.*`student_model` is None"):
        CoDistillationTrainer(tiny_bert(), tiny_args(tmp_path, distillation_mode=mode), train_dataset=tiny_rows())


@pytest.mark.parametrize("mode", ["ctcd", "kd", "reversed", "standalone"])
def test_a_pretrained_teacher_in_a_mode_that_has_no_use_for_it_is_refused(mode, tmp_path):
    with pytest.raises(
        ValueError, match=f"`pretrained_teacher` is given, but with `distillation_mode='{mode}'` nothing"
    ):
        tiny_trainer(tmp_path, distillation_mode=mode, pretrained_teacher=tiny_bert(2, 3))


def test_community_without_a_pretrained_teacher_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="'community'` with its weights needs a frozen teacher.*`pretrained_teacher` is None"
    ):
        tiny_trainer(tmp_path, distillation_mode="community", pretrained_teacher=None)


def test_the_same_object_twice_is_refused(tmp_path):
    model = tiny_bert()
    with pytest.raises(ValueError, match="`model` and `student_model` are the same object"):
        tiny_trainer(tmp_path, model=model, student_model=model)
    student = tiny_bert(2, 2)
    with pytest.raises(ValueError, match="`student_model` and `pretrained_teacher` are the same object"):
        tiny_trainer(tmp_path, student_model=student, pretrained_teacher=student, distillation_mode="community")


def test_shared_parameters_are_refused_by_name(tmp_path):
    teacher, student = tiny_bert(3, 1), tiny_bert(2, 2)
    student.bert.embeddings.word_embeddings = teacher.bert.embeddings.word_embeddings
    with pytest.raises(ValueError, match=r"share a parameter \(`bert.embeddings.word_embeddings.weight` and `bert"):
        tiny_trainer(tmp_path, model=teacher, student_model=student)


def tokenizer_of(size, prefix="w"):
    words = {"[PAD]": 0, "[UNK]": 1, **{f"{prefix}{i}": i for i in range(2, size)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )


def test_a_student_of_another_vocabulary_size_is_refused(tmp_path):
    message = "`model` has `vocab_size=48` and `student_model` has `vocab_size=60`"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, student_model=tiny_bert(2, 2, vocab_size=60))
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, student_model=tiny_bert(2, 2, vocab_size=60), processing_class=tokenizer_of(48))


def test_a_student_that_is_too_small_for_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`student_model` has `vocab_size=40`, and the tokenizer has 48 tokens"):
        tiny_trainer(tmp_path, student_model=tiny_bert(2, 2, vocab_size=40), processing_class=tokenizer_of(48))


def test_a_student_saved_with_another_tokenizer_is_refused_with_the_first_id_that_differs(tmp_path):
    tiny_bert(2, 2).save_pretrained(tmp_path / "student")
    tokenizer_of(48, prefix="other").save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="another tokenizer.*id 2 is 'other2' for one and 'w2' for the other"):
        tiny_trainer(tmp_path, student_model=str(tmp_path / "student"), processing_class=tokenizer_of(48))
    tokenizer_of(48).save_pretrained(tmp_path / "student")
    tiny_trainer(tmp_path, student_model=str(tmp_path / "student"), processing_class=tokenizer_of(48)).train()


def test_tokens_that_were_added_to_the_tokenizer_are_no_other_tokenizer(tmp_path):
    tiny_bert(2, 2).save_pretrained(tmp_path / "student")
    tokenizer_of(48).save_pretrained(tmp_path / "student")
    tokenizer = tokenizer_of(48)
    tokenizer.add_tokens(["new"])
    student = type(tiny_bert()).from_pretrained(tmp_path / "student")
    teacher = tiny_bert(3, 1)
    with pytest.raises(ValueError, match="`student_model` has `vocab_size=48`, and the tokenizer has 49 tokens"):
        tiny_trainer(tmp_path, model=teacher, student_model=student, processing_class=tokenizer)
    for model in (teacher, student):
        model.resize_token_embeddings(49)
    tiny_trainer(tmp_path, model=teacher, student_model=student, processing_class=tokenizer).train()


def test_a_student_with_embeddings_padded_over_the_same_tokenizer_is_accepted(tmp_path):
    trainer = tiny_trainer(tmp_path, student_model=tiny_bert(2, 2, vocab_size=64), processing_class=tokenizer_of(48))
    trainer.train()


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_an_empty_data_set_is_refused(which, tmp_path):
    with pytest.raises(ValueError, match=rf"`{which}` is empty \(0 examples\)"):
        tiny_trainer(tmp_path, **{which: []})


def test_one_empty_set_of_several_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`eval_dataset\['second'\]` is empty"):
        tiny_trainer(tmp_path, eval_dataset={"first": tiny_rows(3), "second": []})


def test_a_checkpoint_without_a_student_is_refused(tmp_path):
    args = tiny_args(tmp_path, save_strategy="steps", save_steps=2)
    Trainer(tiny_bert(3, 1), args, data_collator=collate, train_dataset=tiny_rows()).train()
    trainer = tiny_trainer(tmp_path)
    before = weights_of(trainer.pair)
    with pytest.raises(ValueError, match=r"checkpoint-5' has no student: there is no folder '.*checkpoint-5/student'"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in trainer.pair.state_dict().items())


def poisoned(layers, seed, after):
    """A model whose logits become NaN in the given forward of its training."""

    class Poisoned(type(tiny_bert())):
        calls = 0

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            type(self).calls += self.training
            self.classifier.bias.data += math.nan if self.calls > after else 0.0
            return super().forward(input_ids, attention_mask, labels=labels)

    return Poisoned(tiny_bert(layers, seed).config)


@pytest.mark.parametrize("logging_steps", [1, 2, 500])
@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_a_loss_that_is_not_finite_names_the_model_the_component_and_the_step(broken, logging_steps, tmp_path):
    learners = {"model": tiny_bert(3, 1), "student_model": tiny_bert(2, 2)}
    learners["model" if broken == "teacher" else "student_model"] = poisoned(2, 3, after=3)
    trainer = tiny_trainer(
        tmp_path, **learners, max_steps=8, logging_steps=logging_steps, save_strategy="steps", save_steps=2
    )
    with pytest.raises(
        FloatingPointError, match=rf"loss of the {broken} became NaN .* at step 4 \({broken}_hard_loss"
    ):
        trainer.train()
    saved = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-2"], "no checkpoint of broken weights is written, and the last good one is kept"
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_a_loss_that_breaks_in_the_last_step_is_not_missed(tmp_path):
    trainer = tiny_trainer(tmp_path, student_model=poisoned(2, 3, after=4), max_steps=5)
    with pytest.raises(FloatingPointError, match="student .* at step 5"):
        trainer.train()


def test_a_head_that_is_not_known_is_refused_with_both_ways_out(tmp_path):
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    message = "`model` is a BertModel, a head that is not known.*AutoModelFor.*`soft_loss_func.*`task`: 'sequence-cl"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=BertModel(config))
    with pytest.raises(ValueError, match="`task='summary'` is unknown. Valid values: sequence-classification, token"):
        tiny_trainer(tmp_path, task="summary")


def test_a_model_of_another_head_is_refused_whichever_it_is(tmp_path):
    config = BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    message = "`model` is a BertForSequenceClassification and `student_model` is a BertForTokenClassification"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, student_model=BertForTokenClassification(config))
    with pytest.raises(ValueError, match="`pretrained_teacher` is a BertModel, a head"):
        tiny_trainer(tmp_path, pretrained_teacher=BertModel(config), distillation_mode="community")
    with pytest.raises(ValueError, match="`student_model` is a NoneType, a head"):
        tiny_trainer(tmp_path, student_model=None, student_model_init=lambda: None)


def test_parameters_that_share_memory_are_refused_though_they_are_two_objects(tmp_path):
    teacher, student = tiny_bert(2, 1), tiny_bert(2, 2)
    student.load_state_dict(teacher.state_dict(), assign=True)
    with pytest.raises(ValueError, match="`model` and `student_model` share a parameter"):
        tiny_trainer(tmp_path, model=teacher, student_model=student)


def test_labels_in_another_order_are_refused(tmp_path):
    names = ["bad", "fair", "good"]
    teacher, student = (
        tiny_bert(2, 1, id2label=dict(enumerate(order)), label2id={n: i for i, n in enumerate(order)})
        for order in (names, names[::-1])
    )
    with pytest.raises(ValueError, match=r"`id2label=\{0: 'bad'.*`student_model` has `id2label=\{0: 'good'"):
        tiny_trainer(tmp_path, model=teacher, student_model=student)
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r"`student_model` has `id2label=\{0: 'good'"):
        tiny_trainer(tmp_path, model=teacher, student_model=str(tmp_path / "student"))


def test_a_problem_type_that_is_not_set_may_not_come_out_as_another_one(tmp_path):
    teacher = tiny_bert(2, 1, problem_type="regression")
    with pytest.raises(ValueError, match="`problem_type='regression'` and `student_model` has `problem_type=None`"):
        tiny_trainer(tmp_path, model=teacher, student_model=tiny_bert(2, 2, problem_type=None))
    tiny_trainer(tmp_path, student_model=tiny_bert(2, 2, problem_type=None)).train()


@pytest.mark.parametrize("role", ["pretrained_teacher", "student_model", "model"])
def test_a_frozen_model_without_a_trained_head_is_refused(role, tmp_path):
    config = BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    BertModel(config).save_pretrained(tmp_path / "headless")
    mode = {"pretrained_teacher": "community", "student_model": "reversed", "model": "kd"}[role]
    if role == "model":  # its class is taken from the checkpoint, so give it a head's name and no head
        path = tmp_path / "headless" / "config.json"
        path.write_text(path.read_text().replace("BertModel", "BertForSequenceClassification"))
    message = rf"`{role}=.*headless'` is frozen, and has no trained weights for \['classifier.bias'"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, distillation_mode=mode, **{role: tmp_path / "headless"})


def loaded_without_head(folder):
    """A model that is loaded from a checkpoint without the head of its class."""
    config = BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    BertModel(config).save_pretrained(folder)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=3)


@pytest.mark.parametrize(
    ("role", "mode"), [("model", "kd"), ("student_model", "reversed"), ("pretrained_teacher", "community")]
)
def test_a_frozen_model_object_with_a_new_head_is_refused(role, mode, tmp_path):
    model = loaded_without_head(tmp_path / "headless")
    message = rf"`{role}` is frozen, and has no trained weights for \['classifier.bias', .*newly initialized"
    with pytest.raises(ValueError, match=rf"{message}.*Trainer\(model, .*save_pretrained.*`{role}='trained'`"):
        tiny_trainer(tmp_path, distillation_mode=mode, **{role: model})
    trained = loaded_without_head(tmp_path / "headless")
    train_alone(trained, tmp_path, max_steps=1)
    tiny_trainer(tmp_path, distillation_mode=mode, **{role: trained})
    trained.save_pretrained(tmp_path / "trained")
    tiny_trainer(tmp_path, distillation_mode=mode, **{role: tmp_path / "trained"})


def test_a_new_head_is_trained_where_the_model_is_and_one_without_a_bias_is_reported(tmp_path, caplog):
    tiny_trainer(tmp_path, model=loaded_without_head(tmp_path / "headless"))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB_SIZE, "n_positions": 32}
    GPT2Model(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    models = [
        GPT2ForSequenceClassification.from_pretrained(tmp_path / "gpt2", num_labels=3, pad_token_id=0)
        for _ in range(2)
    ]
    caplog.set_level("WARNING", logger="ctcd_trainer")
    tiny_trainer(tmp_path, model=models[0], student_model=models[1], distillation_mode="kd")
    assert "`model` is frozen, and has no trained weights for ['score.weight']" in caplog.text


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "Label None of row 2 is no number"),
        ("good", "Label 'good' of row 2 is no number"),
        ([1, 0], r"Label \[1, 0\] of row 2 has the shape \(2,\), and the one of row 0 has \(\)"),
        (1.5, "The labels are of type float64, and `problem_type='single_label_classification'` needs integers"),
    ],
    ids=["None", "text", "list", "float"],
)
def test_labels_that_are_no_class_indices_are_refused_by_row(label, message, tmp_path):
    rows = tiny_rows(4)
    rows[2]["labels"] = label
    with pytest.raises(ValueError, match=f"`train_dataset`: {message}"):
        tiny_trainer(tmp_path, train_dataset=rows)


def test_integer_labels_of_a_multi_label_task_are_refused(tmp_path):
    rows = [{**row, "labels": [int(value) for value in row["labels"]]} for row in tiny_rows(4, "multi_label")]
    with pytest.raises(
        ValueError, match="of type int64, and `problem_type='multi_label_classification'` needs floats"
    ):
        tiny_trainer(tmp_path, "multi_label", train_dataset=rows)


def test_per_model_arguments_that_a_given_optimizer_does_not_heed_are_refused(tmp_path):
    models = tiny_bert(3, 1), tiny_bert(2, 2)
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"`student_learning_rate=0.01` has no effect on the optimizer"):
        tiny_trainer(
            tmp_path,
            model=models[0],
            student_model=models[1],
            optimizers=(optimizer, None),
            student_learning_rate=0.01,
        )


def test_arguments_changed_to_freeze_another_model_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.args.distillation_mode = "kd"
    with pytest.raises(ValueError, match=r"'kd'` and its weights freeze \['teacher'\].*Make a new trainer"):
        trainer.train()


def test_liger_kernels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`use_liger_kernel=True` replaces the loss inside one model"):
        tiny_trainer(tmp_path, use_liger_kernel=True)


def test_a_frozen_model_that_is_broken_is_named_and_not_the_one_that_learns_from_it(tmp_path):
    teacher = tiny_bert(3, 1)
    teacher.classifier.bias.data.fill_(math.nan)
    trainer = tiny_trainer(tmp_path, model=teacher, distillation_mode="kd")
    with pytest.raises(FloatingPointError, match=r"loss of the teacher .* step 1 \(student_from_teacher_loss\)"):
        trainer.train()


def test_a_broken_loss_is_reported_before_metrics_fail_on_it(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        student_model=poisoned(2, 3, after=1),
        eval_dataset=tiny_rows(4),
        eval_strategy="steps",
        eval_steps=3,
        compute_metrics=lambda prediction: 1 / 0,
    )
    with pytest.raises(FloatingPointError, match="student .* at step 2"):
        trainer.train()


def test_a_batch_without_labels_is_refused(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in tiny_rows()]
    with pytest.raises(ValueError, match=r"The batch has no `labels`, only \['attention_mask', 'input_ids'\]"):
        tiny_trainer(tmp_path, train_dataset=rows).train()


def test_a_model_that_an_earlier_trainer_froze_is_refused_where_it_is_to_be_trained(tmp_path):
    teacher = tiny_bert(3, 1)
    tiny_trainer(tmp_path, model=teacher, distillation_mode="kd")
    with pytest.raises(
        ValueError, match="'ctcd'` trains the teacher, but none of its parameters has `requires_grad=True`"
    ):
        tiny_trainer(tmp_path, model=teacher)


def test_an_optimizer_without_the_student_is_refused(tmp_path):
    teacher = tiny_bert(3, 1)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="an optimizer without any parameter of the student"):
        tiny_trainer(tmp_path, model=teacher, optimizers=(optimizer, None))


def test_a_batched_metric_function_whose_state_both_models_would_share_is_refused(tmp_path):
    def running(prediction, compute_result):
        return {}

    with pytest.raises(ValueError, match=r"`batch_eval_metrics=True` with two models needs .* object with `__call__`"):
        tiny_trainer(tmp_path, compute_metrics=running, batch_eval_metrics=True)


def test_two_sources_of_the_student_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`student_model` and `student_model_init` are both given"):
        tiny_trainer(tmp_path, student_model=tiny_bert(2, 2), student_model_init=lambda: tiny_bert(2, 2))


def test_a_model_init_with_a_student_that_is_not_made_anew_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`model_init` makes a new teacher .* pass `student_model_init`"):
        tiny_trainer(tmp_path, model_init=lambda: tiny_bert(3, 1), student_model=tiny_bert(2, 2))


def test_the_models_are_untouched_after_a_refusal(tmp_path):
    teacher, student = tiny_bert(3, 1), tiny_bert(2, 2, num_labels=4)
    before = copy.deepcopy(teacher.config.to_dict()), copy.deepcopy(student.config.to_dict())
    with pytest.raises(ValueError, match="num_labels"):
        tiny_trainer(tmp_path / "out", model=teacher, student_model=student, distillation_mode="kd")
    assert (teacher.config.to_dict(), student.config.to_dict()) == before
    assert all(p.requires_grad for p in teacher.parameters())
    assert not (tmp_path / "out").exists()


def test_an_optimizer_in_the_deepspeed_config_has_no_settings_of_the_student(tmp_path):
    """DeepSpeed makes it, with one rate and one decay for all parameters."""
    for name in ("student_learning_rate", "student_weight_decay"):
        args = tiny_args(tmp_path, **{name: 0.02})
        args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
        with pytest.raises(ValueError, match=rf"`{name}=0.02` has no effect with the `optimizer` of .*'AdamW'"):
            check_arguments(args)
        args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"scheduler": {}})
        check_arguments(args)


def test_several_devices_are_refused_where_trainer_makes_the_arguments(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    monkeypatch.chdir(tmp_path)
    rows = tiny_rows(4)
    with pytest.raises(ValueError, match="One process with 2 devices runs `nn.DataParallel`"):
        CoDistillationTrainer(tiny_bert(2), None, collate, rows, student_model=tiny_bert(1))
    with pytest.raises(ValueError, match="One process with 2 devices runs `nn.DataParallel`"):
        tiny_trainer(tmp_path)


@pytest.mark.parametrize(("size", "kind"), [("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")])
def test_processes_that_share_rows_are_refused(size, kind):
    config = SimpleNamespace(**{"tp_size": 1, "cp_size": None, "sp_size": 1, "dp_shard_size": 4, size: 2})
    accelerator = SimpleNamespace(state=SimpleNamespace(), parallelism_config=config)
    with pytest.raises(ValueError, match=rf"`parallelism_config` has `{size}=2`.* support {kind} parallelism"):
        check_strategy(accelerator, False, None)
    setattr(config, size, 1)
    check_strategy(accelerator, False, None)


def test_models_that_are_divided_when_they_are_loaded_are_refused(tmp_path, monkeypatch):
    class Divided(torch.nn.Parameter):
        """Stands for a parameter of tensor or expert parallelism."""

    monkeypatch.setattr("ctcd_trainer.checks.models.DTensor", Divided)
    student = tiny_bert(2, 2)
    student.classifier.bias = Divided(student.classifier.bias.detach())
    with pytest.raises(ValueError, match="`student_model` is divided among processes: .*`classifier.bias`"):
        tiny_trainer(tmp_path, student_model=student)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_are_more_than_parameter_groups_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=rf"`optim='{optim}'` is more than a list of parameter groups"):
        tiny_trainer(tmp_path, optim=optim, optim_target_modules="all-linear")


def test_arguments_in_the_wrong_places_are_named(tmp_path):
    models, rows = (tiny_bert(3, 1), tiny_bert(2, 2)), {"train_dataset": tiny_rows()}
    args = tiny_args(tmp_path)
    by_name = r"given by name: `CoDistillationTrainer\(teacher, args, student_model=student"
    with pytest.raises(ValueError, match=f"`args` is a model .BertForSequenceClassification.*{by_name}"):
        CoDistillationTrainer(*models, args, **rows)
    with pytest.raises(ValueError, match=f"`data_collator` is a model .*{by_name}"):
        CoDistillationTrainer(models[0], args, models[1], **rows)
    with pytest.raises(TypeError, match="`args` is given twice"):
        CoDistillationTrainer(*models, args=args, **rows)
    with pytest.raises(ValueError, match="`args` is a dict. Pass `CoDistillationTrainingArguments"):
        CoDistillationTrainer(models[0], {"output_dir": "out"}, **rows, student_model=models[1])


def test_what_is_no_model_is_refused_by_the_argument(tmp_path):
    cls = type(tiny_bert())
    for name in ("model", "student_model", "pretrained_teacher"):
        with pytest.raises(ValueError, match=rf"`{name}` is the class Bert.*`{cls.__name__}.from_pretrained\(...\)`"):
            tiny_trainer(tmp_path, **{name: cls})
    with pytest.raises(ValueError, match=r"`student_model` is a BertConfig. Pass a model: .*from_config"):
        tiny_trainer(tmp_path, student_model=tiny_bert().config)
    with pytest.raises(ValueError, match="`student_model` is the function tiny_bert.* as `student_model_init`"):
        tiny_trainer(tmp_path, student_model=tiny_bert)


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=rf"`student_model='{missing}'`: There is no such folder"):
        tiny_trainer(tmp_path, student_model=missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`model='.*empty'`: The folder has no config.json, only \[\]"):
        tiny_trainer(tmp_path, model=tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"empty'`: The folder holds an adapter. Load it with `AutoPeftModelFor"):
        tiny_trainer(tmp_path, student_model=tmp_path / "empty")


def test_a_factory_of_optimizers_is_refused(tmp_path):
    class Muon:
        """As transformers takes it: made without arguments, then called with the model."""

        def __call__(self, model, **options):
            return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"`optimizer_cls_and_kwargs` has .*Muon.*no subclass of `torch.optim.Optim"):
        tiny_trainer(tmp_path, optimizer_cls_and_kwargs=(Muon, {}))
    tiny_trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))


def test_the_labels_that_are_checked_are_those_of_the_task(tmp_path):
    task = find_task(tiny_bert(1))
    task.label_names = ("target",)
    data = [{**row, "label": 99, "target": target} for row, target in zip(tiny_rows(4), (0, 1, 7, 1), strict=True)]
    with pytest.raises(ValueError, match=r"`train_dataset`: Label 7 of row 2 is out of range"):
        tiny_trainer(tmp_path, task=task, train_dataset=data)


@pytest.mark.parametrize("name", ["params", "model", "optimizer_dict", "Prodigy"])
def test_an_optimizer_that_is_made_for_one_model_is_refused(name, tmp_path):
    given = (torch.optim.SGD, {name: None, "lr": 0.1})
    if name == "Prodigy":
        given = (type("Prodigy", (torch.optim.SGD,), {}), {})
    with pytest.raises(ValueError, match=rf"`optimizer_cls_and_kwargs` has .*{name}.*parameter groups of two models"):
        tiny_trainer(tmp_path, optimizer_cls_and_kwargs=given)


def test_every_optimizer_of_trainer_was_compared_with_a_training_alone_or_is_refused():
    """All that run on a CPU were: each model gets the weights that it gets alone. A new one is to be compared."""
    joined = {
        *("adafactor", "adagrad", "ademamix", "apollo_adamw", "grokadamw", "rmsprop", "sgd", "stable_adamw"),
        *(f"adamw_{kind}" for kind in ("8bit", "anyprecision", "bnb_8bit", "torch", "torch_4bit", "torch_8bit")),
        *(f"adamw_torch_{kind}" for kind in ("fused", "npu_fused", "xla")),
        *(f"galore_{kind}" for kind in ("adafactor", "adamw", "adamw_8bit")),
        *("ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"),
        *(f"paged_{kind}_{bits}bit" for kind in ("adamw", "ademamix", "lion") for bits in (8, 32)),
        *(f"schedule_free_{kind}" for kind in ("adamw", "radam", "sgd")),
    }
    refused = set()
    for name in OptimizerNames:
        try:
            check_optimizer(None, None, {}, SimpleNamespace(optim=name))
        except ValueError:
            refused.add(name.value)
    assert refused.isdisjoint(joined)
    assert {name.value for name in OptimizerNames} <= joined | refused


def test_a_tokenizer_that_cannot_be_built_does_not_stop_a_training(tmp_path, monkeypatch):
    """It is wanted for a comparison alone; a library that it needs may be missing."""
    tiny_bert(2, 2).save_pretrained(tmp_path / "student")
    tokenizer_of(48).save_pretrained(tmp_path / "student")

    def broken(*args, **kwargs):
        raise ImportError("This tokenizer needs the SentencePiece library.")

    monkeypatch.setattr("ctcd_trainer.checks.tokens.AutoTokenizer.from_pretrained", broken)
    trainer = tiny_trainer(
        tmp_path, student_model=str(tmp_path / "student"), processing_class=tokenizer_of(48), max_steps=1
    )
    trainer.train()


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        ("regression", {"teacher_from_student_gate": "correct"}, "the gate 'correct' needs classes"),
        ("regression", {"teacher_from_student_gate": "confident"}, "the gate 'confident' needs classes"),
        (
            "single_label",
            {"student_from_teacher_gate": "wsl", "soft_loss_func": print},
            "`gate` has no effect on a `sof",
        ),
        (
            "single_label",
            {"edges": {"student->teacher": {"rows": "all"}}, "soft_loss_func": print},
            "`rows` has no effect on a `soft_loss_func`",
        ),
        (
            "single_label",
            {"teacher_from_student_gate": "wsl", "augmentation": Mixup()},
            "`Mixup` and the gate 'wsl' of teacher_from_student",
        ),
    ],
)
def test_settings_of_edges_that_do_not_fit_the_task_are_refused(problem, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, problem, **options)


def test_settings_of_edges_that_do_not_fit_tokens_or_an_unknown_head_are_refused():
    models = [tiny_model("bert", "token-classification", layers) for layers in (2, 1)]
    with pytest.raises(ValueError, match="`rows='unlabelled'` is for tasks of whole rows"):
        make_pair(*models, DistillationArguments(edges={"teacher->student": {"rows": "unlabelled"}}))
    unknown = [torch.nn.Linear(2, 2) for _ in range(2)]
    with pytest.raises(ValueError, match="of an unknown head it is not known which prediction is right"):
        make_pair(*unknown, DistillationArguments(student_from_teacher_weight="auto"), task=UnknownHead(None))


def test_numbers_are_not_smoothed(tmp_path):
    with pytest.raises(
        ValueError, match="`label_smoothing_factor=0.1` smooths classes, and the models predict numbers"
    ):
        tiny_trainer(tmp_path, "regression", label_smoothing_factor=0.1)
