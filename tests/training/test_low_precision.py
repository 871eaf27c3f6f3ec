"""bf16, fp16 with its scaler, and what saves memory: the same trainings as in fp32, to the precision."""

import pytest
import torch
from places import ROOT
from tiny import assert_same_weights, tiny_args, tiny_bert, tiny_rows, tiny_trainer, train_alone, weights_of
from tiny_models import rows_of, tiny_batch, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from ctcd_trainer import CoDistillationTrainer

CORPUS = ROOT.parent / "shared" / "data" / "corpus" / "train.parquet"
COMPONENTS = ("teacher_hard_loss", "student_hard_loss", "student_from_teacher_loss", "teacher_from_student_loss")


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def language_models(folder, head: str, **options) -> CoDistillationTrainer:
    """A trainer of two BERTs or two GPT-2s."""
    family = {"masked-lm": "bert", "causal-lm": "gpt2"}[head]
    return CoDistillationTrainer(
        model=tiny_model(family, head, 3, seed=1),
        args=tiny_args(folder, learning_rate=1e-3, logging_steps=options.get("max_steps", 5), **options),
        data_collator=stack,
        train_dataset=rows_of(tiny_batch(head, 24)),
        student_model=tiny_model(family, head, 2, seed=2),
    )


# ---- bf16 ----


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole-logits"])
@pytest.mark.parametrize("head", ["masked-lm", "causal-lm"])
def test_bf16_losses_of_language_models_are_those_of_fp32_within_two_percent(head, fused, tmp_path):
    logs = []
    for bf16 in (False, True):
        trainer = language_models(tmp_path, head, bf16=bf16, fused_lm_head=fused, max_steps=12)
        trainer.train()
        logs.append(trainer.state.log_history[0])
        assert {p.dtype for p in trainer.pair.parameters()} == {torch.float32}
    for name in COMPONENTS[:2]:
        assert logs[1][name] != logs[0][name]
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.02)
    for name in COMPONENTS[2:]:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="the text is not there")
def test_bf16_losses_on_text_stay_within_two_percent_of_fp32_over_200_steps(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    text = "\n".join(parquet.read_table(CORPUS).slice(0, 200).column(0).to_pylist()).encode()
    length, count = 48, 1600
    tokens = torch.tensor(list(text[: length * count]))
    rows = [{"input_ids": row, "labels": row} for row in tokens.view(count, length)]

    def model_of(layers: int, seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        sizes = {"n_embd": 48, "n_layer": layers, "n_head": 2, "n_positions": length, "vocab_size": 256}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    logs = []
    for bf16 in (False, True):
        trainer = CoDistillationTrainer(
            model=model_of(3, 1),
            args=tiny_args(
                tmp_path, bf16=bf16, max_steps=200, logging_steps=20, per_device_train_batch_size=8, learning_rate=3e-3
            ),
            data_collator=stack,
            train_dataset=rows,
            student_model=model_of(2, 2),
        )
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    assert logs[0][-1]["teacher_hard_loss"] < 0.7 * logs[0][0]["teacher_hard_loss"]  # something was learnt
    for fp32, bf16 in zip(*logs, strict=True):
        for name in COMPONENTS[:2]:
            assert bf16[name] == pytest.approx(fp32[name], rel=0.02)


@pytest.mark.slow
def test_compiled_bf16_trains_both_models_as_eager_bf16(tmp_path):
    options = {"bf16": True, "max_steps": 3}
    eager = language_models(tmp_path, "masked-lm", **options)
    compiled = language_models(tmp_path, "masked-lm", torch_compile_backend="aot_eager", **options)
    for trainer in (eager, compiled):
        trainer.train()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    logs, expected = compiled.state.log_history[0], eager.state.log_history[0]
    for name in (*COMPONENTS, "teacher_grad_norm", "student_grad_norm"):
        assert logs[name] == pytest.approx(expected[name], rel=0.01), name


def test_tf32_reaches_torch_where_a_device_has_it_and_is_refused_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: False)
    with pytest.raises(ValueError, match="--tf32 requires Ampere"):
        tiny_args(tmp_path, tf32=True)
    enabled = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", enabled.append)
    for tf32 in (True, False):
        tiny_trainer(tmp_path, tf32=tf32)
        assert enabled.pop() is tf32


# ---- Optimizers of few bits ----


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao"), ("adamw_torch_4bit", "torchao")],
)
def test_optimizers_of_few_bits_train_each_model_as_alone_and_go_on_from_checkpoints(optim, package, tmp_path):
    pytest.importorskip(package)

    def models() -> tuple[torch.nn.Module, torch.nn.Module]:  # smaller parameters are left in fp32
        return tuple(tiny_bert(layers, layers, hidden_size=64, intermediate_size=64) for layers in (3, 2))

    def trainer_of(**more) -> CoDistillationTrainer:
        teacher, student = models()
        return tiny_trainer(
            tmp_path, model=teacher, student_model=student, distillation_mode="standalone", **options, **more
        )

    options = {"optim": optim, "weight_decay": 0.1, "max_steps": 4}
    trainer = trainer_of(save_strategy="steps", save_steps=2)
    trainer.train()
    state = trainer.optimizer.optimizer.state
    for group in trainer.optimizer.param_groups:
        entries = [value for parameter in group["params"] for value in state[parameter].values()]
        if group["weight_decay"] > 0:  # matrices
            assert any("OptimState" in type(x).__name__ or getattr(x, "dtype", None) == torch.uint8 for x in entries)
    for model, own in zip(models(), trainer.pair.learners.values(), strict=True):
        assert_same_weights(own, train_alone(model, tmp_path, **options))
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.pair, trainer.pair)


def test_loss_functions_of_the_user_compute_in_fp32_under_autocast(tmp_path):
    seen = []

    def product(logits: torch.Tensor) -> torch.Tensor:
        values = logits @ torch.eye(logits.shape[-1])
        seen.append(values.dtype)
        return values

    def soft_loss(source, learner, _inputs):
        return (product(learner["logits"]) - source["logits"]).square().mean()

    def hard_loss(outputs, labels, num_items_in_batch):
        values = product(outputs["logits"])
        return torch.nn.functional.cross_entropy(values, labels, reduction="sum") / num_items_in_batch

    options = {"soft_loss_func": soft_loss, "compute_loss_func": hard_loss}
    trainer = tiny_trainer(tmp_path, **options, bf16=True, max_steps=1, eval_dataset=tiny_rows(4))
    trainer.train()
    trainer.evaluate()
    assert set(seen) == {torch.float32}


# ---- fp16 ----


class Watch(TrainerCallback):
    """Keeps the weights of both models, and the rate, after each step."""

    def __init__(self, trainer: CoDistillationTrainer) -> None:
        self.pair, self.weights, self.rates = trainer.pair, [weights_of(trainer.pair)], []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(weights_of(self.pair))
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def changed(self, learner: str) -> list[bool]:
        """For each step, whether it has changed the weights of a learner."""
        names = [name for name in self.weights[0] if f".{learner}." in name]
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return [any(not torch.equal(before[name], after[name]) for name in names) for before, after in pairs]


def fp16_trainer(folder, scale: float, **options) -> CoDistillationTrainer:
    """A trainer in fp16; on a CPU, where accelerate does without, it gets the autocast and the scaler here."""
    trainer = language_models(folder, "masked-lm", fp16=True, max_steps=6, **options)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return trainer


@pytest.mark.parametrize(
    ("learner", "optim"),
    [("teacher", "adamw_torch_fused"), ("student", "adamw_torch_fused"), ("student", "adamw_torch")],
)
def test_an_overflow_in_one_model_skips_the_step_of_both(learner, optim, tmp_path):
    trainer = fp16_trainer(tmp_path, scale=1024.0, optim=optim)
    weight = next(trainer.pair.learners[learner].parameters())
    weight.register_hook(lambda grad: torch.full_like(grad, torch.inf) if trainer.state.global_step == 2 else grad)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    expected = [True, True, False, True, True, True]
    assert watch.changed("teacher") == watch.changed("student") == expected
    if optim == "adamw_torch":  # the schedule waits, too; accelerate does not notice what a fused optimizer skips
        assert watch.rates[1] == watch.rates[2] > watch.rates[3]
    assert trainer.accelerator.scaler.get_scale() == 512.0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "whole-logits"])
def test_scaled_gradients_are_clipped_by_their_unscaled_norms(fused, tmp_path):
    options = {"max_grad_norm": 0.5, "student_max_grad_norm": 0.1, "fused_lm_head": fused}
    scaled = fp16_trainer(tmp_path, scale=4096.0, **options)
    scaled.train()
    plain = language_models(tmp_path, "masked-lm", max_steps=6, **options)
    plain.train()
    for name in ("teacher_grad_norm", "student_grad_norm", *COMPONENTS):
        found, expected = (trainer.state.log_history[0][name] for trainer in (scaled, plain))
        assert found == pytest.approx(expected, rel=0.02), name


# ---- Memory ----


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_kwargs_hold_for_both_models_and_change_no_weight(reentrant, tmp_path):
    plain = tiny_trainer(tmp_path)
    plain.train()
    trainer = tiny_trainer(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    trainer.train()
    for name, model in trainer.pair.learners.items():
        functions = {
            m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", 0)
        }
        assert [function.keywords["use_reentrant"] for function in functions] == [reentrant] * len(functions)
        assert functions
        assert_same_weights(model, plain.pair.learners[name], tolerance=1e-6)


def test_the_cache_of_the_device_is_emptied_every_so_many_steps_and_no_weight_changes(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(trainer))
    trainers = [tiny_trainer(tmp_path, torch_empty_cache_steps=steps, max_steps=4) for steps in (None, 2)]
    for trainer in trainers:
        trainer.train()
    assert emptied == [trainers[1]] * 2
    assert_same_weights(trainers[0].pair, trainers[1].pair)
