"""`examples/run_qa_ctcd.py` and what it is made of, on tiny models and data, without a network."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from script_runs import printed_table, read, run_script, save_bert
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples import run_qa_ctcd
from examples.data.qa import (
    ENDS,
    NOT_CONTEXT,
    NULL,
    ROW,
    STARTS,
    AnswerFinder,
    WindowTokenizer,
    exact_match,
    f1,
    normalized,
    squad_scores,
)

TEXT = "the man who saw a big old red house near river and went up to see it where is what does he of you"
WORDS = TEXT.split()
MAX_LENGTH, STRIDE = 20, 4


# ---- Models and data ----


def save_model(folder: Path, layers: int = 3, seed: int = 0) -> str:
    return save_bert(folder, WORDS, layers, seed, hidden_dropout_prob=0.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pre-trained model without a head."""
    return save_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("student"), layers=1, seed=1)


@pytest.fixture(scope="module")
def tokenizer(teacher: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(teacher)


def questions(count: int, seed: int, with_negative: bool = False) -> list[dict]:
    """Rows as SQuAD has them, some of whose contexts need several windows."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        words = generator.choice(WORDS, generator.integers(5, 30)).tolist()
        first, length = int(generator.integers(0, len(words))), int(generator.integers(1, 4))
        answer = {"text": [" ".join(words[first : first + length])]}
        answer["answer_start"] = [len(" ".join(words[:first])) + (first > 0)]
        if with_negative and index % 3 == 0:
            answer = {"text": [], "answer_start": []}
        row = {"id": f"q{index}", "title": "A title", "context": " ".join(words), "answers": answer}
        rows.append({**row, "question": "  " + " ".join(generator.choice(WORDS, 4))})
    return rows


def save_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps({"version": "1", "data": rows}))
    return str(path)


def save_files(folder: Path, suffix: str = "jsonl", with_negative: bool = False) -> dict[str, str]:
    return {
        f"{split}_file": save_rows(folder / f"{split}.{suffix}", questions(12 + seed, seed, with_negative))
        for seed, split in enumerate(["train", "validation"])
    }


@pytest.fixture
def script(tmp_path: Path):
    """Runs the script."""
    return partial(run_script, run_qa_ctcd, output_dir=tmp_path / "out", max_seq_length=MAX_LENGTH, doc_stride=STRIDE)


def test_the_nested_form_in_which_squad_is_published_is_read(tmp_path):
    rows = [{**row, "question": row["question"].strip()} for row in questions(4, 0, with_negative=True)]
    articles = [
        {
            "title": row["title"],
            "paragraphs": [
                {
                    "context": row["context"],
                    "qas": [
                        {
                            **{key: row[key] for key in ("id", "question")},
                            "is_impossible": not row["answers"]["text"],
                            "answers": [
                                dict(zip(("text", "answer_start"), answer, strict=True))
                                for answer in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                            ],
                        }
                    ],
                }
            ],
        }
        for row in rows
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}, indent=1))
    data = run_qa_ctcd.QaDataArguments(train_file=str(path), version_2_with_negative=True)
    arguments = SimpleNamespace(cache_dir=str(tmp_path / "cache")), data
    found = run_qa_ctcd.load_data(*arguments, SimpleNamespace(do_train=True, do_eval=False, do_predict=False))
    assert found["train"].to_list() == [{key: row[key] for key in found["train"].column_names} for row in rows]


def naive_answers(
    folder: Path, rows: list[dict], max_answer_length: int = 30, with_negative: bool = False, threshold: float = 0.0
) -> dict[str, str]:
    """The answers of a saved model by plain transformers: windows made by hand, and all spans tried one by one."""
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = {}
    for row in rows:
        question, context = row["question"].split(), row["context"].split()
        begins = [len(" ".join(context[:i])) + (i > 0) for i in range(len(context))]
        room = MAX_LENGTH - 3 - len(question)
        best, null, first = (-np.inf, ""), np.inf, 0
        while True:
            window = range(first, min(first + room, len(context)))
            tokens = ["[CLS]", *question, "[SEP]", *(context[i] for i in window), "[SEP]"]
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
            kinds = torch.tensor([[0] * (len(question) + 2) + [1] * (len(window) + 1)])
            with torch.no_grad():
                output = model(input_ids=ids, token_type_ids=kinds)
            start, end = output.start_logits[0], output.end_logits[0]
            null = min(null, float(start[0] + end[0]))
            shift = len(question) + 2 - first
            for i in window:
                for j in window:
                    score = float(start[i + shift] + end[j + shift])
                    if i <= j < i + max_answer_length and score > best[0]:
                        best = (score, row["context"][begins[i] : begins[j] + len(context[j])])
            if window[-1] == len(context) - 1:
                break
            first += room - STRIDE
        answers[row["id"]] = "" if with_negative and null - best[0] > threshold else best[1]
    return answers


# ---- Runs ----


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_both_models_answer_questions(script, tmp_path, teacher, student, capsys, suffix):
    test = [{key: row[key] for key in ("id", "question", "context")} for row in questions(5, 9)]  # no true answers
    out = script(
        "--do_train",
        "--do_eval",
        "--do_predict",
        model_name_or_path=teacher,
        student_model_name_or_path=student,
        test_file=save_rows(tmp_path / f"test.{suffix}", test),
        per_device_eval_batch_size=3,
        max_answer_length=3,
        **save_files(tmp_path, suffix),
    )
    rows = questions(13, 1)
    truths = [row["answers"]["text"] for row in rows]
    for folder, prefix, suffix, layers in ((out, "", "", 3), (out / "student", "student_", "_student", 1)):
        assert read(folder / "config.json")["num_hidden_layers"] == layers
        answers = naive_answers(folder, rows, 3)
        assert read(out / f"eval_predictions{suffix}.json") == answers
        for key, value in squad_scores(list(answers.values()), truths).items():
            assert read(out / "eval_results.json")[f"eval_{prefix}{key}"] == pytest.approx(value)
        assert np.isfinite(read(out / "eval_results.json")[f"eval_{prefix}loss"])
        assert read(out / f"predict_predictions{suffix}.json") == naive_answers(folder, test, 3)
        assert not (out / f"eval_null_odds{suffix}.json").exists()
        for key, candidates in read(out / f"eval_nbest_predictions{suffix}.json").items():
            assert candidates[0]["text"] == answers[key]
            assert sum(candidate["probability"] for candidate in candidates) == pytest.approx(1)
    assert 0 <= read(out / "eval_results.json")["eval_agreement"] <= 1
    table = printed_table(capsys.readouterr().out)
    assert table[0] == ["teacher", "student"]
    assert {"exact_match", "f1", "loss", "agreement"} <= {line[0] for line in table}


@pytest.mark.parametrize("pad", [True, False])
def test_questions_without_an_answer(script, tmp_path, teacher, pad):
    out = script(
        "--do_train",
        "--do_eval",
        "--version_2_with_negative",
        model_name_or_path=teacher,
        student_num_hidden_layers=2,
        pad_to_max_length=pad,
        train_sampling_strategy="group_by_length",
        null_score_diff_threshold=0.5,
        max_eval_samples=10,
        **save_files(tmp_path, with_negative=True),
    )
    rows = questions(13, 1, with_negative=True)[:10]
    truths = [row["answers"]["text"] for row in rows]
    given = []
    for folder, prefix, suffix in ((out, "eval_", ""), (out / "student", "eval_student_", "_student")):
        answers = naive_answers(folder, rows, with_negative=True, threshold=0.5)
        assert read(out / f"eval_predictions{suffix}.json") == answers
        odds = read(out / f"eval_null_odds{suffix}.json")
        assert {key for key, value in odds.items() if value > 0.5} == {
            key for key, text in answers.items() if not text
        }
        scores = squad_scores(list(answers.values()), truths, with_negative=True)
        assert {"HasAns_f1", "NoAns_exact"} < set(scores)
        for key, value in scores.items():
            assert read(out / "eval_results.json")[f"{prefix}{key}"] == pytest.approx(value)
        given += [bool(text) for text in answers.values()]
    assert len(set(given)) == 2  # else every threshold would do


def test_best_checkpoint_by_the_student_and_resume(script, tmp_path, teacher):
    options = {"model_name_or_path": teacher, "student_num_hidden_layers": 1, "max_steps": 4, **save_files(tmp_path)}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"metric_for_best_model": "student_f1", "load_best_model_at_end": True}
    out = script("--do_train", "--do_eval", **options)
    state = read(out / "trainer_state.json")
    scores = [logs["eval_student_f1"] for logs in state["log_history"] if "eval_student_f1" in logs]
    assert scores[0] != scores[1]
    assert state["best_metric"] == max(scores) == read(out / "eval_results.json")["eval_student_f1"]
    again = tmp_path / "again"
    script("--do_train", resume_from_checkpoint=out / "checkpoint-2", output_dir=again, **options)
    for name in ("model.safetensors", "student/model.safetensors"):
        assert (again / "checkpoint-4" / name).read_bytes() == (out / "checkpoint-4" / name).read_bytes()


def test_one_model_alone_writes_no_answers_of_a_student(script, tmp_path, teacher):
    out = script(
        "--do_eval", model_name_or_path=teacher, distillation_mode="standalone", **save_files(tmp_path, "json")
    )
    assert (out / "eval_predictions.json").exists()
    assert not list(out.rglob("*student*"))
    assert not [key for key in read(out / "eval_results.json") if "student" in key]


# ---- Windows ----


def test_windows_overlap_and_say_where_the_answer_is(tokenizer):
    context = "the man who saw a big old house near the river went up to see it"  # 16 tokens
    answer = {"text": ["old house", "house"], "answer_start": [context.index("old"), context.index("house")]}
    make = WindowTokenizer(tokenizer, max_length=14, doc_stride=3, pad=False)  # 9 of the context at a time
    windows = make({"question": ["  where is"], "context": [context], "answers": [answer]}, [7])
    texts = [
        [context[a:b] for a, b in zip(*row, strict=True) if a != NOT_CONTEXT]
        for row in zip(windows[STARTS], windows[ENDS], strict=True)
    ]
    words = context.split()
    assert texts == [words[:9], words[6:15], words[12:]]
    assert windows[ROW] == [7, 7, 7]
    assert windows[NULL] == [0, 0, 0]
    # Behind [CLS] where is [SEP]; the last window does not hold the answer.
    assert windows["start_positions"] == [4 + 6, 4 + 0, 0]
    assert windows["end_positions"] == [4 + 7, 4 + 1, 0]
    assert tokenizer.decode(windows["input_ids"][1][4:6]) == "old house"


def test_an_answer_of_which_a_window_holds_only_a_part_is_not_in_it(tokenizer):
    answer = {"text": ["man who saw"], "answer_start": [4]}
    make = WindowTokenizer(tokenizer, max_length=7, doc_stride=1, pad=True)  # 3 of the context at a time
    windows = make({"question": ["it"], "context": ["the man who saw a"], "answers": [answer]}, [0])
    assert windows["start_positions"] == windows["end_positions"] == [0, 0]
    windows = make({"question": ["it", "it"], "context": ["the", ""], "answers": [None, {"text": []}]}, [0, 1])
    assert windows["start_positions"] == windows["end_positions"] == [0, 0]
    assert "start_positions" not in make({"question": ["it"], "context": ["the"]}, [0])


def test_a_question_that_leaves_no_room(tokenizer):
    make = WindowTokenizer(tokenizer, max_length=10, doc_stride=4, pad=False)
    assert make({"question": ["the man"], "context": ["the river " * 9]}, [0])[ROW][-1] == 0
    with pytest.raises(
        ValueError, match="row 5 has 3 tokens: with `--max_seq_length 10` and `--doc_stride 4` it leaves"
    ):
        make({"question": ["the man", "who saw it"], "context": ["the river"] * 2}, [4, 5])


def test_blanks_around_a_question_are_no_part_of_it():
    characters = Tokenizer(models.WordLevel({"?": 0, "i": 1, "t": 2, " ": 3, "s": 4}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    make = WindowTokenizer(PreTrainedTokenizerFast(tokenizer_object=characters), 12, doc_stride=1, pad=False)
    windows = make({"question": ["  is it  "], "context": [" it"]}, [0])
    assert windows["input_ids"] == [[1, 4, 3, 1, 2, 3, 1, 2]]
    assert windows[STARTS] == [[NOT_CONTEXT] * 5 + [0, 1, 2]]


# ---- Answers ----


def finder(**options: object) -> AnswerFinder:
    """Two questions: "red house" in one window, "the big old man" in two that share "big old"."""
    windows = {
        ROW: [0, 1, 1],
        STARTS: [[-1, -1, 0, 4, -1], [-1, -1, 0, 4, 8], [-1, -1, 4, 8, 12]],
        ENDS: [[-1, -1, 3, 9, -1], [-1, -1, 3, 7, 11], [-1, -1, 7, 11, 15]],
        NULL: [0, 0, 0],
    }
    rows = Dataset.from_dict({"context": ["red house", "the big old man"]})
    return AnswerFinder(rows, Dataset.from_dict(windows), **options)


START = np.array([[1.0, 9.0, 3.0, 2.0, -100.0], [2.0, 9.0, 0.0, 4.0, 1.0], [3.0, 9.0, 5.0, 0.0, 0.0]])
END = np.array([[1.0, 9.0, 0.0, 1.5, -100.0], [2.0, 9.0, 0.0, 0.0, 2.0], [3.0, 9.0, 0.0, 0.0, 3.0]])


def test_the_best_span_of_all_windows_is_the_answer():
    first, second = finder()(START, END)
    # The question (9.0) and padding are no candidates, and an answer does not end before it begins.
    assert first.text == "red house"
    assert [(c["text"], c["start_logit"] + c["end_logit"]) for c in first.best] == [
        ("red house", 4.5),
        ("house", 3.5),
        ("red", 3.0),
    ]
    weights = np.exp([4.5, 3.5, 3.0])
    assert [c["probability"] for c in first.best] == pytest.approx(weights / weights.sum())
    assert second.text == "big old man"
    assert first.null_odds is second.null_odds is None
    scores = {c["text"]: c["start_logit"] + c["end_logit"] for c in second.best}
    assert len(scores) == len(second.best)  # "big", "old" and "big old" are in both windows and count once
    assert scores["big old"] == 6.0  # the larger of 4 + 2 and 5 + 0


def test_limits_of_answers():
    assert [answer.text for answer in finder(max_answer_length=2)(START, END)] == ["red house", "big old"]
    assert [answer.text for answer in finder(max_answer_length=1)(START, END)] == ["house", "big"]
    assert [len(answer.best) for answer in finder(n_best_size=2)(START, END)] == [2, 2]


def test_no_answer_has_to_beat_the_best_one_by_the_threshold():
    # The scores of no answer: 2, and the smaller one of 4 and 6.
    first, second = finder(with_negative=True)(START, END)
    assert (first.text, first.null_odds) == ("red house", 2 - 4.5)
    assert (second.text, second.null_odds) == ("big old man", 4 - 8.0)
    first, second = finder(with_negative=True, null_threshold=-3.0)(START, END)
    assert (first.text, second.text) == ("", "big old man")
    assert [c["text"] for c in first.best] == ["red house", "house", "red", ""]
    assert sum(c["probability"] for c in first.best) == pytest.approx(1)


def test_a_context_without_tokens_has_no_answer():
    windows = Dataset.from_dict({ROW: [0], STARTS: [[-1, -1]], ENDS: [[-1, -1]], NULL: [0]})
    for with_negative, candidates in ((False, 0), (True, 1)):
        find = AnswerFinder(Dataset.from_dict({"context": [""]}), windows, with_negative=with_negative)
        (answer,) = find(START[:1], END[:1])
        assert (answer.text, len(answer.best), answer.null_odds) == ("", candidates, None)


def test_logits_of_other_data():
    with pytest.raises(ValueError, match="logits of 2 windows, and the data set has 3"):
        finder()(START[:2], END[:2])


# ---- Scores, by hand ----


def test_what_does_not_count():
    assert normalized(' "The  Theatre\'s an  A-frame." ') == "theatres aframe"
    assert exact_match("the Red house!", "red house") == 1
    assert exact_match("red houses", "red house") == 0


def test_f1_of_words():
    assert f1("the big red red house", "red house") == pytest.approx(2 * 2 / (4 + 2))
    assert f1("river", "red house") == 0
    assert (f1("", ""), f1("the", "a")) == (0, 0)
    assert (f1("", "", True), f1("the", "", True), f1("man", "", True), f1("", "man", True)) == (1, 1, 0, 0)


def test_the_nearest_true_answer_counts():
    answers = ["red house", "man", ""]
    truths = [["a house", "the red house"], ["old man", "river"], ["river"]]
    assert squad_scores(answers, truths) == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (1 + 2 / 3 + 0) / 3})


def test_scores_with_questions_that_have_no_answer():
    answers = ["red house", "", "", "man", "river"]
    truths = [["house"], ["man"], [], [], ["the", "river"]]  # of "the" nothing is left
    assert squad_scores(answers, truths, with_negative=True) == pytest.approx(
        {
            "exact_match": 100 * 2 / 5,
            "f1": 100 * (2 / 3 + 0 + 1 + 0 + 1) / 5,
            "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * (2 / 3 + 0 + 1) / 3,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
        }
    )
    assert set(squad_scores(["a"], [["b"]], with_negative=True)) == {"exact_match", "f1", "HasAns_exact", "HasAns_f1"}


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "There is no data: give `--dataset_name`, or `--train_file`"),
        ({"train_file": "t.csv"}, r"`--train_file t.csv` is not supported: .* \.json, \.jsonl, \.parquet"),
        ({"dataset_name": "x", "doc_stride": 20}, "`--doc_stride 20` must be at least 0 and less than `--max_seq_len"),
        ({"dataset_name": "x", "n_best_size": 0}, "`--n_best_size 0` must be 1 or more"),
        ({"dataset_name": "x", "max_answer_length": -1}, "`--max_answer_length -1` must be 1 or more"),
        ({"dataset_name": "x", "distillation_mode": "community"}, "needs `--pretrained_teacher_name_or_path`"),
    ],
)
def test_bad_arguments(script, options, message):
    options = {"model_name_or_path": "no/model", "student_num_hidden_layers": 1, **options}
    with pytest.raises(ValueError, match=message):
        script("--do_train", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("id"), r"The validation data has no column 'id', only \['title', 'context'"),
        (lambda row: row.pop("answers"), "The validation data has no column 'answers'"),
        (lambda row: row.update(answers=["red"]), r"'answers' of the validation data is List.*: each row must have a"),
        (
            lambda row: row["answers"].update(text=[], answer_start=[]) if row["id"] == "q2" else None,
            "Row 2 of the validation data has no answer: give `--version_2_with_negative` if",
        ),
    ],
)
def test_data_that_does_not_fit(script, tmp_path, change, message):
    rows = questions(4, 0)
    for row in rows:
        change(row)
    file = save_rows(tmp_path / "validation.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        script("--do_eval", model_name_or_path="no/model", student_num_hidden_layers=1, validation_file=file)


def test_missing_split(script, tmp_path):
    file = save_rows(tmp_path / "train.jsonl", questions(4, 0))
    with pytest.raises(
        ValueError, match=r"`--do_eval` needs the split 'validation', and the data has only \['train'\]"
    ):
        script("--do_eval", model_name_or_path="no/model", student_num_hidden_layers=1, train_file=file)
