"""Parts that the teacher and the student have in common: one set of weights, and one computation of them a step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arguments import parse_share
from ..model_structure import in_evaluation_mode, is_peft_model, layer_stacks, memory_of

#: Modules beside the layers that come before them in some families, although they are registered after them.
_BELOW = ("rel_embeddings", "LayerNorm", "layernorm_embedding")


def share_modules(teacher: PreTrainedModel, student: PreTrainedModel, share: str) -> list[nn.Module]:
    """Put the teacher's embeddings and lowest layers in the place of the student's, whose weights are dropped.

    Args:
        teacher: The teacher.
        student: The student, of the same class, as `create_student(teacher, ..., layers="first")` makes it. It is
            changed.
        share: `"embeddings"` for all that is below the layers, `"layers:K"` for that and the K lowest layers (of an
            encoder-decoder: of its encoder), or `"prefix"` for that and all layers of the student, which is then the
            teacher's lower part with a head of its own.

    Returns:
        The shared layers, which can be run once for both models; none where the embeddings alone are shared.

    Raises:
        ValueError: The models are not of one class or have adapters, what is to be shared has other sizes or settings,
            or they have more in common than that; nothing was shared.
    """
    number = parse_share(share)
    models = {"model": teacher, "student_model": student}
    adapted = [argument for argument, model in models.items() if is_peft_model(model)]
    if adapted:
        raise ValueError(
            f"`share={share!r}` and adapters (`{adapted[0]}` is wrapped by PEFT): one adapter would be in both "
            "models, and an adapter is saved for the base that it was made for. Put an adapter for each model on one "
            "frozen base (`create_student(..., init='shared')`), or leave `share` out."
        )
    if type(teacher) is not type(student):
        raise ValueError(
            f"`share={share!r}`: the teacher is a {type(teacher).__name__} and the student a "
            f"{type(student).__name__}. Only models of one class share parts: make the student with `create_student`."
        )
    stack = next(iter(layer_stacks(teacher)), None)
    names = _below(teacher, stack)
    layers: list[nn.Module] = []
    if number != 0:
        if stack is None:
            raise ValueError(
                f"`share={share!r}`: a {type(teacher).__name__} runs one layer several times. Share its embeddings."
            )
        lower = [model.get_submodule(stack) for model in (teacher, student)]
        number = len(lower[1]) if number is None else number
        if number > min(map(len, lower)):
            raise ValueError(
                f"`share={share!r}`: the teacher has {len(lower[0])} layers and the student {len(lower[1])}. Share at "
                f"most {min(map(len, lower))}."
            )
        kinds = [list(getattr(model.config, "layer_types", None) or [])[:number] for model in (teacher, student)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"`share={share!r}`: the lowest layers of the teacher are {kinds[0]}, and of the student {kinds[1]}. "
                "Make the student with `create_student(..., layers='first')`."
            )
        layers = list(lower[0][:number])
        names += [f"{stack}.{index}" for index in range(number)]
    for name in names:
        _check_same(name, teacher.get_submodule(name), student.get_submodule(name), share)
    _check_no_more(names, teacher, student, share)
    for name in names:
        student.set_submodule(name, teacher.get_submodule(name))
    student.tie_weights()  # an output layer that is tied to the embeddings
    return layers


def _below(model: PreTrainedModel, stack: str | None) -> list[str]:
    """Names of the modules that come before the layers: those that are registered before them, with few exceptions."""
    if stack is None:
        return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "embeddings"]
    names: list[str] = []
    path = stack.split(".")
    for depth, child in enumerate(path):
        parent = ".".join(path[:depth])
        children = [name for name, _ in model.get_submodule(parent).named_children()]
        own = children[: children.index(child)]
        if depth == len(path) - 1:
            own += [name for name in children if name in _BELOW]
        names += [f"{parent}.{name}".removeprefix(".") for name in own]
    return names


def _check_same(name: str, teachers: nn.Module, students: nn.Module, share: str) -> None:
    """Two modules must be alike: the student is saved with its own config, and has to be the same when it is loaded.

    Raises:
        ValueError: A parameter is of another size, or a setting (the number of heads, the activation) is another one.
    """
    sizes = [{key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (teachers, students)]
    for key in sorted({*sizes[0], *sizes[1]}):
        own, other = (each.get(key, "not there") for each in sizes)
        if own != other:
            raise ValueError(
                f"`share={share!r}`: `{name}.{key}` is {own} in the teacher and {other} in the student, so that they "
                "cannot be one. Keep `hidden_size` and the other widths of the teacher, or share less."
            )
    for key, module in teachers.named_modules():
        settings = [_settings(each) for each in (module, students.get_submodule(key))]
        for setting in sorted({*settings[0], *settings[1]}):
            own, other = (each.get(setting, "not there") for each in settings)
            if own != other:
                raise ValueError(
                    f"`share={share!r}`: `{f'{name}.{key}'.rstrip('.')}` has `{setting}={own!r}` in the teacher and "
                    f"{other!r} in the student, which would be another model when it is loaded with its own config. "
                    "Make the student with `create_student`, or share less."
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module computes besides its parameters; not its dropout, which may differ as in any training."""
    if isinstance(module, nn.Dropout):
        return {}
    plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))}
    unlike = ("_", "training", "gradient_checkpointing")
    own = {key: value for key, value in plain.items() if "drop" not in key and not key.startswith(unlike)}
    return {"class": type(module).__name__, **own}


def _check_no_more(names: Sequence[str], teacher: PreTrainedModel, student: PreTrainedModel, share: str) -> None:
    """The models may have nothing in common but what they are to share.

    Raises:
        ValueError: They have, e.g. all of their layers (`create_student(..., init="shared")`).
    """
    both = {memory_of(parameter) for parameter in teacher.parameters()}
    asked = {memory_of(parameter) for name in names for parameter in teacher.get_submodule(name).parameters()}
    for name, parameter in student.named_parameters():
        if memory_of(parameter) in both - asked:
            raise ValueError(
                f"`share={share!r}` does not include `{name}`, and `model` and `student_model` have it in common: "
                "each step would update it for both. Make the student with `create_student(..., init='copy')`."
            )


class SharedRun:
    """Runs layers that two models share once for both, when both are run on the same batch.

    The second model takes what the first one has computed, its dropout included. With gradient checkpointing they run
    twice, since they are called again to be computed again.

    Args:
        layers: The layers, lowest first.
        own: Parameters of the second model that the first one does not have, by name.
    """

    def __init__(self, layers: Sequence[nn.Module], own: Mapping[str, nn.Parameter]) -> None:
        self.layers = list(layers)
        self._own = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        self._checked = False

    def run(self, models: Mapping[str, nn.Module], run: Callable[[str], Any]) -> dict[str, Any]:
        """The outputs of both models on one batch.

        Args:
            models: The models by name, the one that runs the layers first.
            run: Runs a model by its name.

        Raises:
            ValueError: The layers would give the second model something else if it were run alone.
        """
        first, second = models
        if not self._checked and torch.is_grad_enabled():
            self._check(models, run)
            self._checked = True
        if any(getattr(module, "gradient_checkpointing", False) for each in self.layers for module in each.modules()):
            return {name: run(name) for name in models}
        given: dict[nn.Module, list[Any]] = {layer: [] for layer in self.layers}
        with ExitStack() as afterwards:
            for layer in self.layers:
                afterwards.callback(_put_back, layer, vars(layer).get("forward"))
                layer.forward = partial(_remember, given[layer], layer.forward)
            outputs = {first: run(first)}
            for layer in self.layers:
                layer.forward = partial(_recall, iter(given[layer]))
            return outputs | {second: run(second)}

    def _check(self, models: Mapping[str, nn.Module], run: Callable[[str], Any]) -> None:
        """Whatever reaches the end of the shared layers must be the same for both, and of shared parameters alone."""
        given = [_given_by(self.layers[-1], model, partial(run, name)) for name, model in models.items()]
        student = list(models.values())[1]
        family = type(student).__name__
        error, size = (given[0] - given[1]).abs().max(), given[0].abs().max()
        if error > 1e-3 * size:
            raise ValueError(
                f"The shared layers of a {family} give up to {size:.3g} when the teacher runs them, and with the "
                f"student's config something else by up to {error:.3g}: a setting that is used outside of the layers "
                "(of the positions, or of the attention mask) is another one. Make the student with `create_student`, "
                "or share its embeddings alone."
            )
        if not self._own or not given[1].requires_grad:  # all that is below may be frozen
            return
        gradients = torch.autograd.grad(given[1].sum(), list(self._own.values()), allow_unused=True)
        found = [name for name, gradient in zip(self._own, gradients, strict=True) if gradient is not None]
        if found:
            raise ValueError(
                f"The shared layers of a {family} depend on {found[:3]} ({len(found)} in all), which the student has "
                "for itself. Layers of this family cannot be shared; share its embeddings alone."
            )


def _given_by(layer: nn.Module, model: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a layer gives last when a model is run alone, without dropout; fp32."""
    given: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _arguments, output: given.append(_first(output)))
    try:
        with in_evaluation_mode([model]):
            run()
    finally:
        hook.remove()
    return given[-1].float()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _put_back(layer: nn.Module, forward: Callable | None) -> None:
    """Undo a change of `forward`, which others (accelerate's hooks) may have changed before."""
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _remember(given: list[Any], forward: Callable, *args: Any, **kwargs: Any) -> Any:
    given.append(forward(*args, **kwargs))
    return given[-1]


def _recall(given: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    return next(given)
