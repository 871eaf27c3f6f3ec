"""Rows from the Hub, a folder or files: the splits that a script needs, and their tokens."""

import csv
import json
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import TrainingArguments

from examples.common.arguments import TABLE_READERS, DataArguments, ModelArguments, file_reader

#: The arguments that ask for each split and that limit the number of its rows.
SPLIT_ARGUMENTS: Mapping[str, tuple[str, str]] = {
    "train": ("do_train", "max_train_samples"),
    "validation": ("do_eval", "max_eval_samples"),
    "test": ("do_predict", "max_predict_samples"),
}

Rows = Dataset | IterableDataset


def load_files(
    files: Mapping[str, str],
    cache_dir: str | None = None,
    readers: Mapping[str, str] = TABLE_READERS,
    reader_options: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> DatasetDict:
    """Load one file per split. The splits may have different columns: a test file needs no labels.

    Args:
        files: Paths by split: `train`, `validation`, `test`.
        cache_dir: Folder in which `datasets` keeps what it has read.
        readers: The readers by the end of a file's name.
        reader_options: Further arguments of `load_dataset`, by the name of the reader.
        **options: Further arguments of `load_dataset` for all readers (`streaming`, `field`, ...).

    Raises:
        ValueError: A file has no rows or cannot be read; the message has the line where that is known.
    """
    splits = DatasetDict()
    for split, path in files.items():
        reader = file_reader(path, f"{split}_file", readers)
        given = {**(reader_options or {}).get(reader, {}), **options}
        named = f"`--{split}_file {path}`"
        if reader == "csv":
            check_csv(path, named)
        try:
            rows = load_dataset(reader, data_files={split: path}, split=split, cache_dir=cache_dir, **given)
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            where = _json_error(path) if reader == "json" else error.__cause__ or error
            raise ValueError(f"{named} cannot be read as {reader}: {where}. Correct the file.") from error
        if isinstance(rows, Sized) and len(rows) == 0:
            raise ValueError(f"{named} has no rows.")
        splits[split] = rows
    return splits


def check_csv(path: str, named: str) -> None:
    """Refuse a CSV file that has no rows, or whose rows would be read as other columns.

    Args:
        path: The file.
        named: The argument that gave it, for the message.

    Raises:
        ValueError: The message has the line and a remedy.
    """
    columns: list[str] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows, line = csv.reader(file, strict=True), 1
            columns, found = next(rows, []), False
            separator = next((each for each in ";\t|" if len(columns) == 1 and each in columns[0]), None)
            if separator is not None:
                raise ValueError(
                    f"{named}, line 1: the columns {columns[0]!r} are separated by {separator!r}. Write the file with "
                    "commas, and texts that contain commas in double quotes."
                )
            line = rows.line_num + 1
            for row in rows:
                if len(row) > len(columns):
                    raise ValueError(
                        f"{named}, line {line}: {len(row)} fields, and the {len(columns)} columns {columns}. Put "
                        "texts that contain commas in double quotes."
                    )
                line, found = rows.line_num + 1, found or bool(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} is not encoded in UTF-8: {error}. Convert it.") from error
    except csv.Error as error:
        if "unexpected end" not in str(error):
            return  # `datasets` may still read it
        raise ValueError(
            f"{named}, line {line}: a double quote opens a text and none closes it. Close it, or write a quote inside "
            'of a text as `""`.'
        ) from error
    if not found:
        content = f"the header {columns} alone" if columns else "nothing"
        raise ValueError(f"{named} holds {content}: there are no rows. Check how the file was written.")


def _json_error(path: str) -> str:
    """Describe what is wrong in a file of JSON, or of one JSON object a line."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        return "the file is empty"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines() if text.lstrip().startswith("{") and error.msg == "Extra data" else []
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line or "{}")
            except json.JSONDecodeError as at:
                return f"line {number}, character {at.colno}: {at.msg}"
        return f"line {error.lineno}, character {error.colno}: {error.msg}"
    return "the rows have different columns or types" if content else "it has no rows"


def load_raw_data(model_args: ModelArguments, data_args: DataArguments, **options: Any) -> DatasetDict:
    """Load all splits. Options are further arguments of `load_dataset`."""
    if data_args.files:
        return load_files(
            data_args.files, model_args.cache_dir, data_args.readers, data_args.reader_options, **options
        )
    return load_dataset(
        data_args.dataset_name,
        data_args.dataset_config_name,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        **options,
    )


def wanted_splits(data_args: DataArguments, training_args: TrainingArguments) -> dict[str, int | None]:
    """The splits that a run needs, with the number of their first rows to take, `None` for all.

    A split is left out if `data_args` has no argument that limits it: the script does not use it.
    """
    return {
        split: getattr(data_args, limit)
        for split, (argument, limit) in SPLIT_ARGUMENTS.items()
        if hasattr(data_args, limit) and getattr(training_args, argument)
    }


def split_of(raw: Mapping[str, Rows], split: str, name: str | None = None) -> Rows:
    """A split of the data.

    Args:
        raw: All splits.
        split: Use of the split: `train`, `validation` or `test`.
        name: Name of the split in the data, if it differs.

    Raises:
        ValueError: The data has no such split.
    """
    name = name or split
    if name not in raw:
        raise ValueError(
            f"`--{SPLIT_ARGUMENTS[split][0]}` needs the split {name!r}, and the data has only {list(raw)}."
        )
    return raw[name]


def first_rows(rows: Rows, limit: int | None) -> Rows:
    """The first rows; all of them without a limit."""
    return rows if limit is None else rows.take(min(limit, len(rows)) if isinstance(rows, Sized) else limit)


def selected_rows(
    raw: Mapping[str, Rows], data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Dataset]:
    """The first rows of each split that a run needs. Raises `ValueError` if the data lacks a split."""
    wanted = wanted_splits(data_args, training_args)
    return {split: first_rows(split_of(raw, split), limit) for split, limit in wanted.items()}


def tokenize(
    splits: Mapping[str, Dataset],
    preprocess: Callable[..., dict[str, list]],
    data_args: DataArguments,
    training_args: TrainingArguments,
    **options: Any,
) -> dict[str, Dataset]:
    """The tokens of each split, as the main process makes them and the others read them from the cache.

    Args:
        splits: The rows by split.
        preprocess: Turns a batch of rows into columns of tokens.
        data_args: The arguments that say how `datasets` preprocesses.
        training_args: The arguments that know the processes.
        **options: Further arguments of `Dataset.map`.
    """
    with training_args.main_process_first(desc="tokenizing"):
        return {
            split: rows.map(
                preprocess,
                batched=True,
                num_proc=data_args.preprocessing_num_workers,
                remove_columns=rows.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {split}",
                **options,
            )
            for split, rows in splits.items()
        }
