"""Whose weights are in a folder; read from the headers of its safetensors files alone, where that is enough."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

#: Differences that a message lists.
_SHOWN = 3


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a folder that `save_pretrained` wrote, in one file or in several."""
    shapes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def converted_weights(model: nn.Module, folder: Path, learner: str) -> dict[str, Tensor] | None:
    """The weights in a folder, if `load_state_dict` alone cannot load them; they must be those of such a model.

    `load_state_dict` would leave out layers of a deeper model, and leave those of a shallower one as they are. Some
    families (Mixtral, say) are saved under other names and in other shapes than they have in memory, which
    `load_state_dict` would leave out as well.

    Args:
        model: The model.
        folder: Folder of a checkpoint.
        learner: Name of the model in the pair, for the message.

    Returns:
        The weights as the model has them in memory, but for those that are never saved; `None` if the files have them
        so.

    Raises:
        ValueError: They are of a model of another architecture or of other sizes; names the parameters with both
            shapes.
    """
    there = saved_shapes(folder)
    here = model.state_dict()
    # Files that are not safetensors are left to Trainer.
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
        f"`{name}` is {there.get(name, 'not there')} there, {_shapes(here).get(name, 'not there')} here"
        for name in different[:_SHOWN]
    )
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise ValueError(
        f"The checkpoint {str(folder)!r} is of another {learner}: {listed}{more}. Resume with the pair that wrote it "
        "(the same models, sizes and `num_hidden_layers` of the student), or start anew in another `output_dir`."
    )


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _differences(model: nn.Module, here: dict[str, Tensor], there: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of the parameters that are not the same in the model and in a folder."""
    shapes = _shapes(here)
    # Tied parameters are saved once, under any of their names.
    saved = {here[name].data_ptr() for name in there if name in here}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    needed = {name for name in here if name in there or here[name].data_ptr() not in saved} - left_out
    return [name for name in [*there, *sorted(needed - there.keys())] if there.get(name) != shapes.get(name)]
