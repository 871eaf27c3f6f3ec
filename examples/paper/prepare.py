"""Prepares the data and the models of a scale, so that its trainings need neither a network nor `datasets`.

Writes a folder with token ids and labels in one safetensors file for each task, the tokenizer, the initial models, and
a manifest with their hashes. The folder can be carried to another machine.

    python -m examples.paper.prepare --config examples/paper/nano.yaml --output outputs/paper/nano/prepared
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from ctcd_trainer import create_student
from examples.data.glue import TASK_TO_TEXT
from examples.data.text import Blocks

from .cells import MLM
from .data import MANIFEST, PARTS, Masking
from .settings import Scale, load_scale

SEED = 0
#: The split that is scored, for tasks with several.
VALIDATION = {"mnli": "validation_matched"}
#: Entries of configs that depend on machine and versions, which a fingerprint leaves out.
_LEFT_OUT = ("transformers_version", "is_local", "local_files_only", "name_or_path", "_name_or_path")


def prepare_text(scale: Scale, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Rows of text of one length, without masks for training and with fixed masks for scoring."""
    sets = {"train": _texts(scale, "train")}
    if any(text.validation_split is not None for text in scale.text):
        sets["validation"] = _texts(scale, "validation")
    blocks = {
        # Consecutive texts fill a block together; the blocks are shuffled.
        part: texts.map(
            Blocks(tokenizer, scale.block_length, masked=False),
            batched=True,
            remove_columns=texts.column_names,
            desc=f"Tokenizing text ({part})",
        )
        .shuffle(seed=SEED)
        .with_format("torch")
        for part, texts in sets.items()
    }
    scored = {"dev": _take(blocks, "train", scale.score_blocks)}
    scored["validation"] = _take(blocks, "validation" if "validation" in blocks else "train", scale.score_blocks)
    count = len(blocks["train"]) if scale.train_blocks is None else scale.train_blocks
    if count > len(blocks["train"]):
        raise ValueError(
            f"`train_blocks: {count}`, but the text has only {len(blocks['train'])} blocks of {scale.block_length} "
            "tokens for training. Give more text, or lower it."
        )
    masking, tensors = Masking(tokenizer), {"train.input_ids": _take(blocks, "train", count)["input_ids"][:].int()}
    for part, rows in scored.items():
        masked = [masking(row, SEED, number) for number, row in enumerate(rows)]
        tensors |= {f"{part}.{name}": torch.stack([row[name] for row in masked]) for name in ("input_ids", "labels")}
    for part in PARTS:
        tensors[f"{part}.lengths"] = torch.full((len(tensors[f"{part}.input_ids"]),), scale.block_length)
    return tensors


def _texts(scale: Scale, part: str) -> Dataset:
    """The texts of all data sets, in their order."""
    found = []
    for text in scale.text:
        split = "train" if part == "train" else text.validation_split
        if split is not None:
            texts = load_dataset(text.path, text.name, split=split).select_columns(text.column)
            texts = texts if text.column == "text" else texts.rename_column(text.column, "text")
            found.append(texts.take(min(text.texts, len(texts))) if text.texts and part == "train" else texts)
    return concatenate_datasets(found)


def _take(blocks: dict[str, Dataset], part: str, count: int) -> Dataset:
    """Remove the first rows of a part, and return them."""
    if len(blocks[part]) < count:
        raise ValueError(f"The {part} text has {len(blocks[part])} blocks, and {count} are wanted. Give more text.")
    taken = blocks[part].take(count)
    if count < len(blocks[part]):
        blocks[part] = blocks[part].skip(count)
    return taken


def prepare_glue(scale: Scale, task: str, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Tensor], dict]:
    """The rows of a GLUE task, and its labels; a share of the training rows becomes the dev set."""
    splits = load_dataset(scale.glue, task)
    train, validation = splits["train"].shuffle(seed=SEED), splits[VALIDATION.get(task, "validation")]
    dev_rows = int(len(train) * scale.dev_share)
    settings = scale.tasks[task] or {}
    parts = {
        "dev": train.take(min(dev_rows, 2 * len(validation))),
        "train": train.skip(dev_rows).take(min(settings.get("train_rows", len(train)), len(train) - dev_rows)),
        "validation": validation,
    }
    columns = TASK_TO_TEXT[task]
    tensors = {}
    for part, rows in parts.items():
        tokens = tokenizer(
            *(rows[column][:] for column in columns),
            truncation=True,
            max_length=settings.get("max_length", 128),
            return_token_type_ids=True,
        )
        for name in ("input_ids", "token_type_ids"):
            tensors[f"{part}.{name}"] = pad_sequence([torch.tensor(row) for row in tokens[name]], batch_first=True)
        tensors[f"{part}.lengths"] = torch.tensor([len(row) for row in tokens["input_ids"]])
        tensors[f"{part}.labels"] = torch.tensor(rows["label"][:])
    if task == "stsb":
        return tensors, {"num_labels": 1, "problem_type": "regression"}
    names = splits["train"].features["label"].names
    return tensors, {
        "num_labels": len(names),
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def prepare_models(scale: Scale, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The weights that exist before any training, and the configs of both models.

    Parameters without weights in the source (perhaps the head) are left out, so that each training draws them by seed.
    """
    sizes = {"vocab_size": len(tokenizer)} if scale.models.vocab_size else {}
    config = AutoConfig.from_pretrained(scale.models.source)
    cut = scale.models.teacher.get("num_hidden_layers", config.num_hidden_layers)
    other = {name: value for name, value in scale.models.teacher.items() if name != "num_hidden_layers"} | sizes
    if other:  # the source's weights do not fit
        config.update(dict(scale.models.teacher) | sizes)
        config.save_pretrained(folder / "teacher")
    else:
        model, report = AutoModelForPreTraining.from_pretrained(scale.models.source, output_loading_info=True)
        model = model if cut == config.num_hidden_layers else create_student(model, cut)
        state = {name: value for name, value in model.state_dict().items() if name not in report["missing_keys"]}
        model.save_pretrained(folder / "teacher", state_dict=state)
        config = model.config
    config.update(dict(scale.models.student))
    config.save_pretrained(folder / "student")
    if scale.models.pretrained_teacher is not None:
        AutoModelForMaskedLM.from_pretrained(scale.models.pretrained_teacher).save_pretrained(
            folder / "pretrained_teacher"
        )


def prepare_tokenizer(scale: Scale) -> PreTrainedTokenizerBase:
    """The source's tokenizer, or a new one of its kind that is trained on the text."""
    tokenizer = AutoTokenizer.from_pretrained(scale.models.source)
    if scale.models.vocab_size is None:
        return tokenizer
    return tokenizer.train_new_from_iterator(_texts(scale, "train")["text"], scale.models.vocab_size)


def fingerprint(paths: Iterable[Path]) -> str:
    """Hash of the contents of files, without the entries of JSON files that depend on machine and versions."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        if path.suffix == ".json":
            values = {name: value for name, value in json.loads(content).items() if name not in _LEFT_OUT}
            content = json.dumps(values, sort_keys=True).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def prepare(scale: Scale, folder: Path) -> None:
    """Write everything that the trainings of a scale need; the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for old in (folder / "models", folder / "tokenizer"):
        shutil.rmtree(old, ignore_errors=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    set_seed(SEED)
    tokenizer = prepare_tokenizer(scale)
    tokenizer.save_pretrained(folder / "tokenizer")
    prepare_models(scale, tokenizer, folder / "models")
    counts: dict[str, Any] = {}
    files: dict[str, tuple[dict[str, Tensor], dict]] = {MLM: (prepare_text(scale, tokenizer), {})}
    files |= {task: prepare_glue(scale, task, tokenizer) for task in scale.tasks}
    for task, (tensors, labels) in files.items():
        small = {name: value.int() if value.dtype == torch.long else value.float() for name, value in tensors.items()}
        small |= {name: tensors[name] for name in tensors if name.endswith(".labels") and tensors[name].ndim == 1}
        # Not `save_file`: other users of the folder cannot read its files.
        (folder / f"{task}.safetensors").write_bytes(save(small, metadata={"labels": json.dumps(labels)}))
        counts[task] = {
            part: {"rows": len(tensors[f"{part}.lengths"]), "tokens": int(tensors[f"{part}.lengths"].sum())}
            for part in PARTS
        }
        print(f"{task}: {counts[task]}", flush=True)
    fingerprints = {task: fingerprint([folder / f"{task}.safetensors"]) for task in files}
    fingerprints["models"] = fingerprint(
        path for place in ("models", "tokenizer") for path in (folder / place).rglob("*") if path.is_file()
    )
    manifest = {"scale": scale.name, "fingerprints": fingerprints, "counts": counts, "settings": asdict(scale)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    """Parse the command line, and prepare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the scale")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", help="folder or name of a text data set, instead of the YAML file's")
    parser.add_argument("--text_name", help="its configuration, with --text")
    parser.add_argument("--glue", help="folder or name of the GLUE data set, instead of the one in the YAML file")
    parser.add_argument("--model", help="folder or name of the source of the models, instead of the one in the file")
    args = parser.parse_args()
    logging.set_verbosity_error()  # no warnings about heads without weights
    logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    scale = load_scale(args.config)
    if args.text is not None:
        scale = replace(scale, text=[replace(scale.text[0], path=args.text, name=args.text_name)])
    if args.glue is not None:
        scale = replace(scale, glue=args.glue)
    if args.model is not None:
        scale = replace(scale, models=replace(scale.models, source=args.model))
    prepare(scale, args.output)


if __name__ == "__main__":
    main()
