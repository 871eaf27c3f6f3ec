"""Checks of the feature losses against the other arguments of a training."""

from accelerate import Accelerator
from torch.optim import Optimizer
from transformers import TrainingArguments

from ..arguments import DistillationArguments


def check_features(arguments: DistillationArguments, args: TrainingArguments | None, two_tokenizers: bool) -> None:
    """Refuse feature losses that nothing would train, or that compare different positions.

    Args:
        arguments: The distillation arguments.
        args: The trainer's arguments, `None` for the defaults.
        two_tokenizers: Whether the models have different inputs.

    Raises:
        ValueError: They are refused.
    """
    for edge in arguments.graph.features:
        weight = f"`{edge.weight_name}={edge.weight}`"
        if two_tokenizers:
            raise ValueError(
                f"{weight} and `{edge.learner}_processing_class` are both given: with two tokenizers, the positions "
                f"of the models are not the same. Set the weight to 0, or choose a {edge.learner} of the teacher's "
                "tokenizer."
            )
        if getattr(args, "gradient_checkpointing", False) and (args.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise ValueError(
                f"{weight} and `gradient_checkpointing_kwargs={args.gradient_checkpointing_kwargs}`: reentrant "
                "checkpointing runs the layers without gradients, so that the feature loss would train nothing. Set "
                "`use_reentrant` to False."
            )


def check_features_strategy(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Refuse a feature loss where models are divided among processes; raises `ValueError`."""
    for edge in args.graph.features if isinstance(args, DistillationArguments) else ():
        plugins = {"FSDP": "fsdp_plugin", "DeepSpeed": "deepspeed_plugin"}
        for name, plugin in plugins.items():
            if getattr(accelerator.state, plugin, None) is not None:
                raise ValueError(
                    f"`{edge.weight_name}={edge.weight}` and {name}: layers are read and projected outside of the "
                    f"forward in which {name} has their parameters. Set the weight to 0, or train with DDP."
                )


def check_projections(learner: str, projections: list, optimizer: Optimizer) -> None:
    """Refuse an optimizer that lacks the projections of a feature loss, which would never be trained.

    Raises:
        ValueError: It lacks one.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for parameter in projections):
        raise ValueError(
            f"The optimizer does not have the {len(projections)} parameters of the projections that `feature_loss="
            f"'hidden'` needs where widths differ. Pass `optimizer_cls_and_kwargs` in place of `optimizers`, take all "
            f"parameters of the {learner} in `create_optimizer` (`feature_projections` are among them), or set "
            "`feature_loss='relations'`."
        )
