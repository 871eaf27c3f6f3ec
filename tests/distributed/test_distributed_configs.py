"""The settings for `accelerate launch` in `examples/accelerate` mean what they say."""

import os

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from places import EXAMPLES
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

FOLDER = EXAMPLES / "accelerate"


def launched(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which `accelerate launch` starts the script; it is set for the test."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # as `accelerate launch` without one of its own
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if value is not None and os.environ.get(key) != value:
            monkeypatch.setenv(key, value)
    return environment


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", DistributedType.MULTI_GPU), ("fsdp", DistributedType.FSDP), ("zero3", DistributedType.DEEPSPEED)],
)
def test_each_file_is_a_configuration_of_accelerate(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"
    assert config.num_processes > 1


def test_fsdp_shards_the_layers_of_both_models_and_saves_whole_ones(monkeypatch):
    assert launched("fsdp.yaml", monkeypatch)["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # found when the pair is wrapped
    assert not plugin.cpu_ram_efficient_loading


def test_zero3_shards_all_as_it_is_loaded_and_saves_whole_models(monkeypatch):
    environment = launched("zero3.yaml", monkeypatch)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "auto"


def test_ddp_starts_a_process_for_each_device(monkeypatch):
    environment = launched("ddp.yaml", monkeypatch)
    assert environment.get("ACCELERATE_USE_FSDP", "false") == environment.get("ACCELERATE_USE_DEEPSPEED", "false")
