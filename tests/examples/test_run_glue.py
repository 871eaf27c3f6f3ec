"""`examples/run_glue_ctcd.py` and what it is made of, on tiny models and data, without a network."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from places import ROOT
from safetensors.torch import load_file
from script_glue import GLUE_LABELS, WORDS, glue_rows, save_files, save_glue, save_model, save_rows, sentences
from script_runs import printed_table, results, save_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    EvalPrediction,
)

from ctcd_trainer import CoDistillationTrainingArguments, Mixup, TokenMasking, WordDropout
from examples import run_glue_ctcd
from examples.common import arguments
from examples.common import models as script_models
from examples.common import run as common_run
from examples.data import glue as glue_data
from examples.data.glue import GlueMetric, metrics_for
from examples.data.loading import load_files
from examples.data.metrics import GLUE_SCORES


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("student"), layers=1, seed=1, head=False)


def predicted(path: Path) -> list[str]:
    """The second column of a file of predictions, whose first column must count from 0."""
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    indices, predictions = zip(*(line.split("\t") for line in lines), strict=True)
    assert list(indices) == [str(index) for index in range(len(lines))]
    return list(predictions)


def logits_of(folder: Path, *texts: list[str]) -> torch.Tensor:
    """Logits of a saved model one row at a time, by plain transformers."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        rows = [model(**tokenizer(*row, return_tensors="pt")).logits[0] for row in zip(*texts, strict=True)]
    return torch.stack(rows)


# ---- GLUE tasks ----


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("cola", {"matthews_correlation"}),
        ("stsb", {"pearson", "spearmanr", "combined_score"}),
        ("mrpc", {"accuracy", "f1", "combined_score"}),
    ],
)
def test_glue_task_writes_the_results_of_both_models(script, tmp_path, teacher, capsys, task, keys):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 2, "task_name": task}
    out = script("--do_train", "--do_eval", dataset_name=save_glue(tmp_path / "glue", task), **options)

    agreement = set() if task == "stsb" else {"eval_agreement"}
    both = {f"eval_{name}{key}" for name in ("", "student_") for key in (*keys, "loss")}
    timing = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert set(results(out)) == both | agreement | timing | {"eval_samples", "epoch"}
    assert results(out)["eval_samples"] == 13
    assert results(out, "train")["train_samples"] == 12
    assert results(out, "all") == results(out, "train") | results(out)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2

    for folder, layers in ((out, 3), (out / "student", 2)):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.num_hidden_layers == layers
        assert list(model.config.id2label.values()) == GLUE_LABELS.get(task, ["LABEL_0"])
    lines = printed_table(capsys.readouterr().out)
    assert lines[0] == ["teacher", "student"]
    assert {line[0] for line in lines[2:]} == {*keys, "loss"} | {key.removeprefix("eval_") for key in agreement}
    loss = next(line for line in lines if line[0] == "loss")
    assert loss[1:] == [f"{results(out)[key]:.4f}" for key in ("eval_loss", "eval_student_loss")]


def test_mnli_has_two_validation_and_two_test_sets(script, tmp_path, teacher):
    folder = save_glue(tmp_path / "glue", "mnli")
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "dataset_name": folder}
    out = script("--do_train", "--do_eval", "--do_predict", task_name="MNLI", max_predict_samples=5, **options)
    found = results(out)
    for part, suffix, task in ((0, "", "mnli"), (1, "_mm", "mnli-mm")):
        rows, test = glue_rows("mnli", 13 + part, 10 + 10 * part), glue_rows("mnli", 15 + part, 30 + 10 * part)
        assert found[f"eval_samples{suffix}"] == len(rows)
        choices = []
        for model_folder, model in ((out, ""), (out / "student", "student_")):
            choice = logits_of(model_folder, rows["premise"], rows["hypothesis"]).argmax(-1).numpy()
            choices.append(choice)
            assert found[f"eval_{model}accuracy{suffix}"] == pytest.approx((choice == np.array(rows["label"])).mean())
            choice = logits_of(model_folder, test["premise"][:5], test["hypothesis"][:5]).argmax(-1)
            names = predicted(out / f"predict_results_{task}{'_student' if model else ''}.txt")
            assert names == [GLUE_LABELS["mnli"][index] for index in choice]
        assert found[f"eval_agreement{suffix}"] == pytest.approx((choices[0] == choices[1]).mean())


def test_predictions_are_in_the_order_of_the_data_when_grouped_by_length(script, tmp_path, teacher):
    out = script(
        "--do_train",
        "--do_predict",
        model_name_or_path=teacher,
        student_num_hidden_layers=1,
        dataset_name=save_glue(tmp_path / "glue", "stsb"),
        task_name="stsb",
        train_sampling_strategy="group_by_length",
        pad_to_max_length=False,
        per_device_eval_batch_size=3,
    )
    rows = glue_rows("stsb", 14, 20)
    for folder, suffix in ((out, ""), (out / "student", "_student")):
        scores = [float(score) for score in predicted(out / f"predict_results_stsb{suffix}.txt")]
        expected = logits_of(folder, rows["sentence1"], rows["sentence2"])[:, 0].numpy()
        assert np.ptp(expected) > 0.05  # else any order would do
        np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_labels_in_the_order_of_a_model_that_knows_them(script, tmp_path):
    own = {"EQUIVALENT": 0, "NOT_EQUIVALENT": 1}
    model = save_model(tmp_path / "model", label2id=own, id2label={index: name for name, index in own.items()})
    out = script(
        "--do_train",
        "--do_eval",
        "--do_predict",
        model_name_or_path=model,
        student_num_hidden_layers=1,
        dataset_name=save_glue(tmp_path / "glue", "mrpc"),
        task_name="mrpc",
    )
    rows, test = glue_rows("mrpc", 13, 10), glue_rows("mrpc", 14, 20)
    for folder, prefix, suffix in ((out, "eval_", ""), (out / "student", "eval_student_", "_student")):
        config = json.loads((folder / "config.json").read_text())
        assert config["label2id"] == {"equivalent": 0, "not_equivalent": 1}
        right = logits_of(folder, rows["sentence1"], rows["sentence2"]).argmax(-1).numpy() == 0  # says "equivalent"
        truth = np.asarray(rows["label"]) == GLUE_LABELS["mrpc"].index("equivalent")
        assert results(out)[f"{prefix}accuracy"] == pytest.approx((right == truth).mean())
        expected_f1 = 2 * (right & truth).sum() / (right.sum() + truth.sum())
        assert results(out)[f"{prefix}f1"] == pytest.approx(expected_f1)
        expected = logits_of(folder, test["sentence1"], test["sentence2"]).argmax(-1).tolist()
        names = predicted(out / f"predict_results_mrpc{suffix}.txt")
        assert names == [("equivalent", "not_equivalent")[index] for index in expected]


# ---- Own files ----


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_files_with_label_names_and_a_student_by_path(script, tmp_path, teacher, student, suffix):
    files = save_files(tmp_path, ["meh", "bad", "good"], suffix)
    test = [{"number": i, "text": text} for i, text in enumerate(sentences(5, 9))]  # no labels, another column
    options = {**files, "test_file": save_rows(tmp_path / f"test.{suffix}", test)}
    out = script(
        "--do_train",
        "--do_eval",
        "--do_predict",
        model_name_or_path=teacher,
        student_model_name_or_path=student,
        **options,
    )
    for folder, name, layers in ((out, "", 3), (out / "student", "_student", 1)):
        config = json.loads((folder / "config.json").read_text())
        assert config["label2id"] == {"bad": 0, "good": 1, "meh": 2}
        assert config["num_hidden_layers"] == layers
        assert config["problem_type"] == "single_label_classification"
        expected = logits_of(folder, [row["text"] for row in test]).argmax(-1).tolist()
        assert predicted(out / f"predict_results{name}.txt") == [["bad", "good", "meh"][index] for index in expected]
    assert {"eval_accuracy", "eval_student_accuracy", "eval_agreement"} <= set(results(out))


BAD_FILES = {
    "a.csv": ("", "a.csv` holds nothing: there are no rows"),
    "b.csv": ("text,label\n", r"b.csv` holds the header \['text', 'label'\] alone"),
    "c.csv": ('text,label\na,1\n"b,0\nc,1\n', "c.csv`, line 3: a double quote opens a text and none closes it"),
    "d.csv": ("text;label\na, b;1\n", "d.csv`, line 1: the columns 'text;label' are separated by ';'.* commas"),
    "e.csv": ("text,label\na,1\nb, c,0\n", "e.csv`, line 3: 3 fields, and the 2 columns.*double quotes"),
    "f.csv": (b"text,label\n\xe4,1\n", "f.csv` is not encoded in UTF-8.*0xe4"),
    "g.json": ("", "g.json` cannot be read as json: the file is empty"),
    "h.json": ("[]", "h.json` cannot be read as json: it has no rows"),
    "i.jsonl": ('{"text": "a", "label": 1}\n{"text": "b",', "i.jsonl` cannot be read as json: line 2, character"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_line(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"`--train_file .*{message}"):
        load_files({"train": str(tmp_path / name)}, str(tmp_path / "cache"))


def test_texts_with_quotes_and_line_breaks_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a ""b"", c",1\n\n"two\nlines",0\n')
    rows = load_files({"train": str(tmp_path / "a.csv")}, str(tmp_path / "cache"))["train"]
    assert rows["text"][:] == ['a "b", c', "two\nlines"]


def test_the_columns_may_have_other_names(script, tmp_path, teacher):
    rows = [{"id": f"row {i}", "body": text, "head": "a film", "kind": "xy"[i % 2], "label": 7} for i, text in
            enumerate(sentences(8, 1))]  # fmt: skip
    files = {f"{split}_file": save_rows(tmp_path / f"{split}.csv", rows) for split in ("train", "validation")}
    options = {**files, "model_name_or_path": teacher, "student_num_hidden_layers": 1, "label_column_name": "kind"}
    assert "eval_student_accuracy" in results(script("--do_eval", **options, text_column_names="head,body"))
    with pytest.raises(
        ValueError, match=r"`--label_column_name sort` is not a column of the data: give one of \['id'"
    ):
        script("--do_eval", **{**options, "label_column_name": "sort"})
    with pytest.raises(ValueError, match=r"`--text_column_names body,title`: give one or two columns of the data"):
        script("--do_eval", **options, text_column_names="body,title")
    rows = Dataset.from_list(rows)
    named = glue_data.named_label(DatasetDict(train=rows), "kind")["train"]
    assert named["label"][:2] == ["x", "y"]
    assert glue_data.text_columns(named, None, "head,body") == ("head", "body")


def test_files_with_scores_are_a_regression(script, tmp_path, teacher):
    files = save_files(tmp_path, [0.5, 2.25, -1.0])
    out = script("--do_train", "--do_eval", model_name_or_path=teacher, student_num_hidden_layers=1, **files)
    texts, scores = sentences(12, 1), np.resize([0.5, 2.25, -1.0], 12)
    for folder, key in ((out, "eval_mse"), (out / "student", "eval_student_mse")):
        assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"
        expected = np.square(logits_of(folder, texts)[:, 0].numpy() - scores).mean()
        assert results(out)[key] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("labels", [[["red", "blue"], [], ["red"]], [[1, 1], [0, 0], [0, 1]]], ids=["names", "0/1"])
def test_files_with_several_labels_per_row(script, tmp_path, teacher, labels):
    names = ["blue", "red"] if labels[1] == [] else ["LABEL_0", "LABEL_1"]
    truth = np.resize([[1, 1], [0, 0], [0, 1]], (12, 2)).astype(bool)
    files = save_files(tmp_path, labels, "jsonl")
    test_file = save_rows(tmp_path / "test.jsonl", [{"text": text} for text in sentences(12, 1)])
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "test_file": test_file, **files}
    out = script("--do_train", "--do_eval", "--do_predict", **options)
    for folder, prefix, suffix in ((out, "eval_", ""), (out / "student", "eval_student_", "_student")):
        config = AutoConfig.from_pretrained(folder)
        assert config.problem_type == "multi_label_classification"
        assert list(config.id2label.values()) == names
        present = (logits_of(folder, sentences(12, 1)) > 0).numpy()
        assert results(out)[f"{prefix}accuracy"] == pytest.approx((present == truth).all(1).mean())
        expected_f1 = 2 * (present & truth).sum() / (present.sum() + truth.sum())
        assert results(out)[f"{prefix}f1_micro"] == pytest.approx(expected_f1)
        rows = [",".join(np.array(names)[row]) for row in present]
        assert predicted(out / f"predict_results{suffix}.txt") == rows


def test_numbers_and_empty_cells(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("id,review,label\n7,the film,10\n8,,9\n9,good,10\n")
    rows = load_files({"train": str(path)}, str(tmp_path / "cache"))["train"]
    labels = glue_data.Labels.of(rows)
    assert labels.names == ("9", "10")  # by number, not as text
    assert glue_data.text_columns(rows, None) == ("review",)
    save_tokenizer(tmp_path, WORDS)
    preprocess = glue_data.Preprocessor(AutoTokenizer.from_pretrained(tmp_path), ("review",), labels, 8, pad=False)
    tokens = preprocess(rows[:])
    assert [len(ids) for ids in tokens["input_ids"]] == [4, 2, 3]
    assert tokens["labels"] == [1, 0, 1]


def test_lists_of_class_labels():
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["a", "b", "c"]))})
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [[2, 0], []]}, features)
    labels = glue_data.Labels.of(rows)
    assert labels.for_config["id2label"] == {0: "a", 1: "b", 2: "c"}
    assert labels.encode(rows["label"]) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_two_text_columns_are_a_pair():
    rows = Dataset.from_dict({"label": [0], "zeroth": ["x"], "sentence2": ["b"], "sentence1": ["a"]})
    assert glue_data.text_columns(rows, None) == ("sentence1", "sentence2")
    assert glue_data.text_columns(rows.remove_columns("sentence1"), None) == ("zeroth", "sentence2")


# ---- How the script is run ----


@pytest.mark.slow
def test_config_file_in_a_process_of_its_own(tmp_path, teacher):
    """As a user runs it: alone, from another folder, without a network."""
    arguments = {
        "model_name_or_path": teacher,
        "student_num_hidden_layers": 1,
        **save_files(tmp_path, ["no", "yes"]),
        "max_seq_length": 16,
        "max_steps": 1,
        "do_train": True,
        "do_eval": True,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    command = [sys.executable, str(ROOT / "examples" / "run_glue_ctcd.py"), "arguments.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "parameters (M)" in run.stdout
    assert {"eval_accuracy", "eval_student_accuracy"} <= set(results(tmp_path / "out"))


def test_the_student_is_cut_as_the_arguments_say(script, tmp_path, teacher, caplog):
    files = save_files(tmp_path, ["no", "yes"])
    options = {"student_layers": "0,2", "student_intermediate_size": 12, "share": "layers:1", "max_steps": 2}
    with pytest.raises(ValueError, match=r"`share='layers:1'`: .* \(12,\) in the student"):
        script("--do_train", model_name_or_path=teacher, **options, **files)
    options |= {"share": "embeddings", "log_level": "info"}
    out = script("--do_train", model_name_or_path=teacher, **options, **files, output_dir=tmp_path / "shared")
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (out, out / "student")]
    assert (models[1].config.num_hidden_layers, models[1].config.intermediate_size) == (2, 12)
    embeddings = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(*embeddings)
    assert "M parameters" in caplog.text


def test_the_student_is_aligned_before_the_training_but_not_again_when_it_goes_on(script, tmp_path, teacher, caplog):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "task_name": "mrpc", "max_steps": 2}
    options |= {"dataset_name": save_glue(tmp_path / "glue", "mrpc"), "learning_rate": 0.0, "save_steps": 1}
    options |= {"save_strategy": "steps", "log_level": "info"}
    more = tmp_path / "more.json"
    row = {"sentence1": "the cat sat", "sentence2": "it felt long"}
    more.write_text("\n".join(json.dumps(row) for _ in range(20)))
    names = {"no": {}, "rows": {"align_steps": 2}, "file": {"align_steps": 2, "align_file": more}}
    states = {}
    for name, own in names.items():
        out = script("--do_train", **options, **own, output_dir=tmp_path / name)
        states[name] = load_file(out / "student" / "model.safetensors")
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "no" / "model.safetensors").read_bytes()
    layer = "bert.encoder.layer.0.output.dense.weight"
    assert len({states[name][layer].sum().item() for name in names}) == 3  # all differ
    assert torch.equal(states["no"]["classifier.weight"], states["rows"]["classifier.weight"])
    assert "Aligning the student with the teacher for 2 steps" in caplog.text
    caplog.clear()
    resumed = {"output_dir": tmp_path / "rows", "resume_from_checkpoint": tmp_path / "rows" / "checkpoint-1"}
    script("--do_train", **options, **names["rows"], **resumed)
    assert "is aligned already" in caplog.text
    assert "Aligning" not in caplog.text
    with pytest.raises(ValueError, match="`--align_steps 0`: give a number of steps"):
        script("--do_train", **options, align_file=more)
    with pytest.raises(ValueError, match="`--align_steps 2` is not valid: give 0 or more, and a student"):
        script(
            "--do_train", align_steps=2, distillation_mode="standalone", task_name="mrpc", model_name_or_path=teacher
        )


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_texts_without_labels_are_trained_on_as_well(script, tmp_path, teacher, caplog, task):
    folder = save_glue(tmp_path / "glue", task)
    more = tmp_path / "more.json"
    row = dict.fromkeys(glue_data.TASK_TO_TEXT[task], "the cat sat")
    more.write_text("\n".join(json.dumps({**row, "label": "not looked at"}) for _ in range(20)))
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "task_name": task}
    options |= {"dataset_name": folder, "num_train_epochs": 1, "logging_steps": 1}
    out = script("--do_train", "--do_eval", **options, unlabeled_file=more)
    assert results(out, "train")["train_samples"] == 32
    assert "20 of 32 rows of `train_dataset` have no label" in caplog.text
    with pytest.raises(ValueError, match="Row 12 and 19 more have no label"):
        script("--do_train", **options, unlabeled_file=more, distillation_mode="standalone")
    more.write_text('{"text": "the cat sat"}')
    with pytest.raises(ValueError, match=r"`--unlabeled_file .*more.json` has no column 'sentence1'"):
        script("--do_train", **options, unlabeled_file=more)
    with pytest.raises(ValueError, match="`--unlabeled_file nowhere.csv` does not exist"):
        script("--do_train", **options, unlabeled_file="nowhere.csv")


def test_training_batches_are_augmented(script, tmp_path, teacher, monkeypatch):
    save_tokenizer(tmp_path / "tokens", WORDS, mask_token="long")
    trainers = []
    monkeypatch.setattr(common_run, "train", lambda trainer, _: trainers.append(trainer) or trainer.train())
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "max_steps": 2, "learning_rate": 1e-3}
    options |= {"tokenizer_name": tmp_path / "tokens", **save_files(tmp_path, ["no", "yes"])}
    choices = [
        ({}, None, None),
        ({"augmentation": "token_masking", "augmented": "student"}, TokenMasking, ("rate", 0.15)),
        ({"augmentation": "word_dropout", "augmentation_rate": 0.5}, WordDropout, ("rate", 0.5)),
        ({"augmentation": "mixup", "augmentation_rate": 2.0}, Mixup, ("alpha", 2.0)),
    ]
    weights = []
    for own, kind, setting in choices:
        script("--do_train", **options, **own)
        found = trainers[-1]
        assert found.augmented == own.get("augmented", "both")
        assert type(found.augmentation) is (kind or type(None))
        if kind is not None:
            assert getattr(found.augmentation, setting[0]) == setting[1]
        weights.append(found.student_model.classifier.weight.detach().clone())
    for index, weight in enumerate(weights):
        assert not any(torch.equal(weight, other) for other in weights[:index])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"augmentation_rate": 0.5}, "`--augmentation_rate 0.5` has no effect without `--augmentation`"),
        ({"augmented": "student"}, "`augmented='student'` has no effect without `augmentation`"),
        ({"augmentation": "token_masking"}, "has no mask token.*`WordDropout`"),
        ({"augmentation": "mixup", "augmented": "teacher"}, "`Mixup` with `augmented='teacher'`"),
        ({"augmentation": "word_dropout", "augmentation_rate": 2}, "`rate=2.0` is not valid"),
    ],
)
def test_augmentations_that_do_not_fit_are_refused(script, tmp_path, teacher, own, message):
    files = save_files(tmp_path, ["no", "yes"])
    with pytest.raises(ValueError, match=message):
        script("--do_train", model_name_or_path=teacher, student_num_hidden_layers=1, **files, **own)


@pytest.mark.parametrize("pad", [True, False])
def test_a_student_of_another_tokenizer_reads_with_its_own(script, tmp_path, teacher, pad):
    student = save_model(tmp_path / "other", layers=1, head=False)
    save_tokenizer(tmp_path / "other", WORDS[::-1])
    options = {"model_name_or_path": teacher, "student_model_name_or_path": student, "task_name": "mrpc"}
    folder = save_glue(tmp_path / "glue", "mrpc")
    out = script("--do_train", "--do_eval", **options, dataset_name=folder, pad_to_max_length=pad)
    own = [AutoTokenizer.from_pretrained(each).get_vocab() for each in (out / "student", student, teacher)]
    assert own[0] == own[1] != own[2]
    rows = glue_rows("mrpc", 13, 10)
    for model, prefix in ((out, ""), (out / "student", "student_")):
        choice = logits_of(model, rows["sentence1"], rows["sentence2"]).argmax(-1).numpy()
        accuracy = (choice == np.array(rows["label"])).mean()
        assert results(out)[f"eval_{prefix}accuracy"] == pytest.approx(accuracy)


def test_yaml_config_file(monkeypatch, tmp_path):
    text = "{model_name_or_path: m, student_num_hidden_layers: 2, task_name: rte, do_eval: true, learning_rate: 0.25}"
    (tmp_path / "arguments.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["run_glue_ctcd.py", str(tmp_path / "arguments.yaml")])
    model_args, data_args, training_args = arguments.parse_arguments(
        arguments.LabelledModelArguments, run_glue_ctcd.GlueDataArguments, CoDistillationTrainingArguments
    )
    assert (model_args.student_num_hidden_layers, data_args.task_name) == (2, "rte")
    assert training_args.learning_rate == 0.25


@pytest.mark.parametrize("named", [True, False], ids=["by name", "the last one"])
def test_resume_gives_the_same_weights(script, tmp_path, teacher, named):
    files = save_files(tmp_path, ["no", "yes"])
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "max_steps": 4, **files}
    options |= {"save_strategy": "steps", "save_steps": 2}
    out = script("--do_train", **options)
    whole = [load_file(folder / "model.safetensors") for folder in (out, out / "student")]
    if not named:
        (out / "checkpoint-4").rename(tmp_path / "elsewhere")
        for folder in (out, out / "student"):
            (folder / "model.safetensors").unlink()
    checkpoint = {"resume_from_checkpoint": out / "checkpoint-2" if named else "true"}
    again = script("--do_train", **options, **checkpoint, output_dir=tmp_path / "again" if named else out)
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 4
    for expected, folder in zip(whole, (again, again / "student"), strict=True):
        actual = load_file(folder / "model.safetensors")
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_old_checkpoints_are_not_resumed_unasked(script, tmp_path, teacher, caplog):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, **save_files(tmp_path, ["no", "yes"])}
    out = script("--do_train", max_steps=1, save_strategy="steps", save_steps=1, **options)
    first = load_file(out / "model.safetensors")
    script("--do_train", max_steps=1, **options)
    assert "Training from the start" in caplog.text
    assert all(torch.equal(value, first[name]) for name, value in load_file(out / "model.safetensors").items())


def test_standalone_with_one_model_and_with_two(script, tmp_path, capsys):
    """A model trained alone and one trained beside another, with no soft loss, become the same (without dropout)."""
    files = save_files(tmp_path, ["no", "yes"])
    options = {**files, "distillation_mode": "standalone"}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "head": False}
    teacher, student = save_model(tmp_path / "t", 3, **still), save_model(tmp_path / "s", 1, seed=1, **still)
    both = tmp_path / "both"
    script("--do_train", model_name_or_path=teacher, student_model_name_or_path=student, output_dir=both, **options)
    for path, folder in ((teacher, both), (student, both / "student")):
        capsys.readouterr()
        alone = script("--do_train", "--do_eval", model_name_or_path=path, **options)
        assert not (alone / "student").exists()
        assert "eval_student_loss" not in results(alone)
        assert capsys.readouterr().out.split("\n\n")[-1].split()[0] == "model"
        actual, expected = (load_file(f / "model.safetensors") for f in (folder, alone))
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_community_mode_learns_from_a_third_model(script, tmp_path, teacher):
    files = save_files(tmp_path, ["no", "yes"])
    names = {"label2id": {"no": 0, "yes": 1}, "id2label": {0: "no", 1: "yes"}}
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "distillation_mode": "community"}
    frozen = save_model(tmp_path / "frozen", seed=5, **names)
    out = script("--do_train", pretrained_teacher_name_or_path=frozen, logging_steps=1, **options, **files)
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["student_from_pretrained_loss"] > 0

    swapped = {"label2id": {"no": 1, "yes": 0}, "id2label": {0: "yes", 1: "no"}}
    frozen = save_model(tmp_path / "swapped", seed=5, **swapped)
    with pytest.raises(
        ValueError, match=r"was trained with the labels \['yes', 'no'\], not \['no', 'yes'\]. It is fro"
    ):
        script("--do_train", pretrained_teacher_name_or_path=frozen, **options, **files)


def test_generations_learn_from_the_best_teacher_before_them(script, tmp_path, teacher, capsys):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "generations": 2, "learning_rate": 0.01}
    out = script("--do_train", "--do_eval", output_dir=tmp_path / "out", **options, **save_files(tmp_path, ["a", "b"]))
    found = json.loads((out / "best" / "generations.json").read_text())
    assert len(found["metrics"]) == 2
    trained = [torch.load(out / f"generation-{n}" / "training_args.bin", weights_only=False) for n in (1, 2)]
    assert [args.student_from_pretrained_weight for args in trained] == [0.0, 1.0]
    for part, key in (("", "eval_loss"), ("student", "eval_student_loss")):
        best = min((1, 2), key=lambda number: found["metrics"][number - 1][key])
        actual = load_file(out / part / "model.safetensors")
        expected = load_file(out / f"generation-{best}" / part / "model.safetensors")
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert results(out)[key] == pytest.approx(found["metrics"][best - 1][key], rel=1e-5)
    table = capsys.readouterr().out.split("loss of each generation")[1]
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["generation", "1", "2"]


def test_limits_of_samples_and_length(script, tmp_path, teacher, caplog):
    files = save_files(tmp_path, ["no", "yes"])
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "max_seq_length": 99, **files}
    out = script("--do_train", "--do_eval", max_train_samples=5, max_eval_samples=100, **options)
    assert results(out, "train")["train_samples"] == 5
    assert results(out)["eval_samples"] == 12
    assert "`--max_seq_length 99` is more than" in caplog.text
    assert "Using 32" in caplog.text


def test_the_table_of_positions_limits_the_length(tmp_path):
    save_tokenizer(tmp_path, WORDS, model_max_length=10**30)
    model = BertModel(BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    limits = script_models.limits_of_length(AutoTokenizer.from_pretrained(tmp_path), {"student_model": model})
    assert min(limits) == (512, "`student_model`")
    model.embeddings.position_embeddings = torch.nn.Embedding(514, 4, padding_idx=1)  # as RoBERTa counts
    limits = script_models.limits_of_length(AutoTokenizer.from_pretrained(tmp_path), {"student_model": model})
    assert min(limits) == (512, "`student_model`")


def test_model_cards_name_task_and_data(script, tmp_path, teacher):
    folder = save_glue(tmp_path / "glue", "cola")
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "dataset_name": folder}
    out = script("--do_train", "--do_eval", task_name="cola", **options)
    for path in (out / "README.md", out / "student" / "README.md"):
        assert "GLUE COLA" in path.read_text()
        assert "text-classification" in path.read_text()
        assert "Gain over the baseline" not in path.read_text()
    alone = json.loads((out / "all_results.json").read_text())["eval_student_matthews_correlation"]
    second = tmp_path / "second"
    script("--do_train", "--do_eval", task_name="cola", output_dir=second, baseline=out, **options)
    assert f"| matthews correlation | {alone:.4f} |" in (second / "student" / "README.md").read_text()


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_name": "rte", "baseline": "nowhere"}, "`--baseline nowhere` has no all_results.json"),
        (
            {"task_name": "snli"},
            "`--task_name snli` is unknown. Valid tasks: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb",
        ),
        ({}, "There is no data: give `--task_name`, `--dataset_name`, or both"),
        ({"train_file": "t.csv"}, "both `--train_file` and `--validation_file`"),
        (
            {"train_file": "t.xml", "validation_file": "v.csv"},
            r"`--train_file t.xml` is not supported: .* \.csv, \.json",
        ),
        ({"train_file": "t.csv", "validation_file": "v.csv"}, "`--train_file t.csv` does not exist"),
        ({"task_name": "rte", "train_file": "t.csv"}, "choose one source of data"),
        (
            {"task_name": "rte", "student_num_hidden_layers": None},
            "`--distillation_mode ctcd` needs a student: give `--s",
        ),
        ({"task_name": "rte", "student_model_name_or_path": "x"}, "both give a student: choose one"),
        (
            {"task_name": "rte", "student_num_hidden_layers": None, "student_layers": "first"},
            "`--student_layers first` is for a student that is cut",
        ),
        ({"task_name": "rte", "distillation_mode": "community"}, "needs `--pretrained_teacher_name_or_path`"),
        ({"task_name": "rte", "pretrained_teacher_name_or_path": "x"}, "nothing learns from `--pretrained_teacher"),
        ({"task_name": "rte", "resume_from_checkpoint": "true"}, "there is no such checkpoint"),
        ({"task_name": "rte", "resume_from_checkpoint": "nowhere"}, "`--resume_from_checkpoint nowhere`: there is no"),
    ],
)
def test_bad_arguments(script, options, message):
    options = {"model_name_or_path": "no/model", "student_num_hidden_layers": 1, **options}
    with pytest.raises(ValueError, match=message):
        script("--do_train", **{name: value for name, value in options.items() if value is not None})


def test_nothing_to_do(script):
    with pytest.raises(ValueError, match="There is nothing to do: give `--do_train`"):
        script(model_name_or_path="no/model", student_num_hidden_layers=1, task_name="rte")


def test_no_test_data(script, tmp_path, teacher):
    files = save_files(tmp_path, ["no", "yes"])
    with pytest.raises(ValueError, match="`--do_predict` needs `--test_file`"):
        script("--do_predict", model_name_or_path=teacher, student_num_hidden_layers=1, **files)
    folder = save_glue(tmp_path / "glue", "cola")
    (tmp_path / "glue" / "README.md").write_text(
        (tmp_path / "glue" / "README.md").read_text().split("  - split: test")[0] + "---\n"
    )
    with pytest.raises(ValueError, match=r"`--do_predict` needs the split 'test', .* only \['train', 'validation'\]"):
        script(
            "--do_predict",
            model_name_or_path=teacher,
            student_num_hidden_layers=1,
            dataset_name=folder,
            task_name="cola",
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a"], "target": [1]}, r"no column 'label', only \['text', 'target'\]"),
        ({"text": ["a", "b"], "label": ["x", None]}, "Row 1 of the training data has no label"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, r"two labels or more, .* only \['x'\]"),
        (
            {"text": ["a", "b"], "label": [[0, 1], [0, 2]]},
            r"Row 1 .* \[0, 2\]: lists of numbers must be zeros and ones",
        ),
        ({"text": ["a", "b"], "label": [[0, 1], [1]]}, r"Row 1 .* \[1\]: .* \(2 in row 0\)"),
    ],
)
def test_bad_labels(rows, message):
    with pytest.raises(ValueError, match=message):
        glue_data.Labels.of(Dataset.from_dict(rows))


def test_label_that_training_does_not_know(script, tmp_path, teacher):
    files = save_files(tmp_path, ["no", "yes"])
    save_rows(tmp_path / "validation.csv", [{"text": "the film", "label": "maybe"}])
    with pytest.raises(ValueError, match=r"Label 'maybe' does not occur in the training data, .*\('no', 'yes'\)"):
        script("--do_eval", model_name_or_path=teacher, student_num_hidden_layers=1, **files)


def test_missing_text_columns():
    rows = Dataset.from_dict({"text": ["a"], "label": [1]})
    with pytest.raises(ValueError, match="no column 'sentence1', which `--task_name rte` reads"):
        glue_data.text_columns(rows, "rte")
    with pytest.raises(ValueError, match=r"no column of text besides 'label', only \['label', 'number'\]"):
        glue_data.text_columns(Dataset.from_dict({"label": ["a"], "number": [1]}), None)


# ---- Metrics, against formulas written out ----


def naive_pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def naive_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])


def naive_counts(predictions: np.ndarray, references: np.ndarray) -> tuple[int, int, int, int]:
    pairs = list(zip(predictions.tolist(), references.tolist(), strict=True))
    return tuple(pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))


def naive_metrics(task: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    if task == "stsb":
        ranks = naive_pearson(naive_ranks(predictions), naive_ranks(references))
        return {"pearson": naive_pearson(predictions, references), "spearmanr": ranks}
    if task == "cola":
        tp, tn, fp, fn = naive_counts(predictions, references)
        scale = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
        return {"matthews_correlation": (tp * tn - fp * fn) / scale}
    metrics = {"accuracy": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)}
    if task in ("mrpc", "qqp"):
        tp, _, fp, fn = naive_counts(predictions, references)
        metrics["f1"] = 2 * tp / (2 * tp + fp + fn)
    return metrics


@pytest.mark.parametrize("task", GLUE_SCORES)
def test_glue_metric_against_the_formulas(task, tmp_path):
    generator = np.random.default_rng(3)
    metric = GlueMetric(task, cache_dir=str(tmp_path))
    for _ in range(3):  # an instance can be used again
        if task == "stsb":
            references = generator.integers(0, 11, 40) / 2  # with ties, as in the data
            predictions = references + generator.normal(0, 2, 40)
        else:
            references = generator.integers(0, 3 if "mnli" in task else 2, 40)
            predictions = np.where(generator.random(40) < 0.7, references, generator.integers(0, 2, 40))
        found = metric.compute(predictions=predictions, references=references)
        assert found == pytest.approx(naive_metrics(task, predictions, references), abs=1e-12)
        assert all(type(value) is float for value in found.values())


def test_glue_metric_of_constant_predictions(tmp_path, recwarn):
    def compute(task: str, predictions: list, references: list) -> dict[str, float]:
        return GlueMetric(task, cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)

    assert compute("cola", [1, 1, 1], [0, 1, 1]) == {"matthews_correlation": 0.0}
    assert compute("stsb", [2.5, 2.5, 2.5], [0.0, 1.0, 2.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute("stsb", [2.5], [0.5]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert np.isnan(compute("stsb", [float("nan"), 1.0], [0.0, 1.0])["pearson"])  # a broken model is not hidden
    assert not [warning for warning in recwarn if "onstant" in str(warning.message)]


def test_glue_metrics_at_the_same_time_without_files_or_network(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("opens a connection"))
    first, second = (GlueMetric("rte", cache_dir=str(tmp_path)) for _ in range(2))
    first.add_batch(predictions=[0, 1], references=[0, 0])
    second.add_batch(predictions=[1, 1], references=[1, 1])
    first.add_batch(predictions=[1, 1], references=[0, 0])
    assert second.compute() == {"accuracy": 1.0}
    assert first.compute() == {"accuracy": 0.25}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_glue_metric_of_an_unknown_task():
    with pytest.raises(KeyError, match="Unknown GLUE task 'hans'. Valid names: cola, mnli"):
        GlueMetric("hans")


def test_combined_score_is_the_mean():
    labels = glue_data.Labels("single_label_classification", ("b", "a"), ("a", "b"))
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # b, a, b: in the data's order 1, 0, 1
    prediction = EvalPrediction(logits, np.array([0, 0, 1]))  # b, b, a: 1, 1, 0
    found = metrics_for(labels, "mrpc")(prediction)
    assert found == pytest.approx({"accuracy": 1 / 3, "f1": 0.5, "combined_score": (1 / 3 + 0.5) / 2})


# ---- Real data ----


@pytest.mark.skipif(not (ROOT.parent / "shared/data/glue/rte").is_dir(), reason="the real GLUE data is not at hand")
def test_real_data(script, teacher):
    folder = str(ROOT.parent / "shared/data/glue")
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "dataset_name": folder}
    out = script("--do_train", "--do_eval", task_name="rte", max_train_samples=32, **options)
    assert results(out, "train")["train_samples"] == 32
    assert results(out)["eval_samples"] == 277
    labels = json.loads((out / "student" / "config.json").read_text())["label2id"]
    assert labels == {"entailment": 0, "not_entailment": 1}


# ---- The warm start, and recipes ----


def test_the_best_recipe_cuts_the_student_from_the_trained_teacher_and_goes_on_after_a_stop(
    script, tmp_path, teacher, capsys, caplog
):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 2, **save_files(tmp_path, ["no", "yes"])}
    options |= {"save_strategy": "steps", "save_steps": 2, "recipe": "best", "distillation_mode": "kd"}
    out = script("--do_train", "--do_eval", **options)
    whole = load_file(out / "student/model.safetensors")
    assert "`recipe='best'` has set what you have not:\n  `warm_start_steps=2`" in caplog.text
    assert "The teacher alone: 2 steps in" in capsys.readouterr().out
    assert results(out, "all")["warm_start_steps"] == results(out, "train")["warm_start_steps"] == 2
    card = (out / "student/README.md").read_text()
    assert "Before, the teacher was trained alone for 2 steps, and the student made from it." in card
    trained = load_file(out / "warm-start/teacher/model.safetensors")
    frozen = load_file(out / "model.safetensors")
    assert all(torch.equal(trained[name], frozen[name]) for name in trained)

    shutil.rmtree(out / "checkpoint-2")  # as if it had been stopped before
    written = (out / "warm-start/teacher/model.safetensors").stat().st_mtime_ns
    script("--do_train", **options, resume_from_checkpoint="true")
    assert (out / "warm-start/teacher/model.safetensors").stat().st_mtime_ns == written
    again = load_file(out / "student/model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "options",
    [
        {"student_num_hidden_layers": None, "student_model_name_or_path": "x"},
        {"lora_r": 2},
        {"student_init": "shared", "lora_r": 2, "student_lora_r": 2},
    ],
)
def test_a_warm_start_needs_a_student_that_is_cut_afterwards(script, options):
    options = {"model_name_or_path": "x", "student_num_hidden_layers": 1, "task_name": "rte", **options}
    with pytest.raises(ValueError, match=r"`--warm_start_epochs 2 .*is cut from the teacher after that was trained"):
        script("--do_train", warm_start_epochs=2, **options)
