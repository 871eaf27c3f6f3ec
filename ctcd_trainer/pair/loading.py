"""Loading a model by name or path, with the same head as the model that it is paired with."""

import os

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..checks.models import untrained
from ..model_structure import base_model
from ..tasks import TASKS, find_task
from ..tasks.labels import own_labels


def load_model(
    name_or_path: str | os.PathLike, argument: str, like: PreTrainedModel | None = None, frozen: bool = False
) -> PreTrainedModel:
    """Load a model by name or path, as `from_pretrained` takes them.

    Args:
        name_or_path: A folder or the name of a repository on the Hub.
        argument: Name of the argument that gave it, for the message.
        like: The model that it will be paired with. The loaded model gets the same head, and the same labels if the
            checkpoint has none. Without it, the head is the one that the checkpoint was saved with.
        frozen: Whether the model will not be trained, so that the checkpoint must contain its head.

    Raises:
        ValueError: There is no such model, the checkpoint has no supported head and `like` is missing, or it lacks
            weights of a frozen model.
    """
    config = _config_of(os.fspath(name_or_path), argument)
    if like is not None:
        try:
            auto_model = find_task(like).auto_model
        except ValueError:  # a head that only the user's `soft_loss_func` knows
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
        raise ValueError(untrained(f"`{argument}={str(name_or_path)!r}`", argument, report["missing_keys"]))
    return model


def _config_of(name: str, argument: str) -> PreTrainedConfig:
    """Load the config of a model, or raise `ValueError` if there is no such model."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if not os.path.isdir(name):
            problem = f"There is no such folder in {os.getcwd()!r}, and no such model on the Hub could be reached"
        elif os.path.isfile(os.path.join(name, "adapter_config.json")):
            problem = "The folder holds an adapter. Load it with `AutoPeftModelFor...` and pass the model"
        elif not os.path.isfile(os.path.join(name, CONFIG_NAME)):
            problem = f"The folder has no {CONFIG_NAME}, only {os.listdir(name)[:5]}. Give the folder of a model"
        else:
            raise
        raise ValueError(f"`{argument}={name!r}`: {problem}. ({error})") from error
