"""Cutting a student from a teacher, and loading models by name or path."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, weights_of
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ctcd_trainer import create_student
from ctcd_trainer.pair.loading import load_model
from ctcd_trainer.students.cutting import uniform_layers


def test_layers_are_kept_evenly_with_the_first_and_the_last():
    assert [uniform_layers(6, k) for k in (1, 2, 3, 4, 6)] == [
        [0],
        [0, 5],
        [0, 2, 5],
        [0, 2, 3, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    assert uniform_layers(12, 6) == [0, 2, 4, 7, 9, 11]


def test_a_student_has_the_weights_of_the_layers_that_it_keeps():
    teacher = tiny_bert(6, problem="multi_label")
    before = weights_of(teacher)
    student = create_student(teacher, 3)
    assert student.config.num_hidden_layers == len(student.bert.encoder.layer) == 3
    assert student.config.num_labels == 4
    assert student.config.problem_type == "multi_label_classification"
    for new, old in enumerate([0, 2, 5]):
        assert_same_weights(student.bert.encoder.layer[new], teacher.bert.encoder.layer[old])
    assert_same_weights(student.bert.embeddings, teacher.bert.embeddings)
    assert_same_weights(student.classifier, teacher.classifier)
    assert_same_weights(teacher, before)
    assert teacher.config.num_hidden_layers == 6
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}


def test_a_student_of_all_layers_gives_the_teachers_logits():
    teacher = tiny_bert(4).eval()
    batch = collate(tiny_rows(3))
    student = create_student(teacher, 4).eval()
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)


TINY = {"vocab_size": 48, "num_labels": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "teacher",
    [
        DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=4, n_heads=2, hidden_dim=32, **TINY)),
        GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=32, **TINY)),
        LlamaForSequenceClassification(
            LlamaConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, **TINY)
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_students_of_other_families_save_load_and_run(teacher, tmp_path):
    student = create_student(teacher, 2)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = collate(tiny_rows(3))
    batch.pop("labels")
    torch.testing.assert_close(loaded(**batch).logits, student.eval()(**batch).logits)
    assert loaded.config.num_hidden_layers == 2
    assert loaded.num_parameters() < teacher.num_parameters()


def test_cutting_a_student_does_not_move_the_random_state():
    teacher = tiny_bert(4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    create_student(teacher, 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("layers", [0, 5])
def test_a_number_of_layers_that_the_teacher_cannot_give_is_refused(layers):
    with pytest.raises(ValueError, match=f"`num_hidden_layers={layers}` is not valid: the teacher has 4 layers"):
        create_student(tiny_bert(4), layers)


def test_a_model_with_adapters_is_refused():
    adapted = get_peft_model(tiny_bert(4), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match="`teacher` is wrapped by PEFT.*merge_and_unload"):
        create_student(adapted, 2)


def test_a_student_by_path_keeps_labels_of_its_own(tmp_path):
    own = {0: "a", 1: "b", 2: "c"}
    tiny_bert(2, id2label=own, label2id={"a": 0, "b": 1, "c": 2}).save_pretrained(tmp_path)
    assert load_model(tmp_path, "student_model", like=tiny_bert(3)).config.id2label == own


def test_a_student_by_path_gets_the_teachers_labels(tmp_path):
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path)
    teacher = tiny_bert(3, id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2})
    student = load_model(str(tmp_path), "student_model", like=teacher)
    assert (student.config.num_labels, student.config.problem_type) == (3, "single_label_classification")
    assert student.config.id2label == {0: "no", 1: "maybe", 2: "yes"}


def test_a_teacher_by_path_gets_the_head_that_it_was_saved_with(tmp_path):
    tiny_bert(2).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), "model")).__name__ == "BertForSequenceClassification"


def test_a_teacher_by_path_without_a_head_is_refused(tmp_path):
    BertModel(BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"`model=.* was saved as \['BertModel'\], which has no head.*AutoModelFor"):
        load_model(str(tmp_path), "model")
