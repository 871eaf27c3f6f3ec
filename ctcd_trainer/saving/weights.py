"""Check that a checkpoint fits a model, from the safetensors headers where possible."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

#: Number of differences that a message lists.
_SHOWN = 3


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor in a folder of `save_pretrained`, by name, from one file or several."""
    shapes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def converted_weights(model: nn.Module, folder: Path, learner: str) -> dict[str, Tensor] | None:
    """Check that the weights in a folder fit a model, and convert them if `load_state_dict` cannot read them.

    `load_state_dict(strict=False)` alone ignores layers that only the folder or only the model has, and the weights of
    families whose saved names and shapes differ from those in memory (Mixtral, for example).

    Args:
        model: The model.
        folder: Folder of the model in a checkpoint.
        learner: Name of the model in the pair, for the message.

    Returns:
        The weights by their names in memory, without those that are never saved; `None` if the files already have
        these names and shapes.

    Raises:
        ValueError: The weights have another architecture or other sizes. The message lists parameters and shapes.
    """
    saved = saved_shapes(folder)
    state = model.state_dict()
    # Trainer reads files in other formats than safetensors.
    if not saved or not _differences(model, state, saved):
        return None
    weights = None
    if isinstance(model, PreTrainedModel) and (folder / CONFIG_NAME).exists():
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        weights = {name: value for name, value in loaded.state_dict().items() if name not in info["missing_keys"]}
        saved = _shapes(weights)
    different = _differences(model, state, saved)
    if not different:
        return weights
    listed = "; ".join(
        f"`{name}` is {saved.get(name, 'absent')} in the checkpoint and {_shapes(state).get(name, 'absent')} here"
        for name in different[:_SHOWN]
    )
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise ValueError(
        f"The checkpoint {str(folder)!r} has another {learner}: {listed}{more}. Resume with the pair that wrote it "
        "(the same models, sizes and numbers of layers), or start a new training in another `output_dir`."
    )


def check_written_with_fsdp(checkpoint: str) -> None:
    """Refuse to resume with FSDP from a checkpoint that was written without it.

    Raises:
        ValueError: The checkpoint was written without FSDP.
    """
    if not [*Path(checkpoint).glob("pytorch_model_fsdp*")]:
        raise ValueError(
            f"The checkpoint {checkpoint!r} was written without FSDP, and this training uses FSDP, which keeps the "
            "state of the optimizer in another form. Resume without FSDP, or start a new training from the models in "
            "the checkpoint."
        )


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _differences(model: nn.Module, state: dict[str, Tensor], saved: dict[str, tuple[int, ...]]) -> list[str]:
    """List the parameters whose shapes differ between a model and a folder."""
    shapes = _shapes(state)
    # Tied parameters are saved once, under one of their names.
    addresses = {state[name].data_ptr() for name in saved if name in state}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    needed = {name for name in state if name in saved or state[name].data_ptr() not in addresses} - left_out
    return [name for name in [*saved, *sorted(needed - saved.keys())] if saved.get(name) != shapes.get(name)]
