"""Trainings that must come out the same on any number of processes.

`python distributed_training.py FOLDER JOB...` does jobs (see `run_job`), each in `FOLDER/NAME`, and writes what each
process has at the end to `FOLDER/NAME-RANK.pt`.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from processes import run_forked
from tiny import collate, tiny_args, tiny_bert, tiny_rows
from tiny_models import IGNORED, rows_of, tiny_batch, tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor

from ctcd_trainer import CoDistillationTrainer, create_student

#: Rows of a global batch.
BATCH = 8
#: DeepSpeed clips both models by one norm.
UNCLIPPED = {"max_grad_norm": 0.0, "student_max_grad_norm": None}


def is_distributed() -> bool:
    return "WORLD_SIZE" in os.environ


def stack(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def argmax(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return logits.gt(0) if labels.is_floating_point() else logits.argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    scored = prediction.label_ids != IGNORED
    return {"accuracy": float((prediction.predictions == prediction.label_ids)[scored].mean())}


def classification() -> dict[str, Any]:
    """Rows of different lengths; what is set for the student alone differs from the teacher's."""
    return {
        "model": tiny_bert(3, seed=1),
        "student_model": tiny_bert(2, seed=2),
        "train_dataset": tiny_rows(40, ragged=True),
        "data_collator": collate,
        "student_learning_rate": 5e-3,
        "student_max_grad_norm": 0.5,
        "student_weight_decay": 0.1,
        "weight_decay": 0.01,
        "soft_warmup_ratio": 0.5,
    }


def missing_targets() -> dict[str, Any]:
    """Four labels for each row, of which some are missing: at some steps all of one process, at one step all."""
    rows = tiny_rows(40, "multi_label")
    for index, row in enumerate(rows):
        there = 0 if 4 <= index < 8 or 16 <= index < 24 else index % 5
        row["labels"] = [*row["labels"][:there], *[math.nan] * (4 - there)]
    models = (("model", 3), ("student_model", 2))
    models = {name: tiny_bert(layers, layers, "multi_label") for name, layers in models}
    edges = {"teacher_from_student_weight": "auto", "eval_strategy": "steps", "eval_steps": 2}
    edges["edges"] = {"teacher->student": {"rows": "unlabelled", "gate": "confident"}}
    return classification() | models | {"train_dataset": rows} | edges


def masked_lm() -> dict[str, Any]:
    """Two heads of different classes, tied and not; at some steps one process of two (or of four) scores nothing."""
    rows = rows_of(tiny_batch("masked-lm", 40))
    for row in (*rows[4:8], *rows[8:12], rows[16]):
        row["labels"] = torch.full_like(row["labels"], IGNORED)
    return {
        "model": tiny_model("bert", "masked-lm", 2, seed=1, tie_word_embeddings=True),
        "student_model": tiny_model("distilbert", "masked-lm", 2, seed=2, tie_word_embeddings=True),
        "train_dataset": rows,
    }


def unused() -> dict[str, Any]:
    """Untied, a BERT has a bias that its forward does not use."""
    models = ("model", 3), ("student_model", 2)
    return masked_lm() | {
        name: tiny_model("bert", "masked-lm", layers, seed=layers, tie_word_embeddings=False)
        for name, layers in models
    }


def causal_lm() -> dict[str, Any]:
    """Accumulation of two batches, vocabularies padded to different sizes, one of the models tied."""
    return {
        "model": tiny_model("llama", "causal-lm", 2, seed=1),
        "student_model": tiny_model("gpt2", "causal-lm", 2, seed=2, tie_word_embeddings=False),
        "train_dataset": rows_of(tiny_batch("causal-lm", 48)),
        "gradient_accumulation_steps": 2,
    }


def features() -> dict[str, Any]:
    """Hidden states through projections, over two accumulated batches of token labels."""
    models = ("model", 3, 16), ("student_model", 2, 8)
    return {
        **{
            name: tiny_model("bert", "token-classification", layers, seed=layers, hidden_size=width)
            for name, layers, width in models
        },
        **{"train_dataset": rows_of(tiny_batch("token-classification", 48)), "gradient_accumulation_steps": 2},
        **{"student_feature_weight": 0.8, "student_learning_rate": 5e-3},
    }


def uneven() -> dict[str, Any]:
    """A last batch of fewer rows, of which the last process has fewer than the others."""
    return classification() | {
        "train_dataset": tiny_rows(22, ragged=True),
        "accelerator_config": {"even_batches": False},
    }


def filled_up() -> dict[str, Any]:
    """A last batch of fewer rows, which Trainer's default fills up with the first ones."""
    rows = tiny_rows(22, ragged=True)
    return classification() | {"train_dataset": rows if is_distributed() else [*rows, *rows[:2]]}


def community() -> dict[str, Any]:
    """A frozen third model; the last step is in no log."""
    own = {"distillation_mode": "community", "pretrained_teacher": tiny_bert(2, seed=3), "max_steps": 7}
    return classification() | own


def community_lm() -> dict[str, Any]:
    """A frozen third language model."""
    return causal_lm() | {
        "distillation_mode": "community",
        "pretrained_teacher": tiny_model("llama", "causal-lm", 2, seed=3, tie_word_embeddings=False),
        "student_from_pretrained_weight": "auto",
        "student_from_teacher_gate": "wsl",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }


def one_way() -> dict[str, Any]:
    """The teacher is frozen inside of the pair."""
    return masked_lm() | {"distillation_mode": "kd"}


def adapters() -> dict[str, Any]:
    """Adapters on both models, with heads of their own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8, target_modules=["query", "value"])
    models = {}
    for name, layers in (("model", 3), ("student_model", 2)):
        torch.manual_seed(layers)
        models[name] = get_peft_model(tiny_bert(layers, seed=layers), config)
    return classification() | models


def warm_start() -> dict[str, Any]:
    """The teacher is trained alone, then the student is cut from it."""
    return classification() | {"student_model": partial(create_student, num_hidden_layers=2), "warm_start_steps": 3}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        *(classification, missing_targets, masked_lm, unused, causal_lm, community_lm),
        *(uneven, filled_up, community, one_way, adapters, warm_start, features),
    )
}


def trainer_of(scenario: str, folder: Path, **arguments: Any) -> CoDistillationTrainer:
    """The trainer of a scenario, with the share of this process in the global batches."""
    options = {"data_collator": stack, **SCENARIOS[scenario](), **arguments}
    own = ("model", "student_model", "pretrained_teacher", "train_dataset", "data_collator")
    models = {name: options.pop(name) for name in own if name in options}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.get("deepspeed"):
        # accelerate shards on accelerators alone, torch and DeepSpeed on the CPU as well.
        PartialState(cpu=True)
        PartialState._shared_state |= {"distributed_type": DistributedType.DEEPSPEED, "device": torch.device("cpu")}
    args = tiny_args(
        folder,
        **{
            "max_steps": 6,
            "per_device_train_batch_size": BATCH // processes,
            "per_device_eval_batch_size": 4 // processes,
            "logging_steps": 2,
            **options,
        },
    )
    if args.fsdp:
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    trainer = CoDistillationTrainer(
        args=args,
        eval_dataset=models["train_dataset"][:12],
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=argmax,
        **models,
    )
    if args.fsdp and args.fsdp_config.get("cpu_offload"):
        # torch pins memory for an accelerator alone.
        trainer.accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    if args.fsdp and args.fsdp_config["version"] == 1:
        # FSDP1 gathers each part of the optimizer's state into the same memory and takes it to the CPU, which is no
        # copy if it is there: all parts of a saved state would be the last one (`exp_avg_sq`).
        trainer.accelerator.state.fsdp_plugin.optim_state_dict_config.offload_to_cpu = False  # it copies, then
    return trainer


def train(scenario: str, folder: Path, resume_from: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Train and evaluate; returns the logs, the metrics, the loss of the training and the weights of both models."""
    rows = SCENARIOS[scenario]()["train_dataset"]
    trainer = trainer_of(scenario, folder, **arguments)
    output = trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    if trainer.args.save_strategy != "no":
        trainer.save_model()
    # As many rows as whole batches have, for the losses; some more, for what is counted row by row. Among the masked
    # ones are batches that only one process scores, or none.
    metrics = trainer.evaluate(rows[2:14])
    if scenario != "uneven":  # without `even_batches`, Trainer gathers tensors of different lengths, which fails
        more = trainer.evaluate(rows[:15], metric_key_prefix="more")
        metrics |= {name: value for name, value in more.items() if name.endswith(("accuracy", "agreement"))}
    timed = ("runtime", "per_second", "preparation_time", "epoch")
    return {
        "logs": [
            {name: value for name, value in log.items() if not name.endswith((*timed, "flos"))}
            for log in trainer.state.log_history
            if "loss" in log
        ],
        "metrics": {name: value for name, value in metrics.items() if not name.endswith(timed)},
        "train_loss": output.training_loss,
        "weights": whole_weights(trainer),
        "fused": trainer.pair.fused_heads.used,
        "held": {name: share_of(model) for name, model in sharded_models(trainer).items()},
        "units": {
            name: Counter(type(part).__name__ for part in model.modules() if isinstance(part, FSDPModule))
            for name, model in sharded_models(trainer).items()
        },
    }


def sharded_models(trainer: CoDistillationTrainer) -> dict[str, torch.nn.Module]:
    """What FSDP2 shards, the frozen teacher too."""
    if not trainer.accelerator.is_fsdp2:
        return {}
    frozen = {} if trainer.pretrained_teacher is None else {"pretrained": trainer.pretrained_teacher}
    return {**trainer.pair.learners, **frozen}


def share_of(model: torch.nn.Module) -> float:
    """The share of a model's weights that this process holds."""
    parameters = list(model.parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return held / sum(p.numel() for p in parameters)


def whole_weights(trainer: CoDistillationTrainer) -> dict[str, torch.Tensor]:
    """The weights of both models, whole on the first process at least."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else trainer.pair.state_dict()
    if state is None:  # not on the first process
        return {}
    return {name: value.detach().clone() for name, value in state.items()}


SAVED = {"save_strategy": "steps", "save_steps": 4}
BEST = {
    **SAVED,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "student_metric_for_best_model": "loss",
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": SAVED,
    "ddp": {**SAVED, "ddp_find_unused_parameters": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "fsdp2": {**SAVED, "fsdp": True, "fsdp_config": {"version": 2}},
    "best": {**BEST, "fsdp": True, "fsdp_config": {"version": 2}},
    "shards": {**SAVED, "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
    "bf16": {"bf16": True},
    "bf16-fsdp2": {"bf16": True, "fsdp": True, "fsdp_config": {"version": 2}},
    "offload": {**SAVED, "fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": True}},
    "compiled": {"fsdp": True, "fsdp_config": {"version": 2}, "torch_compile_backend": "aot_eager"},
    "first-loads": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
    "recomputed": {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}},
    "named": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer", "TransformerBlock"]},
    },
    "fsdp1": {**SAVED, "fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
    "shards1": {
        **SAVED,
        "fsdp": True,
        "fsdp_config": {"version": 1, "sync_module_states": False, "state_dict_type": "SHARDED_STATE_DICT"},
    },
}


for _stage in (1, 2, 3):
    STRATEGIES[f"zero{_stage}"] = {
        **UNCLIPPED,
        **SAVED,
        "deepspeed": {
            "zero_optimization": {"stage": _stage, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
    }


def run_job(folder: Path, job: str) -> None:
    """What one process does: `NAME PROCESSES STRATEGY SCENARIO [FOLDER OF A TRAINING TO GO ON WITH]`."""
    name, _, strategy, scenario, *previous = job.split()
    resume_from = folder / previous[0] / "checkpoint-4" if previous else None
    result = train(scenario, folder / name, resume_from, **STRATEGIES[strategy])
    torch.save(result, folder / f"{name}-{os.environ.get('RANK', '0')}.pt")
    AcceleratorState._reset_state(reset_partial_state=True)


def main(folder: str, *jobs: str) -> None:
    # FSDP1 takes what it has moved to the CPU for a copy and frees the original: on a CPU, the weights themselves.
    FlatParamHandle.to_cpu = lambda handle: nullcontext()

    def run(jobs: list[str]) -> None:
        for job in jobs:
            run_job(Path(folder), job)

    # Strategies leave settings in the environment.
    for _, group in groupby(jobs, key=lambda job: job.split()[1:3]):
        own = list(group)
        _, processes, strategy, *_ = own[0].split()
        run_forked(int(processes), partial(run, own), grouped=strategy != "plain" or None)


if __name__ == "__main__":
    main(*sys.argv[1:])
