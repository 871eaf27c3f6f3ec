"""`examples/run_ner_ctcd.py` and what it is made of, on tiny models and data, without a network."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from script_runs import printed_table, results, run_script, save_bert, save_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

from examples import run_ner_ctcd
from examples.data.ner import CUT_OFF, FIRST_TOKENS, WordLabels, WordTokenizer, entities, entity_scores, metrics_for

#: Every entity is of two pieces: it becomes two tokens.
PIECES = ["ann", "##abel", "bert", "##ie", "rome", "##ville", "oslo", "##town"]
ENTITIES = {"annabel": "PER", "bertie": "PER", "romeville": "LOC", "oslotown": "LOC"}
OTHERS = ["the", "man", "saw", "a", "house", "near", "and", "went", "to", "see", "it"]
WORDS = [*PIECES, *OTHERS]
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


# ---- Models and data ----


def save_model(folder: Path, layers: int = 3, seed: int = 0, head: bool = False, **config: object) -> str:
    model_class = BertForTokenClassification if head else BertModel
    return save_bert(folder, WORDS, layers, seed, model_class, hidden_dropout_prob=0.0, **config)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pre-trained model without a head."""
    return save_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("student"), layers=1, seed=1)


def sentences(count: int, seed: int) -> list[dict[str, list[str]]]:
    """Rows of words, in which names of one or two words are entities."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(generator.integers(2, 7)):
            word = str(generator.choice([*OTHERS, *ENTITIES]))
            kind = ENTITIES.get(word)
            follows = bool(tags) and kind is not None and tags[-1] == f"B-{kind}"
            words.append(word)
            tags.append("O" if kind is None else f"{'I' if follows else 'B'}-{kind}")
        rows.append({"tokens": words, "ner_tags": tags})
    # All labels occur.
    rows[0] = {"tokens": ["annabel", "bertie", "saw", "oslotown", "romeville"], "ner_tags": [*TAGS[3:], *TAGS[:3]]}
    return rows


def save_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".csv":
        rows = [{name: " ".join(values) for name, values in row.items()} for row in rows]
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def save_files(folder: Path, suffix: str = "json") -> dict[str, str]:
    return {
        f"{split}_file": save_rows(folder / f"{split}.{suffix}", sentences(12 + seed, seed))
        for seed, split in enumerate(["train", "validation"])
    }


@pytest.fixture
def script(tmp_path: Path):
    """Runs the script."""
    return partial(run_script, run_ner_ctcd, output_dir=tmp_path / "out", max_seq_length=32)


def labels_of(folder: Path, rows: list[dict]) -> list[list[str]]:
    """The label that a saved model gives to each word (its first token), one row at a time, by plain transformers."""
    model = AutoModelForTokenClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        encoded = tokenizer([row["tokens"]], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            choice = model(**encoded).logits[0].argmax(-1).tolist()
        first = [encoded.word_ids(0).index(word) for word in range(len(row["tokens"]))]
        found.append([model.config.id2label[choice[position]] for position in first])
    return found


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


# ---- Runs ----


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_both_models_label_words(script, tmp_path, teacher, student, capsys, suffix):
    test = [{"tokens": row["tokens"]} for row in sentences(5, 9)]  # without labels
    out = script(
        "--do_train",
        "--do_eval",
        "--do_predict",
        model_name_or_path=teacher,
        student_model_name_or_path=student,
        test_file=save_rows(tmp_path / f"test.{suffix}", test),
        per_device_eval_batch_size=3,
        **save_files(tmp_path, suffix),
    )
    rows = sentences(13, 1)
    expected = [row["ner_tags"] for row in rows]
    choices = []
    for folder, prefix, file_suffix, layers in ((out, "", "", 3), (out / "student", "student_", "_student", 1)):
        config = json.loads((folder / "config.json").read_text())
        assert config["label2id"] == {"B-LOC": 0, "B-PER": 1, "I-LOC": 2, "I-PER": 3, "O": 4}
        assert config["num_hidden_layers"] == layers
        choice = labels_of(folder, rows)
        choices.append(np.concatenate(choice))
        scores = entity_scores(choice, expected)[""]
        scores["accuracy"] = (choices[-1] == np.concatenate(expected)).mean()
        for key in ("precision", "recall", "f1", "accuracy"):
            assert results(out)[f"eval_{prefix}{key}"] == pytest.approx(scores[key])
        assert np.isfinite(results(out)[f"eval_{prefix}loss"])
        assert lines_of(out / f"predictions{file_suffix}.txt") == labels_of(folder, test)
    assert results(out)["eval_agreement"] == pytest.approx((choices[0] == choices[1]).mean())
    assert results(out)["eval_samples"] == 13
    assert results(out, "train")["train_samples"] == 12
    table = printed_table(capsys.readouterr().out)
    assert table[0] == ["teacher", "student"]
    assert {line[0]: len(line) for line in table[2:]} == {
        "loss": 3, "precision": 3, "recall": 3, "f1": 3, "accuracy": 3, "agreement": 2
    }  # fmt: skip


def save_tagged(folder: Path, labelled_test: bool = True) -> tuple[str, dict[str, Dataset]]:
    """A folder as on the Hub, whose labels are `ClassLabel`s."""
    features = Features({"words": List(Value("string")), "pos_tags": List(ClassLabel(names=["NOUN", "VERB", "DET"]))})
    splits = {}
    for seed, (split, count) in enumerate({"train": 12, "validation": 7, "test": 6}.items()):
        generator = np.random.default_rng(seed)
        words = [generator.choice(OTHERS, generator.integers(1, 9)).tolist() for _ in range(count)]
        tags = [generator.integers(0, 3, len(row)).tolist() for row in words]
        splits[split] = Dataset.from_dict({"words": words, "pos_tags": tags}, features)
        if split == "test" and not labelled_test:
            splits[split] = splits[split].remove_columns("pos_tags")
        splits[split].to_parquet(folder / f"{split}.parquet")
    return str(folder), splits


def test_parts_of_speech_of_a_folder_in_the_order_of_the_data(script, tmp_path, teacher):
    folder, splits = save_tagged(tmp_path)
    out = script(
        "--do_train",
        "--do_eval",
        "--do_predict",
        "--pad_to_max_length",
        "--return_entity_level_metrics",
        dataset_name=folder,
        task_name="POS",
        model_name_or_path=teacher,
        student_num_hidden_layers=2,
        train_sampling_strategy="group_by_length",
        max_predict_samples=4,
        max_seq_length=16,
    )
    test = [{"tokens": words} for words in splits["test"]["words"][:4]]
    names = ["NOUN", "VERB", "DET"]
    for model_folder, prefix, suffix in ((out, "eval_", ""), (out / "student", "eval_student_", "_student")):
        assert json.loads((model_folder / "config.json").read_text())["label2id"] == {"NOUN": 0, "VERB": 1, "DET": 2}
        assert lines_of(out / f"predictions{suffix}.txt") == labels_of(model_folder, test)
        found = np.concatenate(labels_of(model_folder, [{"tokens": row} for row in splits["validation"]["words"]]))
        truth = np.array(names)[np.concatenate(splits["validation"]["pos_tags"])]
        assert results(out)[f"{prefix}accuracy"] == pytest.approx((found == truth).mean())
        assert results(out)[f"{prefix}f1"] == pytest.approx((found == truth).mean())
        verbs = 2 * ((found == "VERB") & (truth == "VERB")).sum() / ((found == "VERB").sum() + (truth == "VERB").sum())
        assert results(out)[f"{prefix}VERB_f1"] == pytest.approx(verbs)


def test_words_beyond_the_maximal_length_get_no_label(script, tmp_path, teacher, caplog):
    rows = [{"tokens": ["annabel", "saw", "oslotown", "see"]}]  # 6 tokens, and 2 special ones
    out = script(
        "--do_predict",
        model_name_or_path=teacher,
        student_num_hidden_layers=1,
        test_file=save_rows(tmp_path / "test.json", rows),
        max_seq_length=6,
        **save_files(tmp_path),
    )
    (line,) = lines_of(out / "predictions_student.txt")
    assert line[3] == "_"
    assert set(line[:3]) <= set(TAGS)
    assert "1 words of the test data lie beyond `--max_seq_length`" in caplog.text


def test_labels_in_the_order_of_a_model_that_knows_them(script, tmp_path):
    names = ["I-PER", "B-ORG", "O", "B-PER", "I-LOC", "B-LOC"]  # one more than the data has
    own = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = save_model(tmp_path / "model", head=True, **own)
    out = script("--do_eval", model_name_or_path=model, student_num_hidden_layers=3, **save_files(tmp_path))
    found = np.concatenate(labels_of(Path(model), sentences(13, 1)))
    truth = np.concatenate([row["ner_tags"] for row in sentences(13, 1)])
    assert results(out)["eval_accuracy"] == pytest.approx((found == truth).mean())
    assert results(out)["eval_student_accuracy"] == results(out)["eval_accuracy"]  # a copy of all its layers
    assert results(out)["eval_agreement"] == 1


def test_words_are_labelled_by_a_trained_model_without_any_labels(script, tmp_path):
    own = {"id2label": {0: "O", 1: "B-X"}, "label2id": {"O": 0, "B-X": 1}}
    model = save_model(tmp_path / "model", head=True, **own)
    test = [{"words": row["tokens"]} for row in sentences(5, 9)]
    options = {"model_name_or_path": model, "distillation_mode": "standalone"}
    out = script("--do_predict", test_file=save_rows(tmp_path / "test.json", test), **options)
    assert lines_of(out / "predictions.txt") == labels_of(Path(model), [{"tokens": row["words"]} for row in test])


def test_labels_as_numbers(script, tmp_path, teacher):
    rows = [{"words": row["tokens"], "tags": [TAGS.index(tag) for tag in row["ner_tags"]]} for row in sentences(8, 0)]
    rows[1]["tags"] = [-100] * len(rows[1]["tags"])
    files = {f"{split}_file": save_rows(tmp_path / f"{split}.json", rows) for split in ("train", "validation")}
    out = script("--do_train", "--do_eval", model_name_or_path=teacher, student_num_hidden_layers=1, **files)
    assert json.loads((out / "student" / "config.json").read_text())["label2id"] == {str(i): i for i in range(5)}
    found = labels_of(out / "student", [{"tokens": row["words"]} for row in rows])
    right = [a == str(b) for own, row in zip(found, rows, strict=True) for a, b in zip(own, row["tags"], strict=True)]
    scored = sum(tag >= 0 for row in rows for tag in row["tags"])
    assert results(out)["eval_student_accuracy"] == pytest.approx(sum(right) / scored)


def test_frozen_model_of_other_labels_is_refused(script, tmp_path, teacher):
    names = ["O", "B-ORG", "I-ORG", "B-MISC", "I-MISC"]
    own = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "distillation_mode": "community"}
    options["pretrained_teacher_name_or_path"] = save_model(tmp_path / "frozen", head=True, **own)
    with pytest.raises(ValueError, match=r"was trained with the labels \['O', 'B-ORG', .* It is frozen in this mode"):
        script("--do_train", **options, **save_files(tmp_path))


def test_frozen_model_without_a_trained_head_is_refused(script, tmp_path, teacher):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "distillation_mode": "kd"}
    with pytest.raises(
        ValueError, match=r"`--model_name_or_path .*'classifier.bias', .* --distillation_mode standalone"
    ):
        script("--do_train", **options, **save_files(tmp_path))


def test_best_checkpoint_by_the_student_and_resume(script, tmp_path, teacher):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "max_steps": 4, **save_files(tmp_path)}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"metric_for_best_model": "student_accuracy", "load_best_model_at_end": True}
    out = script("--do_train", "--do_eval", **options)
    state = json.loads((out / "trainer_state.json").read_text())
    scores = [logs["eval_student_accuracy"] for logs in state["log_history"] if "eval_student_f1" in logs]
    assert scores[0] != scores[1]
    assert state["best_metric"] == max(scores) == results(out)["eval_student_accuracy"]
    again = tmp_path / "again"
    script("--do_train", resume_from_checkpoint=out / "checkpoint-2", output_dir=again, **options)
    for name in ("model.safetensors", "student/model.safetensors"):
        assert (again / "checkpoint-4" / name).read_bytes() == (out / "checkpoint-4" / name).read_bytes()


# ---- Words and sub-words ----


@pytest.mark.parametrize("label_all_tokens", [False, True])
def test_labels_of_sub_words(tmp_path, label_all_tokens):
    save_tokenizer(tmp_path, WORDS)
    labels = WordLabels(TAGS)
    tokenize = WordTokenizer(
        AutoTokenizer.from_pretrained(tmp_path),
        labels,
        "words",
        "tags",
        8,
        pad=True,
        label_all_tokens=label_all_tokens,
    )
    rows = {"words": [["saw", "annabel", "oslotown"], "oslotown saw"], "tags": [["O", "B-PER", "I-LOC"], "B-LOC O"]}
    tokens = tokenize(rows)
    inside = [TAGS.index(name) if label_all_tokens else -100 for name in ("I-PER", "I-LOC", "I-LOC")]
    assert tokens["labels"] == [
        [-100, 0, 3, inside[0], 2, inside[1], -100, -100],
        [-100, 1, inside[2], 0, -100, -100, -100, -100],
    ]
    assert tokens[FIRST_TOKENS] == [[1, 2, 4], [1, 3]]
    assert [len(ids) for ids in tokens["input_ids"]] == [8, 8]


def test_unknown_words_and_labels_that_are_missing(tmp_path):
    save_tokenizer(tmp_path, WORDS)
    labels = WordLabels(("b", "a"), data_names=("a", "b"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenize = WordTokenizer(tokenizer, labels, "words", "tags", 5, pad=False, label_all_tokens=False)
    tokens = tokenize({"words": [["", "zzz", "the", "man", "saw"]], "tags": [[0, -100, 1, None, 0]]})
    # The empty word has no token, and the last one has no place.
    assert tokens[FIRST_TOKENS] == [[CUT_OFF, 1, 2, 3, CUT_OFF]]
    assert tokens["labels"] == [[-100, -100, 0, -100, -100]]


def test_words_are_tokenized_as_in_running_text(tmp_path):
    """RoBERTa's tokens of a word after a space are others than those of the word alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "Ġa", "Ġs"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġ", "s")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenize = WordTokenizer(tokenizer, WordLabels(TAGS), "tokens", "tags", 32, pad=False, label_all_tokens=False)
    words = ["a", "man", "saw", "a", "house"]
    tokens = tokenize({"tokens": [words]})
    assert tokens["input_ids"] == [tokenizer(" ".join(words))["input_ids"]]
    assert len(tokens["input_ids"][0]) == len(" ".join(words)) - 2  # with two merges
    assert tokens[FIRST_TOKENS] == [[0, 1, 5, 8, 9]]


# ---- Scores ----


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER I-PER", {("PER", 0, 0), ("PER", 1, 2)}),
        ("I-PER I-PER O I-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),  # begins without a B
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),  # goes on as another type
        ("B-A-B I-A-B", {("A-B", 0, 1)}),
        ("S-PER B-LOC I-LOC E-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4)}),
    ],
)
def test_entities_of_labels(labels, expected):
    assert entities(labels.split()) == expected


def test_every_word_is_an_entity_without_prefixes():
    assert entities(["DET", "NOUN", "NOUN", "O"], chunked=False) == {("DET", 0, 0), ("NOUN", 1, 1), ("NOUN", 2, 2)}


def test_entity_scores_by_hand():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O", "O"], ["B-ORG", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC", "B-LOC"], ["O", "O"]]
    # Right: the first PER. Found: 2 PER, 2 LOC. True: 1 PER, 2 LOC, 1 ORG.
    assert entity_scores(predicted, expected) == {
        "": {"precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4, "number": 4},
        "PER": {"precision": 1 / 2, "recall": 1.0, "f1": 2 / 3, "number": 1},
        "LOC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "number": 2},
        "ORG": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "number": 1},
    }


def test_metrics_leave_out_what_is_not_scored():
    names = ("O", "B-X", "I-X")
    predictions = np.array([[0, 1, 2, 1], [2, 2, 1, 0]])
    labels = np.array([[-100, 1, -100, 0], [0, 1, -100, -100]])
    # B-X B-X and I-X I-X, where B-X O and O B-X are right.
    found = metrics_for(WordLabels(names), by_entity=True)(EvalPrediction(predictions, labels))
    overall = {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "accuracy": 1 / 4}
    by_type = {"X_precision": 1 / 3, "X_recall": 1 / 2, "X_f1": 2 / 5, "X_number": 2}
    assert found == pytest.approx(overall | by_type)
    assert metrics_for(WordLabels(names), by_entity=False)(EvalPrediction(predictions, labels)) == overall


# ---- Errors ----


def test_unknown_label():
    with pytest.raises(ValueError, match=r"The label 'B-ORG' is not one of the models' labels \['O', 'B-LOC',"):
        WordLabels(TAGS).index("B-ORG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "There is no data: give `--dataset_name`, or `--train_file`"),
        ({"dataset_name": "x", "task_name": "srl"}, "`--task_name srl` is none of ner, pos, chunk: name the column"),
        ({"train_file": "t.txt"}, r"`--train_file t.txt` is not supported: .* \.csv, \.json, \.jsonl, \.parquet"),
        ({"dataset_name": "x", "test_file": "t.json"}, "`--test_file` is given beside `--dataset_name`: choose one"),
        ({"dataset_name": "x", "student_num_hidden_layers": None}, "`--distillation_mode ctcd` needs a student"),
        (
            {"dataset_name": "x", "resume_from_checkpoint": "nowhere"},
            "`--resume_from_checkpoint nowhere`: there is no",
        ),
    ],
)
def test_bad_arguments(script, options, message):
    options = {"model_name_or_path": "no/model", "student_num_hidden_layers": 1, **options}
    with pytest.raises(ValueError, match=message):
        script("--do_train", **{name: value for name, value in options.items() if value is not None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_column_name": "text"},
            r"`--text_column_name text` is not a column of the data: give .*\['tokens', 'n",
        ),
        ({"task_name": "pos"}, r"None of pos_tags, tags, labels is a column .* give `--label_column_name`, one of \["),
    ],
)
def test_columns_that_do_not_fit(script, tmp_path, student, options, message):
    files = save_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        script("--do_train", model_name_or_path=student, student_num_hidden_layers=1, **files, **options)


def test_missing_test_data(script, tmp_path, student):
    with pytest.raises(ValueError, match=r"`--do_predict` needs the split 'test', .* only \['train', 'validation'\]"):
        script("--do_predict", model_name_or_path=student, student_num_hidden_layers=1, **save_files(tmp_path))


def test_words_without_labels(tmp_path):
    save_tokenizer(tmp_path, WORDS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenize = WordTokenizer(tokenizer, WordLabels(TAGS), "w", "t", 8, pad=False, label_all_tokens=False)
    with pytest.raises(ValueError, match=r"2 words in the column 'w' and 1 labels in 't': .* begins with \['the', 'm"):
        tokenize({"w": [["the", "man"]], "t": [["O"]]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"tokens": [["a"]]},
            "No split of the data has a column 'tags' of labels, and the model names none: give `--l",
        ),
        ({"tokens": [["a"]], "tags": [["O"]]}, r"The column 'tags' has only the labels \['O'\]: two or more"),
    ],
)
def test_labels_that_cannot_be_learnt(rows, message):
    with pytest.raises(ValueError, match=message):
        WordLabels.of([Dataset.from_dict(rows)], "tags", BertConfig())
