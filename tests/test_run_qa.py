"""`examples/run_qa_ctcd.py` and what it is made of, on tiny models and data, without a network."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import run_qa_ctcd
from qa_answers import (
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


def save_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, model_max_length=32, **tokens
    ).save_pretrained(folder)


def save_model(folder: Path, layers: int = 3, seed: int = 0) -> str:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


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
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the script in this process, for two steps unless told otherwise; returns the output folder."""

    def run(*arguments: str, **options: object) -> Path:
        settings = {
            "output_dir": tmp_path / "out",
            "max_seq_length": MAX_LENGTH,
            "doc_stride": STRIDE,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": "none",
            **options,
        }
        argv = [x for name, value in settings.items() for x in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["run_qa_ctcd.py", "--use_cpu", "--disable_tqdm", "True", *argv, *arguments])
        run_qa_ctcd.main()
        return Path(settings["output_dir"])

    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def naive_answers(
    folder: Path, rows: list[dict], max_answer_length: int = 30, with_negative: bool = False, threshold: float = 0.0
) -> dict[str, str]:
    """The answers of a saved model by plain transformers: all windows by hand, all spans tried, one after the other."""
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
    table = [line.split() for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
    assert table[0] == ["teacher", "student"]
    assert {"exact_match", "f1", "loss", "agreement"} <= {line[0] for line in table}
