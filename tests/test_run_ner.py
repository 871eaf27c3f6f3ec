"""`examples/run_ner_ctcd.py` and what it is made of, on tiny models and data, without a network."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import run_ner_ctcd
from ner_data import CUT_OFF, FIRST_TOKENS, WordLabels, WordTokenizer, entities, entity_scores, metrics_for

#: Every entity is of two pieces: it becomes two tokens.
PIECES = "ann ##abel bert ##ie rome ##ville oslo ##town".split()
ENTITIES = {"annabel": "PER", "bertie": "PER", "romeville": "LOC", "oslotown": "LOC"}
OTHERS = "the man saw a house near and went to see it".split()
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


# ---- Models and data ----


def save_tokenizer(folder: Path, max_length: int = 32) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PIECES, *OTHERS]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **tokens).save_pretrained(folder)


def save_model(folder: Path, layers: int = 3, seed: int = 0, head: bool = False, **config: object) -> str:
    torch.manual_seed(seed)
    settings = BertConfig(
        vocab_size=4 + len(PIECES) + len(OTHERS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        **config,
    )
    (BertForTokenClassification if head else BertModel)(settings).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


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
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the script in this process, for two steps unless told otherwise; returns the output folder."""

    def run(*arguments: str, **options: object) -> Path:
        settings = {
            "output_dir": tmp_path / "out",
            "max_seq_length": 32,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": "none",
            **options,
        }
        argv = [x for name, value in settings.items() for x in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["run_ner_ctcd.py", "--use_cpu", "--disable_tqdm", "True", *argv, *arguments])
        run_ner_ctcd.main()
        return Path(settings["output_dir"])

    return run


def results(folder: Path, name: str = "eval") -> dict[str, float]:
    return json.loads((folder / f"{name}_results.json").read_text())


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
    table = [line.split() for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
    assert table[0] == ["teacher", "student"]
    assert {line[0]: len(line) for line in table[2:]} == {
        "loss": 3, "precision": 3, "recall": 3, "f1": 3, "accuracy": 3, "agreement": 2
    }  # fmt: skip
