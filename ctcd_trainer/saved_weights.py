"""What the weights in a folder are, read from the headers of its safetensors files alone."""

from pathlib import Path

from safetensors import safe_open
from torch import nn

#: Differences that a message lists.
_SHOWN = 3


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a folder that `save_pretrained` wrote, in one file or in several."""
    shapes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def check_weights(model: nn.Module, folder: Path, learner: str) -> None:
    """The weights in a folder must be those of a model of the same architecture and sizes.

    `load_state_dict` alone would leave out layers of a deeper model, and leave those of a shallower one as they are.

    Args:
        model: The model.
        folder: Folder of a checkpoint.
        learner: Name of the model in the pair, for the message.

    Raises:
        ValueError: They are not; names the parameters with both shapes.
    """
    there = saved_shapes(folder)
    if not there:  # not safetensors: Trainer knows what to do
        return
    here = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in here.items()}
    # Tied parameters are saved once, under any of their names.
    saved = {here[name].data_ptr() for name in there if name in here}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    needed = {name for name in here if name in there or here[name].data_ptr() not in saved} - left_out
    different = [name for name in [*there, *sorted(needed - there.keys())] if there.get(name) != shapes.get(name)]
    if different:
        listed = "; ".join(
            f"`{name}` is {there.get(name, 'not there')} there, {shapes.get(name, 'not there')} here"
            for name in different[:_SHOWN]
        )
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ValueError(
            f"The checkpoint {str(folder)!r} is of another {learner}: {listed}{more}. Resume with the pair that wrote "
            "it (the same models, sizes and `num_hidden_layers` of the student), or start anew in another "
            "`output_dir`."
        )
