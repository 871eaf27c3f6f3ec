"""The bases of adapters. A base that no name leads to is saved beside its adapter, so that both load together.

PEFT saves an adapter with the name that its base was loaded by. If the base has been changed since (layers were cut,
weights were trained), that name leads to another model.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..model_structure import base_model, depth_attributes, is_divided, is_peft_model, is_quantised
from ..students.narrowing import new_model

logger = logging.get_logger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_NAME = "base_model_name_or_path"
#: The files of a base.
_FILES = ("config.json", "generation_config.json", "model*.safetensors*")
#: LoRA is initialised in these ways by a change of the base, which PEFT repeats when it loads the adapter.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Rounding to bf16 is no change of a weight.
_ROUNDING = 2**-7


class AdapterBases:
    """Saves the learners of a pair, with the base of an adapter where it is needed."""

    def __init__(self) -> None:
        #: By learner, whether its base is saved with the adapter.
        self._saved: dict[str, bool] = {}
        #: By learner, a folder that holds its base and whose files never change.
        self._kept: dict[str, Path] = {}
        self._staged = False

    def save(
        self, learner: str, model: PreTrainedModel, folder: str, state_dict: Mapping[str, Tensor] | None, **kwargs: Any
    ) -> None:
        """Save a learner as its own `save_pretrained` does; save the base of an adapter too if no name leads to it.

        If such a base cannot be saved (it is quantised, or the adapter does not load on it as it is), the config of
        the adapter gets a text in place of the name, so that loading fails.

        Args:
            learner: Name of the learner.
            model: The learner.
            folder: The folder.
            state_dict: The weights of the learner where they are gathered from several processes.
            **kwargs: Passed to `save_pretrained`.
        """
        model.save_pretrained(folder, state_dict=state_dict, **kwargs)
        base = base_model(model)
        if not (is_peft_model(model) and isinstance(base, PreTrainedModel) and kwargs.get("is_main_process", True)):
            return
        config = model.active_peft_config
        name = config.base_model_name_or_path
        if not name or state_dict == {}:  # PEFT raises an error when such an adapter is loaded
            return
        if self._saved.get(learner) is False:
            return
        with torch.device("meta"):
            plain = new_model(base, base.config)
        weights = _base_weights(model, plain, state_dict)
        if learner not in self._saved:
            self._saved[learner] = not _leads_to(name, config, base, weights, _adapter_weights(model, state_dict))
        if not self._saved[learner]:
            return
        if weights is None or is_quantised(base) or config.is_prompt_learning or _changes_the_base(config):
            name = f"The base of this adapter is not saved. It is not the model of that name: {name}"
            logger.warning("%s: %s. `from_pretrained` will fail; load the base first.", folder, name)
        else:
            name = os.path.abspath(folder)
            self._save_base(learner, plain, base, weights, Path(folder))
        for adapter in model.peft_config:
            place = Path(folder, "" if adapter == "default" else adapter)
            name_base(place, name)

    def _save_base(
        self, learner: str, plain: PreTrainedModel, base: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path
    ) -> None:
        for path in _files(folder):
            path.unlink()  # it may be a link
        kept = self._kept.get(learner)
        if self._staged and kept is not None and kept.is_dir():
            for path in _files(kept):
                link_or_copy(path, folder / path.name)
        else:
            plain.generation_config = getattr(base, "generation_config", None)
            plain.save_pretrained(folder, state_dict=dict(weights))
        if self._staged:
            self._kept[learner] = folder

    @contextmanager
    def staged(self) -> Iterator[None]:
        """Save into a folder whose files will never change. The base of an earlier such folder is linked."""
        self._staged = True
        try:
            yield
        finally:
            self._staged = False

    def moved(self, written: Path, final: Path) -> None:
        """Name the bases in a folder by the place to which it is about to be moved."""
        before = os.path.abspath(written)
        for path in written.rglob(_ADAPTER_CONFIG):
            name = _name_in(path)
            if name == before or name.startswith(before + os.sep):
                name_base(path.parent, os.path.abspath(final) + name.removeprefix(before))
        for learner, folder in self._kept.items():
            if folder.is_relative_to(written):
                self._kept[learner] = final / folder.relative_to(written)


def has_own_base(folder: str | os.PathLike) -> bool:
    """Tell whether a folder holds an adapter with its base."""
    path = Path(folder, _ADAPTER_CONFIG)
    return path.with_name(CONFIG_NAME).is_file() and path.is_file() and os.path.isabs(_name_in(path))


def name_base(folder: Path, name: str) -> None:
    """Set the name of the base in the config of an adapter. The file is replaced, not changed: it may be a link."""
    path = folder / _ADAPTER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) | {_NAME: name, "revision": None}
    path.unlink()
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Make a hard link to a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _name_in(path: Path) -> str:
    return json.loads(path.read_text(encoding="utf-8")).get(_NAME) or ""


def _files(folder: Path) -> list[Path]:
    return [path for pattern in _FILES for path in folder.glob(pattern)]


def _changes_the_base(config: Any) -> bool:
    return str(getattr(config, "init_lora_weights", "")).startswith(_CHANGE_THE_BASE)


def _plain_name(key: str) -> str:
    """Return the name that a weight has without PEFT's wrapper."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _base_weights(
    model: nn.Module, plain: nn.Module, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Return the weights inside a PEFT wrapper by their plain names; `None` if some cannot be found."""
    state = model.state_dict() if state_dict is None else state_dict
    names = plain.state_dict().keys()
    weights = {name: value for key, value in state.items() if (name := _plain_name(key)) in names}
    return weights if weights.keys() == names else None


def _adapter_weights(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> set[str]:
    """Return the plain names of the weights that the adapter replaces."""
    from peft import get_peft_model_state_dict  # installed, since it has wrapped the model

    state = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    return {_plain_name(key) for key in state}


def _leads_to(
    name: str, config: Any, base: PreTrainedModel, weights: Mapping[str, Tensor] | None, replaced: set[str]
) -> bool:
    """Tell whether `from_pretrained(name)` loads this base, apart from weights that the adapter replaces.

    Nothing is downloaded. Of a quantised base the number of layers is compared, and of one that PEFT changes the
    shapes.
    """
    options = {"revision": config.revision, "local_files_only": True}
    try:
        there = type(base.config).from_pretrained(name, **options)
        if is_quantised(base):
            return all(getattr(there, key) == getattr(base.config, key) for key in depth_attributes(there))
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in new_model(base, there).state_dict().items()}
        here = {key: value for key, value in (weights or {}).items() if key not in replaced}
        if {key: value.shape for key, value in here.items()} != {k: v for k, v in shapes.items() if k not in replaced}:
            return False
        return _changes_the_base(config) or _same_weights(name, options, base, here)
    except (OSError, ValueError) as error:  # nothing is known of that name
        logger.debug("The base %s cannot be compared: %r", name, error)
        return is_quantised(base)


def _same_weights(name: str, options: Mapping[str, Any], base: PreTrainedModel, here: Mapping[str, Tensor]) -> bool:
    """Compare weights with those in the files of a model or, where these have other names, with the loaded model."""
    folder = Path(cached_file(name, CONFIG_NAME, **options)).parent
    missing, found, prefix = dict(here), set(), f"{base.base_model_prefix}."
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                names = (key, f"{prefix}{key}", key.removeprefix(prefix))
                own = next((own for own in names if own in missing), None)
                if own is not None and tuple(file.get_slice(key).get_shape()) == missing[own].shape:
                    value = missing.pop(own)
                    found.add(value.data_ptr())
                    if not _close(value, file.get_tensor(key)):
                        return False
    missing = {key: value for key, value in missing.items() if value.data_ptr() not in found}  # without tied ones
    if not missing or is_divided(base):  # a loaded model would be divided, too
        return not missing
    with torch.random.fork_rng():
        loaded, report = type(base).from_pretrained(name, output_loading_info=True, **options)
    state = loaded.state_dict()
    return not report["missing_keys"] & missing.keys() and all(_close(missing[key], state[key]) for key in missing)


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.cpu().float(), second.float(), rtol=_ROUNDING, atol=0.0)
