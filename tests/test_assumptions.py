"""What we assume of transformers, accelerate, torch, huggingface_hub, safetensors and peft beyond their documentation.

Each test fails with the name of what has changed. The package is imported only where it is compared with the lists
here, so that the other tests run also if a new release breaks its import.
"""

import ast
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer

PACKAGE = Path(__file__).parent.parent / "ctcd_trainer"
LIBRARIES = ("accelerate", "huggingface_hub", "peft", "safetensors", "torch", "transformers")

#: Private methods of Trainer that the package overrides: the parameters that it relies on, in their order, and the
#: methods of Trainer that call them.
OVERRIDDEN = {
    "_clip_grad_norm": (("model",), ("_run_epoch",)),
    "_determine_best_metric": (("metrics", "trial"), ("_maybe_log_save_evaluate",)),
    "_evaluate": (("trial", "ignore_keys_for_eval"), ("_inner_training_loop", "_maybe_log_save_evaluate")),
    "_finalize_training": (("trial", "num_train_samples", "start_time"), ("_inner_training_loop",)),
    "_finish_current_push": ((), ("_finalize_training",)),
    "_get_dataloader": (("dataset", "description"), ("get_train_dataloader", "get_eval_dataloader")),
    "_get_grad_norm": (("model", "grad_norm"), ("_run_epoch",)),
    "_get_num_items_in_batch": (("batch_samples", "device"), ("get_batch_samples",)),
    "_get_output_dir": (("trial",), ("_save_checkpoint", "_finalize_training")),
    "_hp_search_setup": (("trial",), ("train",)),
    "_inner_training_loop": (
        ("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        ("train",),
    ),
    "_load_best_model": ((), ("_finalize_training",)),
    "_load_from_checkpoint": (("resume_from_checkpoint", "model"), ("train", "_prepare_for_training")),
    "_load_optimizer_and_scheduler": (("checkpoint",), ("_prepare_for_training",)),
    "_prepare_for_training": (("max_steps", "train_dataloader", "resume_from_checkpoint"), ("_inner_training_loop",)),
    "_push_from_checkpoint": (("checkpoint_folder",), ("_save_checkpoint",)),
    "_run_epoch": (("model", "epoch"), ("_inner_training_loop",)),
    "_save": (("output_dir", "state_dict"), ("save_model",)),
    "_save_checkpoint": (("model", "trial"), ("_maybe_log_save_evaluate",)),
    "_set_signature_columns_if_needed": ((), ("_remove_unused_columns", "_get_collator_with_removed_columns")),
}
#: Other private names of Trainer that the package reads, sets or calls, and the methods of Trainer that use them.
USED = {
    "_eval_dataloaders": ("get_eval_dataloader", "_get_dataloader"),
    "_loss_shifts_labels": ("__init__",),
    "_move_model_to_device": ("train",),
    "_prepare_inputs": ("training_step", "prediction_step"),
    "_signature_columns": ("_set_signature_columns_if_needed", "_remove_unused_columns"),
    "_tr_loss": ("_run_epoch", "_finalize_training"),
    "_train_batch_size": ("train", "_update_auto_batch_size"),
}
#: Private names of other objects that the package uses, and the modules or classes that declare them.
FOREIGN = {
    "_attn_implementation": "transformers.PreTrainedConfig",
    "_cdata": "torch.UntypedStorage",
    "_experts_implementation": "transformers.PreTrainedConfig",
    "_get_feature_vector_attention_mask": "transformers.Wav2Vec2PreTrainedModel",
    "_hf_peft_config_loaded": "transformers.PreTrainedModel",
    "_is_hf_initialized": "transformers.core_model_loading",
    "_keys_to_ignore_on_save": "transformers.PreTrainedModel",
    "_name_or_path": "transformers.PreTrainedConfig",
    "_no_split_modules": "transformers.PreTrainedModel",
    "_parameters": "torch.nn.Module",
    "_replace": "transformers.trainer_utils.EvalLoopOutput",
}
#: Public methods of Trainer that the package overrides or calls, and whose place in the training it relies on.
CALLED = {
    "call_model_init": ("train",),
    "compute_loss": ("training_step", "prediction_step"),
    "create_optimizer": ("create_optimizer_and_scheduler",),
    "create_scheduler": ("create_optimizer_and_scheduler",),
    "evaluation_loop": ("evaluate", "predict"),
    "log": ("_finalize_training", "_maybe_log_save_evaluate", "evaluate"),
    "prediction_step": ("evaluation_loop",),
    "save_model": ("_save_checkpoint", "push_to_hub"),
    "training_step": ("_run_epoch",),
}
#: Undocumented public attributes of Trainer that the package reads or sets, and the methods of Trainer that use them.
ATTRIBUTES = {
    "callback_handler": ("_inner_training_loop",),
    "compute_loss_func": ("compute_loss",),
    "control": ("_run_epoch",),
    "current_flos": ("store_flos",),
    "current_gradient_accumulation_steps": ("_run_epoch", "training_step"),
    "gather_function": ("evaluation_loop",),
    "hp_search_backend": ("_hp_search_setup",),
    "is_deepspeed_enabled": ("save_model", "_load_best_model"),
    "is_fsdp_enabled": ("save_model", "_load_best_model"),
    "is_in_train": ("train", "evaluation_loop"),
    "label_names": ("prediction_step",),
    "label_smoother": ("compute_loss",),
    "model_accepts_loss_kwargs": ("_get_num_items_in_batch", "training_step"),
    "model_wrapped": ("_prepare_for_training",),
    "neftune_noise_alpha": ("train", "_finalize_training"),
    "place_model_on_device": ("train",),
    "push_in_progress": ("_push_from_checkpoint",),
}


def source(method: str) -> str:
    return inspect.getsource(getattr(Trainer, method))


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def trees() -> Iterator[ast.Module]:
    for path in PACKAGE.rglob("*.py"):
        yield ast.parse(path.read_text(encoding="utf-8"))


def private_names_in_package() -> set[str]:
    """Private attributes that the package uses and does not define; texts count if they are given to `getattr`."""
    used, defined = set(), set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr"):
            used |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    of_base = {*re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(Trainer)), *vars(Trainer), *vars(PreTrainedModel)}
    private = {name for name in used | defined if re.fullmatch(r"_[A-Za-z]\w*", str(name))}
    return {name for name in private if name in of_base or name not in defined}


# ---- The lists are those of the package ----


def overridden_in_package() -> set[str]:
    import ctcd_trainer

    classes = ctcd_trainer.CoDistillationSeq2SeqTrainer.__mro__
    ours = [vars(each) for each in classes if each.__module__.startswith("ctcd_trainer")]
    names = {name for each in ours for name, value in each.items() if callable(value)}
    return {name for name in names if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}


def test_the_list_of_overridden_private_methods_is_that_of_the_package():
    assert overridden_in_package() == set(OVERRIDDEN)


def test_the_lists_of_other_private_names_are_those_of_the_package():
    assert private_names_in_package() - set(OVERRIDDEN) == {*USED, *FOREIGN}


def test_every_override_takes_what_trainer_passes():
    import ctcd_trainer

    for name, method in inspect.getmembers(Trainer, inspect.isfunction):
        ours = getattr(ctcd_trainer.CoDistillationTrainer, name)
        if ours is method or name == "__init__":
            continue
        taken = inspect.signature(ours).parameters
        if not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & {p.kind for p in taken.values()}:
            assert set(inspect.signature(method).parameters) <= set(taken), name


# ---- Trainer ----


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_has_the_private_method_that_we_override(name):
    assert hasattr(Trainer, name)
    expected = OVERRIDDEN[name][0]
    assert tuple(parameters(getattr(Trainer, name))[: len(expected)]) == expected


@pytest.mark.parametrize(
    ("name", "caller"),
    [(name, caller) for name, (_, callers) in OVERRIDDEN.items() for caller in callers]
    + [(name, caller) for name, callers in CALLED.items() for caller in callers],
)
def test_trainer_calls_the_method_where_we_think(name, caller):
    assert re.search(rf"self\.{name}\b", source(caller))


@pytest.mark.parametrize(
    ("name", "user"), [(name, user) for name, users in (USED | ATTRIBUTES).items() for user in users]
)
def test_trainer_uses_the_attribute_where_we_think(name, user):
    assert re.search(rf"self\.{name}\b", source(user))


def order_in(method: str, *texts: str) -> None:
    """The texts are in the source of a method of Trainer, in this order."""
    places = [source(method).find(text) for text in texts]
    assert -1 not in places, texts[places.index(-1)]
    assert places == sorted(places)


def test_a_checkpoint_is_written_in_the_order_that_we_rely_on():
    order_in(
        "_save_checkpoint",
        "self._get_output_dir(",
        "self.save_model(output_dir, _internal_call=True)",
        "self.state.best_model_checkpoint = ",
        "self.state.save_to_json(",
        "self._push_from_checkpoint(",
        "rotate_checkpoints(",
    )


def test_a_training_ends_in_the_order_that_we_rely_on():
    """`_finalize_training` adds `_tr_loss` first, and deletes checkpoints after the best one is loaded."""
    order_in(
        "_finalize_training",
        "self._tr_loss.item()",
        "self.log(",
        "self._load_best_model()",
        "shutil.rmtree(",
        "self.callback_handler.on_train_end(",
        "self._finish_current_push()",
    )
    assert "_finalize_training(trial," in source("_inner_training_loop")


def test_train_prepares_in_the_order_that_we_rely_on():
    """`call_model_init` makes the pair before the special tokens, NEFTune and the checkpoint are seen to."""
    order_in(
        "train",
        "self.call_model_init(trial)",
        "align_special_tokens(self.model",
        "activate_neftune(self.model",
        "self._hp_search_setup(trial)",
        "self._load_from_checkpoint(resume_from_checkpoint)",
        "self._inner_training_loop",
    )


def test_the_loop_stops_after_an_epoch_that_says_so():
    end_of_epoch = source("_inner_training_loop").split("self._run_epoch(")[1]
    assert re.search(r"if self\.control\.should_training_stop:\s+break", end_of_epoch)


def test_the_step_clips_before_it_asks_for_the_norm_and_steps():
    order_in(
        "_run_epoch",
        "self.training_step(",
        "self.args.max_grad_norm > 0",
        "self._clip_grad_norm(model)",
        "self._get_grad_norm(model, grad_norm=grad_norm)",
        "self.optimizer.step()",
        "self._maybe_log_save_evaluate(",
    )


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.19"), reason="older releases do not have it")
def test_loss_is_scaled_for_ga_keeps_trainer_from_dividing_the_loss():
    assert "self.loss_is_scaled_for_ga" in inspect.getsource(Trainer)


def test_the_mark_of_an_incomplete_checkpoint_has_the_name_that_we_know():
    module = importlib.import_module("transformers.trainer_jit_checkpoint")
    assert '"checkpoint-is-incomplete.txt"' in inspect.getsource(module)


def test_seq2seq_trainer_overrides_what_we_think():
    own = {name for name in vars(Seq2SeqTrainer) if not name.startswith("__")}
    assert own & {*OVERRIDDEN, *CALLED} == {"prediction_step"}


# ---- Names that are imported ----


def imports() -> list[tuple[str, str]]:
    """Names that the package imports from modules inside of the libraries."""
    found = set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in LIBRARIES:
            found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imports())
def test_the_name_can_be_imported(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("transformers.trainer_utils.sort_checkpoints", {"output_dir", "use_mtime"}),
        ("transformers.trainer_utils.align_special_tokens", {"model", "processing_class"}),
        ("transformers.integrations.neftune.activate_neftune", {"model", "neftune_noise_alpha"}),
        ("transformers.integrations.neftune.deactivate_neftune", {"model", "hook_handle"}),
        ("accelerate.utils.fsdp2_prepare_model", {"accelerator", "model"}),
    ],
)
def test_the_function_has_the_parameters_that_we_pass(function, expected):
    assert expected <= set(parameters(pkgutil.resolve_name(function)))


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_the_private_name_is_declared_where_we_think(name):
    owner = pkgutil.resolve_name(FOREIGN[name])
    assert hasattr(owner, name) or name in inspect.getsource(owner)


# ---- Models, torch, safetensors, accelerate ----


def test_trainer_refuses_quantised_models_by_the_attribute_that_we_hide():
    module = importlib.import_module("transformers.trainer_utils")
    sources = inspect.getsource(Trainer) + inspect.getsource(module)
    assert "is_quantized" in sources
    assert "is_quantized" in inspect.getsource(PreTrainedModel)


def test_a_module_holds_its_parameters_by_name():
    layer = nn.Linear(2, 3)
    assert set(layer._parameters) == {"weight", "bias"}
    assert layer._parameters["weight"] is layer.weight


def test_a_storage_keeps_its_address():
    tensor = torch.zeros(4)
    assert tensor.untyped_storage()._cdata == tensor[1:].untyped_storage()._cdata
    assert tensor.untyped_storage()._cdata != torch.zeros(4).untyped_storage()._cdata


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_torch_says_that_it_cannot_write_in_words_that_we_know():
    from ctcd_trainer.saving.checkpoints import _TORCH_CANNOT_WRITE

    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(100_000), "/dev/full")
    assert type(raised.value) is RuntimeError
    assert any(text in str(raised.value) for text in _TORCH_CANNOT_WRITE)
    assert not any(text in "CUDA out of memory. Tried to allocate 2.00 GiB" for text in _TORCH_CANNOT_WRITE)


def test_safetensors_says_that_it_cannot_write_in_words_that_we_know(tmp_path):
    with pytest.raises(SafetensorError, match="I/O error"):
        save_file({"weight": torch.zeros(2)}, tmp_path / "absent" / "model.safetensors")


def test_accelerate_retries_a_smaller_batch_after_the_error_that_we_let_through():
    assert should_reduce_batch_size(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))


def test_accelerate_names_the_files_of_sharded_states_as_we_do():
    constants = importlib.import_module("accelerate.utils.constants")
    assert (constants.FSDP_MODEL_NAME, constants.OPTIMIZER_NAME) == ("pytorch_model_fsdp", "optimizer")


@pytest.mark.parametrize(
    "name", ["gather", "get_state_dict", "is_fsdp2", "state", "unscale_gradients", "wait_for_everyone"]
)
def test_the_accelerator_has_what_we_use(name):
    assert hasattr(Accelerator, name) or f"self.{name}" in inspect.getsource(Accelerator)


# ---- PEFT ----


def test_peft_models_have_what_we_use():
    peft = pytest.importorskip("peft")
    for name in ("active_adapters", "active_peft_config", "get_base_model"):
        assert hasattr(peft.PeftModel, name), name
    assert {"base_model_name_or_path", "revision"} <= {field.name for field in fields(peft.PeftConfig)}
    assert {"state_dict", "save_embedding_layers"} <= set(parameters(peft.get_peft_model_state_dict))
    assert parameters(peft.PeftModel.load_adapter)[:3] == ["model_id", "adapter_name", "is_trainable"]
    assert "self.rankallocator" in inspect.getsource(peft.AdaLoraModel)
    assert "self.prompt_encoder" in inspect.getsource(peft.PeftModel)
