"""Where a student comes from: a name or path, or a teacher with some of its layers left out."""

import copy
import os
import re

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .labels import own_labels
from .tasks import TASKS, find_task
from .wrapping import base_model, is_peft_model


def load_model(
    name_or_path: str | os.PathLike, argument: str, like: PreTrainedModel | None = None, frozen: bool = False
) -> PreTrainedModel:
    """Load a model by name or path, as `from_pretrained` takes them.

    Args:
        name_or_path: A folder or the name of a repository on the Hub.
        argument: Name of the argument that gave it, for the message.
        like: A model that it will be paired with: its head is used, and its labels unless the checkpoint has its own.
            Without it, the head is the one that the checkpoint was saved with.
        frozen: Whether it will only be learnt from, so that it needs a trained head.

    Raises:
        ValueError: There is no model to take the head from and the checkpoint has none, or it is frozen and some of
            its weights are not in the checkpoint.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    if like is not None:
        try:
            auto_model = find_task(like).auto_model
        except ValueError:  # a head that only the user's own soft loss knows
            auto_model = type(base_model(like))
        if own_labels(config) is None:
            config.id2label, config.label2id = dict(like.config.id2label), dict(like.config.label2id)
        config.problem_type = config.problem_type or like.config.problem_type
    else:
        names = set(config.architectures or ())
        auto_model = next((task.auto_model for task in TASKS if task.model_names & names), None)
        if auto_model is None:
            raise ValueError(
                f"`{argument}={str(name_or_path)!r}` was saved as {config.architectures}, which has no head that is "
                "supported. Load it with the `AutoModelFor...` class of your task and pass the model."
            )
    model, report = auto_model.from_pretrained(name_or_path, config=config, output_loading_info=True)
    if frozen and report["missing_keys"]:
        raise ValueError(
            f"`{argument}={str(name_or_path)!r}` is frozen, and has no trained weights for "
            f"{sorted(report['missing_keys'])}: what it teaches would be random. Fine-tune it on this task first."
        )
    return model


def uniform_layers(num_layers: int, num_kept: int) -> list[int]:
    """Indices of `num_kept` layers spread evenly over `num_layers`, with the first and the last one.

    Example:
        >>> uniform_layers(6, 3)
        [0, 2, 5]
    """
    if num_kept == 1:
        return [0]
    return [round(index * (num_layers - 1) / (num_kept - 1)) for index in range(num_kept)]


def create_student(teacher: PreTrainedModel, num_hidden_layers: int) -> PreTrainedModel:
    """A student with the teacher's architecture, weights and head, but fewer layers.

    The layers that are kept are spread evenly (`uniform_layers`), as in DistilBERT (arXiv 1910.01108, section 3).

    Args:
        teacher: Any transformers model with one stack of `config.num_hidden_layers` layers. It is not changed, and
            shares no parameter with the student.
        num_hidden_layers: Number of layers of the student, from 1 to the teacher's number.

    Returns:
        An ordinary model of the teacher's class, in the teacher's dtype and on its device.

    Raises:
        ValueError: The number of layers is out of range, or the model has no such stack of layers or is wrapped by
            PEFT.
    """
    if is_peft_model(teacher):
        raise ValueError(
            "`teacher` is wrapped by PEFT. Cut the student from the model inside (`teacher.get_base_model()`) before "
            "adapters are added, or merge them first (`merge_and_unload`)."
        )
    num_layers = teacher.config.num_hidden_layers
    if not 1 <= num_hidden_layers <= num_layers:
        raise ValueError(
            f"`num_hidden_layers={num_hidden_layers}` is not valid: the teacher has {num_layers} layers, so a student "
            f"cut from it has from 1 to {num_layers}."
        )
    stacks = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{outer}.") for outer in stacks)]
    if len(stacks) != 1:
        raise ValueError(
            f"A {type(teacher).__name__} has {len(stacks)} stacks of {num_layers} layers {stacks}, and cutting needs "
            "exactly one. Build the student from a smaller config instead."
        )
    kept = uniform_layers(num_layers, num_hidden_layers)
    config = copy.deepcopy(teacher.config)
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == num_layers:  # e.g. `layer_types`, one entry a layer
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = num_hidden_layers

    new_index = {str(old): str(new) for new, old in enumerate(kept)}
    layer_of = re.compile(rf"{re.escape(stacks[0])}\.(\d+)\.(.*)")
    state_dict = {}
    for name, value in teacher.state_dict().items():
        match = layer_of.fullmatch(name)
        if match is None:
            state_dict[name] = value
        elif match[1] in new_index:
            state_dict[f"{stacks[0]}.{new_index[match[1]]}.{match[2]}"] = value
    with torch.random.fork_rng(
        devices=[]
    ):  # the random initialisation is overwritten: it must not move the user's seed
        student = type(teacher)(config)
    student.load_state_dict(state_dict)
    return student.to(device=teacher.device, dtype=teacher.dtype)
