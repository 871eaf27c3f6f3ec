"""Check that a checkpoint fits a model, from the safetensors headers where possible."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME


def saved_shapes(folder: Path, files: str = "model*.safetensors") -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor in a folder of `save_pretrained`, by name, from one file or several."""
    shapes = {}
    for path in sorted(folder.glob(files)):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def converted_weights(model: nn.Module, folder: Path, learner: str) -> dict[str, Tensor] | None:
    """Check that the weights in a folder fit a model, and convert them if `load_state_dict` cannot read them.

    `load_state_dict(strict=False)` alone ignores layers that only the folder or only the model has, and the weights of
    families whose saved names and shapes differ from those in memory (Mixtral, for example).

    Returns:
        The weights by their names in memory, without those that are never saved; `None` if the files already have
        these names and shapes.

    Raises:
        ValueError: The weights have another architecture or other sizes than the learner.
    """
    saved, here = saved_shapes(folder), _shapes(model.state_dict())
    # Trainer reads files in other formats than safetensors.
    if not saved or not _differences(model, saved):
        return None
    weights = None
    if isinstance(model, PreTrainedModel) and (folder / CONFIG_NAME).exists():
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        weights = {name: value for name, value in loaded.state_dict().items() if name not in info["missing_keys"]}
        saved = _shapes(weights)
    different = _differences(model, saved)
    if not different:
        return weights
    listed = "; ".join(
        f"`{name}` is {saved.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} here"
        for name in different[:3]
    )
    more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
    raise ValueError(
        f"The checkpoint {str(folder)!r} has another {learner}: {listed}{more}. Resume with the pair that wrote it "
        "or start a new training in another `output_dir`."
    )


def check_written_with_fsdp(checkpoint: str) -> None:
    """Raise `ValueError` if a training with FSDP would resume from a checkpoint that was written without it."""
    if not any(Path(checkpoint).glob("pytorch_model_fsdp*")):
        raise ValueError(
            f"The checkpoint {checkpoint!r} was written without FSDP, and this training uses FSDP, which keeps the "
            "state of the optimizer in another form. Resume without FSDP, or start a new training from the models in "
            "the checkpoint."
        )


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _differences(model: nn.Module, saved: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of the parameters whose shapes differ between a model and a folder."""
    state = model.state_dict()
    shapes = _shapes(state)
    # Tied parameters are saved once, under one of their names.
    addresses = {state[name].data_ptr() for name in saved if name in state}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    needed = {name for name in state if name in saved or state[name].data_ptr() not in addresses} - left_out
    return [name for name in [*saved, *sorted(needed - saved.keys())] if saved.get(name) != shapes.get(name)]
