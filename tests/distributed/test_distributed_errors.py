"""What goes wrong in one process ends all of them, soon, and says what it was."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from places import PROGRAMS
from tiny import tiny_args, tiny_trainer
from tiny_models import tiny_model

from ctcd_trainer.checks.arguments import check_arguments, check_strategy
from ctcd_trainer.model_structure import layer_classes

PROGRAM = PROGRAMS / "failing_training.py"
#: From the bad row on; before it come the imports of three processes.
SECONDS = 60

NONE = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None)
FSDP1 = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1, use_orig_params=False), deepspeed_plugin=None)
FSDP2 = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2, use_orig_params=True), deepspeed_plugin=None)
ZERO2 = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=SimpleNamespace(zero_stage=2))
ZERO3 = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=SimpleNamespace(zero_stage=3))


@pytest.mark.parametrize(
    ("state", "has_pretrained", "share", "message"),
    [
        (FSDP1, False, None, "FSDP1 with `use_orig_params=False` joins parameters of both models into one"),
        (ZERO3, True, None, "`pretrained_teacher` is not trained. Use FSDP2"),
        (FSDP2, False, "embeddings", "`share='embeddings'` gives both models the same parameters, and FSDP shards"),
        (ZERO3, False, "embeddings", "`share='embeddings'` gives both models the same parameters, and DeepSpeed"),
    ],
)
def test_what_cannot_be_sharded_is_refused(state, has_pretrained, share, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_strategy(SimpleNamespace(state=state), has_pretrained, share)


@pytest.mark.parametrize(
    ("state", "has_pretrained", "share"),
    [(NONE, True, "embeddings"), (ZERO2, True, "embeddings"), (ZERO3, False, None), (FSDP2, True, None)],
)
def test_what_can_be_sharded_is_not_refused(state, has_pretrained, share):
    check_strategy(SimpleNamespace(state=state), has_pretrained, share)


def test_a_norm_for_the_student_alone_is_refused_where_deepspeed_clips_both(tmp_path):
    args = tiny_args(tmp_path, student_max_grad_norm=0.5)
    args.deepspeed_plugin = ZERO2.deepspeed_plugin
    with pytest.raises(ValueError, match="`student_max_grad_norm=0.5` has no effect with DeepSpeed"):
        check_arguments(args)


def test_a_checkpoint_that_was_written_without_fsdp_is_refused_with_it(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="was written without FSDP, and this training uses FSDP"):
        trainer._load_from_checkpoint(str(tmp_path), trainer.pair)


@pytest.mark.parametrize(
    ("families", "head", "layers"),
    [
        (("bert", "distilbert"), "masked-lm", ["BertLayer", "TransformerBlock"]),
        (("llama", "gpt2"), "causal-lm", ["GPT2Block", "LlamaDecoderLayer"]),
        (("t5", "t5"), "seq2seq-lm", ["T5Block"]),
    ],
)
def test_the_layers_of_both_models_are_found_and_those_with_tied_parameters_left_out(families, head, layers):
    assert layer_classes([tiny_model(family, head) for family in families]) == layers


def test_the_frozen_teacher_is_placed_under_deepspeed_unless_it_is_quantised(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, distillation_mode="community")
    moved = []
    monkeypatch.setattr(trainer, "_move_model_to_device", lambda model, device: moved.append(model))
    trainer.is_deepspeed_enabled = True  # which leaves models where they are
    trainer._place_pretrained()
    assert moved == [trainer.pretrained_teacher]
    trainer.pretrained_teacher.quantization_method = "bitsandbytes"
    trainer._place_pretrained()
    assert moved == [trainer.pretrained_teacher]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("label", "Label 7 of row "),
        ("inf", "FloatingPointError: The loss of the teacher and student became NaN or infinite at step 3"),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_message(failure, message, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(PROGRAM), str(tmp_path), failure],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    seconds = time.time() - (tmp_path / "started").stat().st_mtime
    assert run.returncode != 0
    assert message in run.stderr
    assert seconds < SECONDS
