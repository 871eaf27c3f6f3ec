"""Diagnose a pair before you train it: what can the two models learn from each other?

TEACHER and STUDENT are names or folders of trained models with the same head. DATA holds held-out rows with labels: a
file (.csv, .json, .jsonl, .parquet, .txt) or a folder of `Dataset.save_to_disk`. Rows that are tokenized already (with
`input_ids`) are taken as they are, for any head. Texts are tokenized for sequence classification and language models.
The tables and the advice are printed; with --output they are also written as diagnosis.md, .json and .png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    logging,
)

from ..model_structure import most_positions
from ..pair.loading import load_model
from ..tasks import find_task
from .pairs import diagnose

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def main() -> None:
    """Load the models and the data, and print the diagnosis."""
    parser = argparse.ArgumentParser(
        "python -m ctcd_trainer.diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", metavar="TEACHER", help="the larger model: a folder or a name on the Hub")
    parser.add_argument("student", metavar="STUDENT", help="the smaller model")
    parser.add_argument(
        "data", metavar="DATA", type=Path, help="held-out rows: a file, or a folder of a saved data set"
    )
    parser.add_argument("--train", metavar="DATA", type=Path, help="rows on which the models were trained")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for the tables, the numbers and the figure")
    parser.add_argument("--text", metavar="COLUMN", nargs="+", help="one or two columns of text (default: the first)")
    parser.add_argument("--label", metavar="COLUMN", default="label", help="column of the label (default: label)")
    parser.add_argument("--split", default="validation", help="split of a folder with several (default: validation)")
    parser.add_argument("--max-length", metavar="N", type=int, default=128, help="tokens of a text (default: 128)")
    parser.add_argument("--max-rows", metavar="N", type=int, help="take only the first rows (default: all)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="rows that run together (default: 64)")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the soft losses (default: 1)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    try:
        found = _diagnose(options)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "diagnosis.md").write_text(f"{found}\n", encoding="utf-8")
            (options.output / "diagnosis.json").write_text(json.dumps(found.to_dict(), indent=2), encoding="utf-8")
            found.plot(options.output / "diagnosis.png")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(found)


def _diagnose(options: argparse.Namespace) -> Any:
    teacher = load_model(options.teacher, "TEACHER", frozen=True)
    student = load_model(options.student, "STUDENT", like=teacher, frozen=True)
    tokenizer, task = AutoTokenizer.from_pretrained(options.teacher), find_task(teacher)
    positions = most_positions(teacher)
    length = min(options.max_length, positions or options.max_length)
    rows, training = (
        path and _rows(path, options, tokenizer, teacher, length) for path in (options.data, options.train)
    )
    collator = None
    if task.language_model and "labels" not in rows.column_names:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=task.name == "masked-lm", seed=0)
    elif task.name == "token-classification":
        collator = DataCollatorForTokenClassification(tokenizer)
    return diagnose(
        teacher,
        student,
        rows,
        data_collator=collator,
        processing_class=tokenizer,
        batch_size=options.batch_size,
        weight=options.weight,
        train_dataset=training,
    )


def _rows(
    path: Path, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, model: Any, max_length: int
) -> Any:
    """Load rows, and tokenize them if they hold texts.

    Raises:
        ValueError: There is no such file, split or column, or a label is not one of the model's.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError("The command needs the package datasets. Install it: `pip install datasets`.") from error
    if path.is_dir():
        rows = load_from_disk(str(path))
    elif path.is_file() and path.suffix in _READERS:
        rows = load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    else:
        raise ValueError(f"{str(path)!r} is no folder, and no file whose name ends in {', '.join(_READERS)}.")
    if isinstance(rows, DatasetDict):
        if options.split not in rows:
            raise ValueError(f"{str(path)!r} has no split {options.split!r}, only {list(rows)}. Give one by --split.")
        rows = rows[options.split]
    rows = rows.select(range(min(len(rows), options.max_rows or len(rows))))
    if "input_ids" in rows.column_names:
        return rows
    texts = [name for name, kind in rows.features.items() if name != options.label and "string" in str(kind.dtype)]
    columns = options.text or (["sentence1", "sentence2"] if {"sentence1", "sentence2"} <= set(texts) else texts[:2])
    missing = [name for name in columns if name not in rows.column_names]
    if missing or not 1 <= len(columns) <= 2:
        raise ValueError(
            f"{str(path)!r} has the columns {rows.column_names}, and {columns} are to be the columns of text. Name "
            "one or two of them by --text."
        )
    known = {str(name).lower(): index for name, index in (model.config.label2id or {}).items()}

    def encode(batch: dict[str, list]) -> dict[str, list]:
        tokens = dict(
            tokenizer(*([text or "" for text in batch[c]] for c in columns), truncation=True, max_length=max_length)
        )
        labels = batch.get(options.label)
        if labels is not None and isinstance(labels[0], str):
            unknown = sorted({label for label in labels if label.lower() not in known})
            if unknown:
                raise ValueError(f"Label {unknown[0]!r} of {str(path)!r} is none of the model's: {sorted(known)}.")
            labels = [known[label.lower()] for label in labels]
        return tokens if labels is None else tokens | {"labels": labels}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


if __name__ == "__main__":
    main()
