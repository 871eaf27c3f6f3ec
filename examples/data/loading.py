"""Rows from the Hub, a folder or files: the splits that a script needs, and their tokens."""

from collections.abc import Callable, Mapping, Sized
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
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
    """
    splits = DatasetDict()
    for split, path in files.items():
        reader = file_reader(path, f"{split}_file", readers)
        given = {**(reader_options or {}).get(reader, {}), **options}
        splits[split] = load_dataset(reader, data_files={split: path}, split=split, cache_dir=cache_dir, **given)
    return splits


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
