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
    """Check that the weights in a folder are those of a model, and convert them if `load_state_dict` needs that.

    `load_state_dict(strict=False)` alone would ignore layers that only the folder has, and would not change layers
    that only the model has. It would also ignore the weights of families that save other names and shapes than the
    model has in memory (Mixtral, for example).

    Args:
        model: The model.
        folder: Folder of the model in a checkpoint.
        learner: Name of the model in the pair, for the message.

    Returns:
        The weights by their names in memory, without those that are never saved; `None` if the files have these names
        and shapes already.

    Raises:
        ValueError: The weights are of another architecture or of other sizes. The message lists parameters with both
            shapes.
    """
    there = saved_shapes(folder)
    here = model.state_dict()
    # Trainer reads files that are no safetensors.
    if not there or not _differences(model, here, there):
        return None
    weights = None
    if isinstance(model, PreTrainedModel) and (folder / CONFIG_NAME).exists():
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        weights = {name: value for name, value in loaded.state_dict().items() if name not in info["missing_keys"]}
        there = _shapes(weights)
    different = _differences(model, here, there)
    if not different:
        return weights
    listed = "; ".join(
        f"`{name}` is {there.get(name, 'absent')} in the checkpoint and {_shapes(here).get(name, 'absent')} here"
        for name in different[:_SHOWN]
    )
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise ValueError(
        f"The checkpoint {str(folder)!r} is of another {learner}: {listed}{more}. Resume with the pair that wrote it "
        "(the same models, sizes and numbers of layers), or start a new training in another `output_dir`."
    )


def check_written_with_fsdp(checkpoint: str) -> None:
    """Refuse to resume with FSDP from a checkpoint that was written without it.

    Raises:
        ValueError: The checkpoint was written without FSDP.
    """
    if not [*Path(checkpoint).glob("pytorch_model_fsdp*")]:
        raise ValueError(
            f"The checkpoint {checkpoint!r} was written without FSDP, and this training uses it: FSDP keeps the state "
            "of the optimizer in another form. Resume without FSDP, or start a new training from the models in it."
        )


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _differences(model: nn.Module, here: dict[str, Tensor], there: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of the parameters that differ between the model and a folder."""
    shapes = _shapes(here)
    # Tied parameters are saved once, under one of their names.
    saved = {here[name].data_ptr() for name in there if name in here}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    needed = {name for name in here if name in there or here[name].data_ptr() not in saved} - left_out
    return [name for name in [*there, *sorted(needed - there.keys())] if there.get(name) != shapes.get(name)]
