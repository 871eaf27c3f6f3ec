"""What a model card says of models, data and arguments, without anything of the user's machine."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)

from ..arguments import ModeDefault
from ..model_structure import base_model, forward_parameters, is_peft_model
from ..tasks.base import Task

#: Builders that read the user's own files: the name says nothing of the data.
_FILE_BUILDERS = frozenset(
    {"arrow", "audiofolder", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "spark", "sql", "text"}
    | {"webdataset", "xml"}
)
#: Arguments that say where something is, or who the user is, and nothing of the training.
_PRIVATE_NAME = re.compile(
    r"(_|^)(dir|path|file|token|secret|password|key|credentials?)$|^(run_name|project|trackio_.*|report_to|disable_tqdm)$",
    re.IGNORECASE,
)
#: An absolute path, one that begins in a known place, a token of the Hub, or a URL with a password.
_PRIVATE_VALUE = re.compile(r"(^|[\s=:,;'\"])(/|~/|\.\.?/|[A-Za-z]:\\)\w|\bhf_\w{8,}|://[^/\s]*@")
_AUTO_PROCESSORS = (
    (PreTrainedTokenizerBase, "tokenizer", "AutoTokenizer"),
    (ProcessorMixin, "processor", "AutoProcessor"),
    (BaseImageProcessor, "processor", "AutoImageProcessor"),
    (FeatureExtractionMixin, "processor", "AutoFeatureExtractor"),
)


def is_private(text: str) -> bool:
    """Whether a text has a place on this machine or a secret in it."""
    return _PRIVATE_VALUE.search(text) is not None or (os.sep in text and os.path.exists(text))


def repo_id(name: Any) -> str | None:
    """A name if it can be the one of a repository on the Hub; `None` for one of a folder, or of nothing."""
    if not isinstance(name, str) or not name or os.path.isdir(name) or is_private(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def link(repo: str) -> str:
    """A Markdown link to a repository on the Hub."""
    return f"[{repo}](https://huggingface.co/{repo})"


def public_name(name: str) -> str:
    """A name as it is, or the last part of what is a path on this machine."""
    return os.path.basename(os.path.normpath(name)) if is_private(name) or os.path.isabs(name) else name


# ---- The models ----


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from.

    Attributes:
        repo: Repository on the Hub, if it is one.
        text: A sentence about it.
    """

    repo: str | None
    text: str

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> "Origin":
        """Read it from the model.

        Args:
            model: The model, PEFT-wrapped or not.
            name: A name that the user gives instead; the empty one for a model that was trained from scratch.
        """
        if name is None:
            name = getattr(base_model(model).config, "_name_or_path", None) or ""
            if is_peft_model(model):
                name = name or model.active_peft_config.base_model_name_or_path or ""
        kind = type(base_model(model)).__name__
        adapted = "It is an adapter of a" if is_peft_model(model) else "It is a"
        if not name:
            how = " with random weights" if is_peft_model(model) else " that was trained from scratch"
            return cls(None, f"{adapted} `{kind}`{how}.")
        repo = repo_id(name)
        source = link(repo) if repo is not None else "a model that is not on the Hub"
        return cls(repo, f"{adapted} `{kind}` that started from the weights of {source}.")


def loading_code(
    model: nn.Module,
    task: Task,
    place: str,
    origin: Origin,
    processing_class: Any,
    subfolder: str | None = None,
    revision: str | None = None,
) -> str | None:
    """Python code that loads a model as it was saved; `None` if its class is not one of transformers.

    With an adapter of a model that is not on the Hub, `base_model` must be there.

    Args:
        model: The model.
        task: What it is for.
        place: Repository or folder.
        origin: Where its weights came from.
        processing_class: The tokenizer or processor beside it, if there is one.
        subfolder: Folder in that place.
        revision: Branch or pull request of the repository; `None` for the main branch.
    """
    kind = type(base_model(model))
    auto_class = getattr(task, "auto_model", kind).__name__
    if auto_class == kind.__name__ and not kind.__module__.startswith("transformers."):
        return None
    options = {"subfolder": subfolder, "revision": revision}
    where = "".join([f'"{place}"', *(f', {name}="{value}"' for name, value in options.items() if value)])
    imports, lines = [auto_class], [f"model = {auto_class}.from_pretrained({where})"]
    if is_peft_model(model):
        lines = [f"model = PeftModel.from_pretrained(base_model, {where})"]
        if origin.repo is not None:
            labels = f", num_labels={model.config.num_labels}" if "Classification" in auto_class else ""
            lines.insert(0, f'base_model = {auto_class}.from_pretrained("{origin.repo}"{labels})')
        else:
            imports = []
    for processor_class, variable, auto_name in _AUTO_PROCESSORS:
        if isinstance(processing_class, processor_class):
            imports.append(auto_name)
            lines.append(f"{variable} = {auto_name}.from_pretrained({where})")
            tag = task.pipeline_tag
            fits = variable == "tokenizer" and set(processing_class.model_input_names) <= forward_parameters(model)
            if fits and tag in ("text-classification", "token-classification"):
                imports.append("pipeline")
                lines.append(f'classify = pipeline("{tag}", model=model, tokenizer=tokenizer)')
                lines.append('print(classify("Put your own text here."))')
            break
    head = ["from peft import PeftModel"] if is_peft_model(model) else []
    if imports:
        head.append(f"from transformers import {', '.join(sorted(imports, key=lambda name: (name.islower(), name)))}")
    return "\n".join([*head, "", *lines])


# ---- Data, arguments, software ----


def dataset_settings(dataset: Any, given: Mapping[str, Any]) -> dict[str, list[str] | str | None]:
    """What is said of the data: the arguments of the card, or else what a data set from the Hub knows of itself.

    Args:
        dataset: The evaluation or training data.
        given: The arguments `dataset_tags`, `dataset` and `dataset_args`, as far as they are given.

    Returns:
        `tags`, `names` and `args`, lists of the same length or empty, and the `split` of the data if it is known.
    """
    tags, names, args = (_as_list(given.get(key)) for key in ("dataset_tags", "dataset", "dataset_args"))
    builder = getattr(dataset, "builder_name", None)
    split = None
    if builder is not None and builder not in _FILE_BUILDERS:
        tags, args = tags or [builder], args or _as_list(dataset.config_name)
        split = str(dataset.split) if dataset.split is not None else None
    tags = [tag for tag in tags if repo_id(tag) is not None]
    return {
        "tags": tags,
        "names": [public_name(name) for name in names] or tags,
        "args": [public_name(str(arg)) for arg in args],
        "split": split,
    }


def training_arguments(args: TrainingArguments) -> dict[str, str]:
    """All arguments that are not at their default, but for places, tokens and the like.

    Weights that the distillation mode has set follow from it and are left out.
    """
    shown = {}
    for field in fields(args):
        value, default = getattr(args, field.name), field.default
        if default is MISSING:
            default = field.default_factory() if field.default_factory is not MISSING else None
        value = value.value if isinstance(value, Enum) else value
        filled_in = isinstance(value, ModeDefault) or value in (None, "", [], {}) or (value is False and not default)
        if not field.init or filled_in or value == default or _PRIVATE_NAME.search(field.name):
            continue
        if field.name == "accelerator_config":
            if value == type(value)():
                continue
            value = value.to_dict()
        value = _without_secrets(value)
        if value is not None:
            shown[field.name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return shown


@cache
def framework_versions(with_peft: bool) -> dict[str, str]:
    """Versions of what was used, by name."""
    packages = {
        "ctcd_trainer": "ctcd_trainer",
        "Transformers": "transformers",
        **({"PEFT": "peft"} if with_peft else {}),
        "PyTorch": "torch",
        "Accelerate": "accelerate",
        "Datasets": "datasets",
        "Tokenizers": "tokenizers",
    }
    versions = {}
    for name, package in packages.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _without_secrets(value: Any) -> Any:
    """A value without the parts that are private; `None` if nothing is left."""
    if isinstance(value, (str, os.PathLike)):
        return None if is_private(os.fspath(value)) else value
    if isinstance(value, Mapping):
        kept = {key: _without_secrets(own) for key, own in value.items() if not _PRIVATE_NAME.search(str(key))}
        return {key: own for key, own in kept.items() if own is not None} or None
    if isinstance(value, (list, tuple)):
        return [own for own in map(_without_secrets, value) if own is not None] or None
    return value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
