"""Create a student: leave out layers of the teacher, make it narrower, or start from its config."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..model_structure import depth_attributes, is_peft_model, is_quantised, layer_stacks, whole_parameters
from .narrowing import Widths, narrow, new_model

#: Attributes that `from_pretrained` sets on a quantised model; PEFT and Trainer read them.
_QUANTISED = ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_8bit", "is_loaded_in_4bit")


def uniform_layers(num_layers: int, num_kept: int) -> list[int]:
    """Indices of `num_kept` layers spread evenly over `num_layers`, with the first and the last one.

    Example:
        >>> uniform_layers(6, 3)
        [0, 2, 5]
    """
    if num_kept == 1:
        return [0]
    return [round(index * (num_layers - 1) / (num_kept - 1)) for index in range(num_kept)]


def create_student(
    teacher: PreTrainedModel,
    num_hidden_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    layers: Literal["uniform", "first", "last"] | Sequence[int] = "uniform",
    init: Literal["copy", "shared", "random"] = "copy",
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """Create a smaller model of the teacher's class and head, cut from the teacher or made from its config.

    Layers are left out first (DistilBERT, arXiv 1910.01108, section 3). Then smaller widths keep the most important
    heads, feed-forward units and hidden units (`narrowing.py`).

    Args:
        teacher: A transformers model with layers in one stack, or with an encoder and a decoder. It is not changed.
        num_hidden_layers: Number of layers in each stack; by default the teacher's, or the length of `layers`.
        hidden_size: Width of the hidden states; by default the teacher's.
        intermediate_size: Width of the feed-forward layers; by default the teacher's.
        num_attention_heads: Number of heads. By default the teacher's, or, in families whose heads are
            `hidden_size / num_attention_heads` wide, as many of that width as `hidden_size` holds.
        layers: The layers to keep: "uniform" (evenly spread), "first", "last", or their indices from 0.
        init: "copy" copies the teacher's weights, "random" draws new ones from the random state of torch, "shared"
            uses the teacher's own tensors (one frozen base for the PEFT adapters of both models).
        calibration: Batches of inputs. With them the importance of a unit is the mean size of what it passes on
            (Minitron, arXiv 2407.14679), otherwise the size of its weights.

    Returns:
        An ordinary model of the teacher's class, in the teacher's dtype and on its device. If it has the teacher's
        weights, its attribute `cut_layers` has the indices of the teacher's layers (of the first stack) that it
        keeps, and `cut_depth` the number of the teacher's; the attributes are not saved.

    Raises:
        ValueError: A size is out of range or does not divide, the teacher has no such layers, the model cannot be cut
            like this, is wrapped by PEFT, or is quantised and would be copied.
    """
    if is_peft_model(teacher):
        raise ValueError(
            "`teacher` is wrapped by PEFT. Cut the student from the model inside (`teacher.get_base_model()`) before "
            "adapters are added, or merge them first (`merge_and_unload`)."
        )
    if init not in ("copy", "shared", "random"):
        raise ValueError(f"`init={init!r}` is not known: it is 'copy', 'shared' or 'random'.")
    if is_quantised(teacher) and init == "copy":
        raise ValueError(
            f"`teacher` is quantised ({teacher.config.quantization_config.quant_method}), and `init='copy'` needs its "
            "weights as they were. Cut the student before, save it, and load it with a `quantization_config`; or give "
            "`init='shared'`, for adapters of both models on one frozen base."
        )
    widths = Widths(hidden_size, intermediate_size, num_attention_heads)
    if init == "shared" and widths:
        raise ValueError(f"`init='shared'` has the teacher's own tensors, which {widths} would cut. Leave layers out.")
    kept = {
        attribute: _kept_layers(getattr(teacher.config, attribute), num_hidden_layers, layers)
        for attribute in depth_attributes(teacher.config)
    }
    if init == "random":
        config = _cut_config(teacher.config, kept)
        widths.apply(config)
        vars(config).pop("quantization_config", None)  # new weights are not quantised
        return type(teacher)(config).to(device=teacher.device, dtype=teacher.dtype)
    with whole_parameters(teacher):
        student = _cut(teacher, kept, shared=init == "shared")
    student = narrow(student, widths, calibration) if widths else student
    stack, student.cut_layers = next(iter(kept.items()))
    student.cut_depth = getattr(teacher.config, stack)
    return student


def _kept_layers(num_layers: int, number: int | None, layers: str | Sequence[int]) -> list[int]:
    """Indices of the layers that a stack keeps."""
    if not isinstance(layers, str):
        indices = list(layers)
        if number not in (None, len(indices)):
            raise ValueError(
                f"`num_hidden_layers={number}`, but `layers={indices}` are {len(indices)}: leave out one of them."
            )
        if not indices or sorted({*indices} & {*range(num_layers)}) != indices:
            raise ValueError(f"`layers={indices}` are not valid: give them in ascending order, 0 to {num_layers - 1}.")
        return indices
    number = num_layers if number is None else number
    if not 1 <= number <= num_layers:
        raise ValueError(
            f"`num_hidden_layers={number}` is not valid: the teacher has {num_layers} layers. Give 1 to {num_layers}."
        )
    indices = range(num_layers)
    choices = {"uniform": uniform_layers(num_layers, number), "first": indices[:number], "last": indices[-number:]}
    if layers not in choices:
        raise ValueError(f"`layers={layers!r}` is not known: it is one of {list(choices)}, or a list of indices.")
    return list(choices[layers])


def _cut_config(config: PreTrainedConfig, kept: Mapping[str, list[int]]) -> PreTrainedConfig:
    """A config of fewer layers; `kept` has the indices of each stack, by the attribute that counts its layers."""
    config = copy.deepcopy(config)
    first, *_ = kept.values()
    num_layers = getattr(config, next(iter(kept)))
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == num_layers:  # e.g. `layer_types`, one entry a layer
            setattr(config, name, [value[index] for index in first])
    for attribute, indices in kept.items():
        setattr(config, attribute, len(indices))
    return config


def _cut(teacher: PreTrainedModel, kept: Mapping[str, list[int]], shared: bool) -> PreTrainedModel:
    """A copy of the teacher with some layers only, or a model that shares the teacher's tensors."""
    student = new_model(teacher, _cut_config(teacher.config, kept))
    stacks = dict(zip(layer_stacks(teacher), kept.values(), strict=False))  # no stack: ALBERT
    quantised = _share_quantised(teacher, student, stacks) if is_quantised(teacher) else ()
    state = teacher.state_dict(keep_vars=shared)
    for stack, indices in stacks.items():
        layers: dict[int, dict[str, Tensor]] = {}
        for name in [*state]:
            if match := re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.*)", name):
                layers.setdefault(int(match[1]), {})[match[2]] = state.pop(name)
        # Parameters that only layer 0 has (T5's position bias) go to the student's layer 0, whichever it was.
        only_first = {name: value for name, value in layers[0].items() if name not in layers.get(indices[0], {})}
        for new, old in enumerate(indices):
            parameters = layers.get(old, {}) | (only_first if new == 0 else {})
            state |= {f"{stack}.{new}.{name}": value for name, value in parameters.items()}
    names = student.state_dict().keys()
    kept_state = {name: value for name, value in state.items() if name in names and not name.startswith(quantised)}
    report = student.load_state_dict(kept_state, strict=False, assign=shared)
    # A norm that only layers after the first one have (ModernBERT) keeps its initial values.
    missing = [n for n in report.missing_keys if "norm" not in n.lower() and not n.startswith(quantised)]
    if missing:
        raise ValueError(f"A {type(teacher).__name__} cannot be cut like this: its layers have no {missing}.")
    if is_quantised(teacher):  # all tensors are the teacher's, on their devices
        vars(student).update({name: value for name, value in vars(teacher).items() if name in _QUANTISED})
        return student
    return student.to(device=teacher.device, dtype=teacher.dtype)


def _share_quantised(
    teacher: PreTrainedModel, student: PreTrainedModel, stacks: Mapping[str, list[int]]
) -> tuple[str, ...]:
    """Give the student the teacher's quantised modules; prefixes of the names of their parameters."""
    prefixes = []
    for name, module in list(student.named_modules()):
        source = name
        for stack, indices in stacks.items():
            if match := re.fullmatch(rf"{re.escape(stack)}\.(\d+)(\..*)?", name):
                source = f"{stack}.{indices[int(match[1])]}{match[2] or ''}"
        quantised = teacher.get_submodule(source)
        if type(quantised) is not type(module):
            student.set_submodule(name, quantised)
            prefixes.append(f"{name}.")
    return tuple(prefixes)
