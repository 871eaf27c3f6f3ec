"""A student with a tokenizer of its own."""

import copy

import pytest
import torch
from datasets import IterableDataset
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import tiny_model
from tiny_tokenizer import bert_tokenizer, gpt2_tokenizer
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    default_data_collator,
)

from ctcd_trainer import PairDataCollator, create_student
from ctcd_trainer.tasks.two_tokenizers import inputs_of_learner

TEXTS = [
    "the cat sees anna",
    "who likes the small red bird ?",
    "paul follows",
    "the dog",
    "anna sees paul .",
    "a sum :",
]


def tokenizers() -> tuple:
    students = gpt2_tokenizer()
    students.pad_token = students.eos_token
    return bert_tokenizer(), students


def rows(labels: bool = True) -> list[dict]:
    """Texts as both tokenizers see them: other ids, other lengths, and other names of inputs."""
    teachers, students = tokenizers()
    examples = []
    for index, text in enumerate(TEXTS * 2):
        own = {f"student_{name}": value for name, value in students(text).items()}
        examples.append({**teachers(text), **own, **({"labels": index % 3} if labels else {})})
    assert any(len(row["input_ids"]) != len(row["student_input_ids"]) for row in examples)
    return examples


def models() -> dict:
    teachers, students = tokenizers()
    torch.manual_seed(0)
    student = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=len(students),
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            num_labels=3,
            pad_token_id=students.pad_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.3,
        )
    )
    return {"model": tiny_bert(2, vocab_size=len(teachers), max_position_embeddings=64), "student_model": student}


def trainer_of(folder, **options):
    teachers, students = tokenizers()
    settings = {
        "train_dataset": rows(),
        "processing_class": teachers,
        "student_processing_class": students,
        "data_collator": None,
        **models(),
        **options,
    }
    return tiny_trainer(folder, **settings)


def naive_batch(examples: list[dict]) -> tuple[dict, dict, torch.Tensor]:
    teachers, students = tokenizers()
    own = [{k: v for k, v in row.items() if k != "labels" and not k.startswith("student_")} for row in examples]
    others = [{k[8:]: v for k, v in row.items() if k.startswith("student_")} for row in examples]
    labels = torch.tensor([row["labels"] for row in examples])
    return dict(teachers.pad(own, return_tensors="pt")), dict(students.pad(others, return_tensors="pt")), labels


def test_it_trains_as_plain_pytorch_does_with_two_batches(tmp_path):
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    trainer = trainer_of(tmp_path, **options, max_steps=3)
    pair = list(models().values())
    for step in range(3):
        *batches, labels = naive_batch(rows()[4 * step : 4 * step + 4])
        logits = [model.train()(**batch).logits for model, batch in zip(pair, batches, strict=True)]
        logs = [F.log_softmax(each, -1) for each in logits]
        loss = sum(F.cross_entropy(each, labels) for each in logits)
        for own, other in (logs, logs[::-1]):
            loss = loss + F.kl_div(own, other.detach(), reduction="batchmean", log_target=True)
        for model in pair:
            model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in (parameter for model in pair for parameter in model.parameters()):
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
    trainer.train()
    assert_same_weights(trainer.teacher_model, pair[0], 1e-5)
    assert_same_weights(trainer.student_model, pair[1], 1e-5)


def test_it_evaluates_predicts_and_resumes(tmp_path):
    whole = trainer_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    whole.train()
    metrics = whole.evaluate(rows())
    assert {"eval_loss", "eval_student_loss", "eval_agreement"} <= metrics.keys()
    output = whole.predict(rows(labels=False), student_predictions=True)
    *batches, _ = naive_batch(rows())
    with torch.no_grad():
        for predictions, model, batch in zip(
            (output.predictions, output.student_predictions), whole.pair.learners.values(), batches, strict=True
        ):
            torch.testing.assert_close(torch.tensor(predictions), model.eval()(**batch).logits, rtol=1e-4, atol=1e-4)
    resumed = trainer_of(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, whole.pair)


def test_each_model_is_saved_with_its_own_tokenizer(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        teachers, students = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder / "student")
        for saved, own in zip((teachers, students), tokenizers(), strict=True):
            assert saved(TEXTS[0])["input_ids"] == own(TEXTS[0])["input_ids"]


def test_a_frozen_teacher_has_the_tokenizer_of_the_teacher(tmp_path):
    trainer = trainer_of(
        tmp_path, distillation_mode="community", pretrained_teacher=models()["model"], logging_steps=1, max_steps=2
    )
    trainer.train()
    assert trainer.state.log_history[0]["student_from_pretrained_loss"] > 0


def test_the_collator_of_two_pads_each_with_its_own(tmp_path):
    teachers, students = tokenizers()
    collator = PairDataCollator(DataCollatorWithPadding(teachers), DataCollatorWithPadding(students))
    batch = collator(rows()[:4])
    first, second, labels = naive_batch(rows()[:4])
    for name, value in first.items():
        assert torch.equal(batch[name], value)
    for name, value in second.items():
        assert torch.equal(batch[f"student_{name}"], value)
    assert torch.equal(batch["labels"], labels)


def test_rows_without_a_label_are_compared_over_two_tokenizers(tmp_path):
    mixed = [{**row, "labels": row["labels"] if index % 2 else -100} for index, row in enumerate(rows())]
    trainer = trainer_of(tmp_path, train_dataset=mixed, edges={"student->teacher": {"rows": "all"}})
    batch = trainer.data_collator(mixed[:6])
    loss = trainer.compute_loss(trainer.pair, batch)
    *batches, labels = naive_batch(mixed[:6])
    with torch.no_grad():
        pairs = zip(models().values(), batches, strict=True)
        logs = [F.log_softmax(model.train()(**own).logits, -1) for model, own in pairs]
    expected = sum(F.nll_loss(each[labels != -100], labels[labels != -100]) for each in logs)
    for own, other in (logs, logs[::-1]):
        expected = expected + F.kl_div(own, other, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected)


def test_choices_have_two_tokenizers_as_well(tmp_path):
    teachers, students = tokenizers()
    students.pad_token = students.eos_token
    examples = []
    for index in range(8):
        choices = [TEXTS[index % 6], TEXTS[(index + 1) % 6]]
        own = {f"student_{name}": values for name, values in students(choices).items()}
        examples.append({**teachers(choices), **own, "labels": index % 2})
    torch.manual_seed(0)
    pair = [
        tiny_model("bert", "multiple-choice", layers, vocab_size=size)
        for layers, size in ((2, len(teachers)), (1, len(students)))
    ]
    collator = PairDataCollator(DataCollatorForMultipleChoice(teachers), DataCollatorForMultipleChoice(students))
    trainer = trainer_of(
        tmp_path, model=pair[0], student_model=pair[1], train_dataset=examples, data_collator=collator, max_steps=2
    )
    batch = collator(examples[:4])
    assert batch["input_ids"].shape[:2] == batch["student_input_ids"].shape[:2] == (4, 2)
    assert not any("label" in name for name in batch if name.startswith("student_"))
    loss = trainer.compute_loss(trainer.pair, batch)
    with torch.no_grad():
        both = [
            {name.removeprefix("student_"): value for name, value in batch.items() if name.startswith("student_")},
            {name: value for name, value in batch.items() if not name.startswith(("student_", "labels"))},
        ]
        logs = [F.log_softmax(model(**own).logits, -1) for model, own in zip(pair, both[::-1], strict=True)]
    expected = sum(F.nll_loss(each, batch["labels"]) for each in logs)
    for own, other in (logs, logs[::-1]):
        expected = expected + F.kl_div(own, other, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected)
    trainer.train()


def test_a_student_that_takes_fewer_inputs_gets_none_of_the_teachers(tmp_path):
    """A DistilBERT takes no token types, and the ones of the teacher would not fit."""
    teachers, _ = tokenizers()
    config = {"vocab_size": len(teachers), "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "num_labels": 3}
    student = DistilBertForSequenceClassification(DistilBertConfig(**config, max_position_embeddings=64))
    trainer = trainer_of(
        tmp_path,
        student_model=student,
        student_processing_class=teachers,
        train_dataset=[
            {**row, **{f"student_{k}": v for k, v in teachers(text + " .").items()}, "labels": 1}
            for text, row in zip(TEXTS, map(teachers, TEXTS), strict=True)
        ],
    )
    trainer.train()


def test_tasks_of_tokens_are_refused(tmp_path):
    teachers, students = tokenizers()
    pair = {"model": tiny_model("bert", "masked-lm"), "student_model": tiny_model("bert", "masked-lm", 1)}
    with pytest.raises(ValueError, match=r"`student_processing_class` is given, and masked-lm compares .* each token"):
        tiny_trainer(tmp_path, **pair, processing_class=teachers, student_processing_class=students)


def test_models_of_two_tokenizers_share_nothing(tmp_path):
    teacher = models()["model"]
    with pytest.raises(ValueError, match=r"`share='embeddings'` and `student_processing_class` are both given"):
        trainer_of(tmp_path, student_model=create_student(teacher, 1), share="embeddings")


def test_data_without_the_inputs_of_the_student_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` has no inputs of the student, only \['input_ids'"):
        trainer_of(tmp_path, train_dataset=tiny_rows())


@pytest.mark.parametrize("split", ["evaluate", "train"])
def test_a_batch_without_the_inputs_of_the_student_is_not_given_to_it(split, tmp_path):
    """Data that are read one by one, or given later, show only in a batch what they lack."""
    bare = [{name: value for name, value in row.items() if not name.startswith("student_")} for row in rows()]
    stream = IterableDataset.from_generator(lambda: iter(bare))
    options = {"train_dataset": stream} if split == "train" else {}
    trainer = trainer_of(tmp_path, data_collator=DataCollatorWithPadding(tokenizers()[0]), **options)
    with pytest.raises(ValueError, match=r"a batch has no inputs of the student, only \[.*'input_ids'.*PairDataColl"):
        trainer.train() if split == "train" else trainer.evaluate(bare)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, r"`student_model` was trained with another tokenizer than `student_processing_class`.* Pass the token"),
        (5, r"`student_model` has `vocab_size=5`, and the tokenizer has \d+ tokens \(`student_processing_class`\)"),
    ],
)
def test_a_tokenizer_that_is_not_the_students_is_refused(size, message, tmp_path):
    teachers, students = tokenizers()
    student = models()["student_model"]
    if size is None:
        student.save_pretrained(tmp_path / "student")
        students.save_pretrained(tmp_path / "student")
        student = type(student).from_pretrained(tmp_path / "student")
        trainer_of(tmp_path, student_model=student)
    else:
        student.resize_token_embeddings(size)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, student_model=student, student_processing_class=teachers)


def test_a_column_that_only_sounds_like_the_students_is_none_of_its_inputs(tmp_path):
    """With `remove_unused_columns=False` any column can be in a batch."""
    trainer = tiny_trainer(tmp_path)
    inputs = {**collate(tiny_rows(4)), "student_id": torch.arange(4)}
    for learner in ("teacher", "student", "pretrained"):
        assert inputs_of_learner(learner, inputs, ("labels",), trainer.pair.known_inputs) == inputs
    with pytest.raises(ValueError, match="a batch has no inputs of the student"):
        inputs_of_learner("student", inputs, ("labels",), trainer.pair.known_inputs, two_tokenizers=True)
    loss = trainer.compute_loss(trainer.pair, inputs)
    inputs.pop("student_id")
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.pair, inputs))


class TwoMasks(BertForSequenceClassification):
    """Has an input with `student_` before its name."""

    def forward(self, input_ids, attention_mask=None, student_attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask * student_attention_mask, labels=labels)


def test_with_one_tokenizer_an_input_of_the_model_is_its_own_whatever_its_name(tmp_path):
    rows = [{**row, "student_attention_mask": [1] * 5 + [0] * 3} for row in tiny_rows(8)]
    models = [TwoMasks(tiny_bert(layers, seed).config) for layers, seed in ((3, 1), (2, 2))]
    options = {"train_dataset": rows, "data_collator": default_data_collator}
    args = {"max_steps": 2, "distillation_mode": "standalone"}
    teacher, student = copy.deepcopy(models)
    tiny_trainer(tmp_path, model=teacher, student_model=student, **options, **args).train()
    for trained, model in zip((teacher, student), models, strict=True):
        Trainer(model, tiny_args(tmp_path, max_steps=2), **options).train()
        assert_same_weights(trained, model)


def test_a_collator_of_two_tokenizers_needs_the_second_one(tmp_path):
    with pytest.raises(ValueError, match=r"`PairDataCollator`, and `student_processing_class` is None"):
        tiny_trainer(tmp_path, data_collator=PairDataCollator(collate, collate))


def test_data_with_a_column_that_only_sounds_like_the_students_are_refused(tmp_path):
    data = [{**row, "student_id": 3} for row in tiny_rows()]
    with pytest.raises(ValueError, match=r"`train_dataset` has no inputs of the student, only .*'student_id'"):
        trainer_of(tmp_path, train_dataset=data)
