"""Layers that the teacher and the student share: one set of weights, computed once a step for both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arguments import parse_share
from ..model_structure import in_evaluation_mode, is_peft_model, layer_stacks, memory_of

#: Modules that run before the layers in some families, although they are registered after them.
_BELOW = ("rel_embeddings", "LayerNorm", "layernorm_embedding")


def share_modules(teacher: PreTrainedModel, student: PreTrainedModel, share: str) -> list[nn.Module]:
    """Replace the student's embeddings and lowest layers by the teacher's.

    Args:
        teacher: The teacher.
        student: The student, as `create_student(teacher, ..., layers="first")` makes it. It is changed.
        share: `"embeddings"`: the modules that run before the layers. `"layers:K"`: also the K lowest layers, in an
            encoder-decoder those of the encoder. `"prefix"`: also all layers of the student.

    Returns:
        The shared layers, which can be run once for both models; none with `"embeddings"`.

    Raises:
        ValueError: The models are of different classes or have adapters, the parts to share differ in sizes or
            settings, or the models share other parameters already. The student is then unchanged.
    """
    number = parse_share(share)
    models = {"model": teacher, "student_model": student}
    adapted = [argument for argument, model in models.items() if is_peft_model(model)]
    if adapted:
        raise ValueError(
            f"`share={share!r}` does not work with adapters, and `{adapted[0]}` is wrapped by PEFT. Leave out "
            "`share`, or give each model its adapter on one frozen base (`create_student(..., init='shared')`)."
        )
    if type(teacher) is not type(student):
        raise ValueError(
            f"`share={share!r}`: the teacher is a {type(teacher).__name__} and the student a "
            f"{type(student).__name__}. Make a student of the same class with `create_student`."
        )
    stack = next(iter(layer_stacks(teacher)), None)
    names = _below(teacher, stack)
    layers = [] if number == 0 else _lowest_layers(teacher, student, stack, number, share)
    names += [f"{stack}.{index}" for index in range(len(layers))]
    for name in names:
        _check_same(name, teacher.get_submodule(name), student.get_submodule(name), share)
    both = {memory_of(parameter) for parameter in teacher.parameters()}
    asked = {memory_of(parameter) for name in names for parameter in teacher.get_submodule(name).parameters()}
    for name, parameter in student.named_parameters():
        if memory_of(parameter) in both - asked:
            raise ValueError(
                f"`share={share!r}` does not include `{name}`, which `model` and `student_model` have in common: "
                "each step would update it for both. Make the student with `create_student(..., init='copy')`."
            )
    for name in names:
        student.set_submodule(name, teacher.get_submodule(name))
    student.tie_weights()  # an output layer that is tied to the embeddings
    return layers


def _lowest_layers(
    teacher: PreTrainedModel, student: PreTrainedModel, stack: str | None, number: int | None, share: str
) -> list[nn.Module]:
    """Return the `number` lowest layers of the teacher's stack; as many as the student has if that is `None`."""
    if stack is None:
        raise ValueError(f"`share={share!r}`: a {type(teacher).__name__} runs one layer several times. Share less.")
    teachers, students = (model.get_submodule(stack) for model in (teacher, student))
    number = len(students) if number is None else number
    most = min(len(teachers), len(students))
    types = [list(getattr(model.config, "layer_types", None) or [])[:number] for model in (teacher, student)]
    if number > most:
        problem = f"the teacher has {len(teachers)} layers and the student {len(students)}. Share at most {most}."
    elif types[0] != types[1]:
        problem = f"the layers of the teacher are {types[0]}, of the student {types[1]}. Cut it with `layers='first'`."
    else:
        return list(teachers[:number])
    raise ValueError(f"`share={share!r}`: {problem}")


def _below(model: PreTrainedModel, stack: str | None) -> list[str]:
    """List the modules that run before the layers: those registered before them, and `_BELOW`."""
    if stack is None:
        return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "embeddings"]
    names: list[str] = []
    path = stack.split(".")
    for depth, child in enumerate(path):
        parent = ".".join(path[:depth])
        children = [name for name, _ in model.get_submodule(parent).named_children()]
        below = children[: children.index(child)]
        if depth == len(path) - 1:
            below += [name for name in children if name in _BELOW]
        names += [f"{parent}.{name}".removeprefix(".") for name in below]
    return names


def _check_same(name: str, teachers: nn.Module, students: nn.Module, share: str) -> None:
    """Check that two modules are alike, so that the student is the same model when it is loaded with its config."""
    sizes = [{key: tuple(value.shape) for key, value in part.state_dict().items()} for part in (teachers, students)]
    for key, ours, theirs in _differences(*sizes):
        raise ValueError(
            f"`share={share!r}`: `{name}.{key}` is {ours} in the teacher and {theirs} in the student. Keep the widths "
            "of the teacher (`hidden_size`, ...), or share less."
        )
    for key, module in teachers.named_modules():
        for setting, ours, theirs in _differences(_settings(module), _settings(students.get_submodule(key))):
            raise ValueError(
                f"`share={share!r}`: `{f'{name}.{key}'.rstrip('.')}` has `{setting}={ours!r}` in the teacher and "
                f"{theirs!r} in the student. Make the student with `create_student`, or share less."
            )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Go through the keys whose values differ, with both values."""
    for key in sorted({*first, *second}):
        values = first.get(key, "absent"), second.get(key, "absent")
        if values[0] != values[1]:
            yield key, *values


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the class and the plain attributes of a module, without its dropout, which may differ."""
    if isinstance(module, nn.Dropout):
        return {}
    plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))}
    ignored = ("_", "training", "gradient_checkpointing")
    settings = {key: value for key, value in plain.items() if "drop" not in key and not key.startswith(ignored)}
    return {"class": type(module).__name__, **settings}


class SharedRun:
    """Runs the layers that two models share once for both, on the same batch and with the same dropout.

    With gradient checkpointing, which calls the layers again in the backward pass, both models run them.

    Args:
        layers: The layers, lowest first.
        own: Parameters of the second model that the first one does not have, by name.
    """

    def __init__(self, layers: Sequence[nn.Module], own: Mapping[str, nn.Parameter]) -> None:
        self.layers = list(layers)
        self._own = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        self._checked = False

    def run(self, models: Mapping[str, nn.Module], run: Callable[[str], Any]) -> dict[str, Any]:
        """Run both models on one batch: `run` takes a name, and the first of the models runs the layers.

        Raises:
            ValueError: The layers give other outputs when the second model runs alone.
        """
        first, second = models
        if not self._checked and torch.is_grad_enabled():
            self._check(models, run)
            self._checked = True
        modules = (module for layer in self.layers for module in layer.modules())
        if any(getattr(module, "gradient_checkpointing", False) for module in modules):
            return {name: run(name) for name in models}
        kept: dict[nn.Module, list[Any]] = {layer: [] for layer in self.layers}
        with ExitStack() as afterwards:
            for layer in self.layers:
                afterwards.callback(_put_back, layer, vars(layer).get("forward"))
                layer.forward = partial(_remember, kept[layer], layer.forward)
            outputs = {first: run(first)}
            for layer in self.layers:
                layer.forward = partial(_recall, iter(kept[layer]))
            return outputs | {second: run(second)}

    def _check(self, models: Mapping[str, nn.Module], run: Callable[[str], Any]) -> None:
        """Check that the shared layers give both models the same, and depend on shared parameters only."""
        first, second = (_output_of(self.layers[-1], model, partial(run, name)) for name, model in models.items())
        family = type(list(models.values())[1]).__name__
        error, size = (first - second).abs().max(), first.abs().max()
        if error > 1e-3 * size:
            raise ValueError(
                f"The shared layers of a {family} give other values with the student's config: they differ by up to "
                f"{error:.3g}, and the largest is {size:.3g}. A setting outside of the layers differs, e.g. of the "
                "positions. Make the student with `create_student`, or share only its embeddings."
            )
        if not self._own or not second.requires_grad:  # the layers and the embeddings may be frozen
            return
        gradients = torch.autograd.grad(second.sum(), list(self._own.values()), allow_unused=True)
        used = [name for name, gradient in zip(self._own, gradients, strict=True) if gradient is not None]
        if used:
            raise ValueError(
                f"The shared layers of a {family} depend on {used[:3]} ({len(used)} in all), which the student does "
                "not share. Share only its embeddings."
            )


def _output_of(layer: nn.Module, model: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run a model without dropout; return the last output of one of its layers in fp32."""
    outputs: list[Any] = []
    hook = layer.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    with in_evaluation_mode([model]), hook:
        run()
    return (outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1][0]).float()


def _put_back(layer: nn.Module, forward: Callable | None) -> None:
    """Undo a change of `forward`; accelerate's hooks may have replaced it before."""
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _remember(kept: list[Any], forward: Callable, *args: Any, **kwargs: Any) -> Any:
    kept.append(forward(*args, **kwargs))
    return kept[-1]


def _recall(kept: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    return next(kept)
