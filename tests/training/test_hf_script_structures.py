"""Hugging Face's example scripts run with the class of the trainer exchanged and a student added, nothing else."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_script_qa import run_qa
from hf_script_seq2seq import run_summarization, run_translation
from hf_scripts import Run, run_clm, run_glue, run_mlm, run_ner, run_swag
from tiny import assert_same_weights, changed, weights_of
from tiny_tokenizer import tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from ctcd_trainer import (
    CoDistillationSeq2SeqTrainer,
    CoDistillationSeq2SeqTrainingArguments,
    CoDistillationTrainer,
    CoDistillationTrainingArguments,
)

#: Settings of a family by number of layers. With smaller weights all tokens would look alike to a new model, and
#: teacher and student would predict the same.
CONFIGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "bert": lambda layers: {
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    },
    "distilbert": lambda layers: {
        "dim": 16,
        "n_layers": layers,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    },
    "gpt2": lambda layers: {
        "n_embd": 16,
        "n_layer": layers,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.3,
    },
    "t5": lambda layers: {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": layers,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "bart": lambda layers: {
        "d_model": 16,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 64,
        "init_std": 0.3,
    },
}


@dataclass(frozen=True)
class Case:
    """A script, with the families of its models and the metrics that it computes from predictions."""

    script: Callable[..., Run]
    auto_class: type
    teacher: str
    student: str
    metrics: tuple[str, ...]
    num_labels: int | None = None

    @property
    def name(self) -> str:
        return f"{self.script.__name__.removeprefix('run_')}-{self.teacher}-{self.student}"

    @property
    def is_seq2seq(self) -> bool:
        return self.auto_class is AutoModelForSeq2SeqLM

    @property
    def plain_class(self) -> type[Trainer]:
        return Seq2SeqTrainer if self.is_seq2seq else Trainer

    @property
    def our_class(self) -> type[Trainer]:
        return CoDistillationSeq2SeqTrainer if self.is_seq2seq else CoDistillationTrainer

    @property
    def our_arguments_class(self) -> type[TrainingArguments]:
        return CoDistillationSeq2SeqTrainingArguments if self.is_seq2seq else CoDistillationTrainingArguments

    @property
    def is_language_model(self) -> bool:
        return self.auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSeq2SeqLM)

    def save_model(self, folder: Path, family: str, layers: int, seed: int) -> str:
        """Save a new model with its tokenizer, as if it had been pre-trained."""
        tokenizer = tiny_tokenizer(family)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        labels = {} if self.num_labels is None else {"num_labels": self.num_labels}
        config = AutoConfig.for_model(
            family, vocab_size=len(tokenizer), **CONFIGS[family](layers), **special, **labels
        )
        torch.manual_seed(seed)
        self.auto_class.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def run(
        self,
        model: str,
        output_dir: Path,
        trainer_class: type[Trainer],
        arguments_class: type[TrainingArguments] | None = None,
        arguments: dict[str, Any] | None = None,
        **extra: Any,
    ) -> Run:
        """Run the script, by default with arguments of transformers' own class."""
        settings = {
            "output_dir": str(output_dir),
            "do_train": True,
            "do_eval": True,
            "do_predict": True,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if self.is_seq2seq:
            settings["predict_with_generate"] = True
        arguments_class = arguments_class or (Seq2SeqTrainingArguments if self.is_seq2seq else TrainingArguments)
        return self.script(model, arguments_class(**settings | (arguments or {})), trainer_class, **extra)


CASES = [
    Case(run_glue, AutoModelForSequenceClassification, "bert", "bert", ("accuracy",), num_labels=3),
    Case(run_ner, AutoModelForTokenClassification, "bert", "bert", ("accuracy",), num_labels=4),
    Case(run_ner, AutoModelForTokenClassification, "bert", "distilbert", ("accuracy",), num_labels=4),
    Case(run_swag, AutoModelForMultipleChoice, "bert", "bert", ("accuracy",)),
    Case(run_qa, AutoModelForQuestionAnswering, "bert", "bert", ()),
    Case(run_mlm, AutoModelForMaskedLM, "bert", "bert", ("accuracy",)),
    Case(run_mlm, AutoModelForMaskedLM, "bert", "distilbert", ("accuracy",)),
    Case(run_clm, AutoModelForCausalLM, "gpt2", "gpt2", ("accuracy",)),
    Case(run_translation, AutoModelForSeq2SeqLM, "t5", "t5", ("similarity", "gen_len")),
    Case(run_translation, AutoModelForSeq2SeqLM, "bart", "bart", ("similarity", "gen_len")),
    Case(run_summarization, AutoModelForSeq2SeqLM, "t5", "t5", ("similarity", "gen_len")),
    Case(run_summarization, AutoModelForSeq2SeqLM, "bart", "bart", ("similarity", "gen_len")),
]


@dataclass(frozen=True)
class Runs:
    """A script that ran twice: with transformers' own trainer, and with ours and a student."""

    plain: Run
    ours: Run
    before: dict[str, dict[str, torch.Tensor]]

    @property
    def folders(self) -> dict[str, Path]:
        output_dir = Path(self.ours.trainer.args.output_dir)
        return {"teacher": output_dir, "student": output_dir / "student"}

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        return {"teacher": self.ours.trainer.teacher_model, "student": self.ours.trainer.student_model}


@pytest.fixture(scope="module")
def run_twice(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Runs]:
    """Runs a script with both classes, once for all tests."""

    @functools.cache
    def run(case: Case) -> Runs:
        folder = tmp_path_factory.mktemp(case.name)
        teacher = case.save_model(folder / "teacher", case.teacher, layers=3, seed=1)
        student = case.save_model(folder / "student", case.student, layers=2, seed=2)
        return Runs(
            plain=case.run(teacher, folder / "plain", case.plain_class),
            ours=case.run(teacher, folder / "ours", case.our_class, student_model=student),
            before={
                name: weights_of(case.auto_class.from_pretrained(path))
                for name, path in (("teacher", teacher), ("student", student))
            },
        )

    return run


def cases(wanted: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrizes a test with the scripts for which it is meant."""
    return pytest.mark.parametrize("case", list(filter(wanted, CASES)), ids=lambda case: case.name)


def student_keys(case: Case, prefix: str) -> set[str]:
    """The keys of the metrics that the student adds where there are labels."""
    keys = {f"{prefix}_student_{name}" for name in ("loss", *case.metrics)} | {f"{prefix}_agreement"}
    if case.is_language_model:
        keys |= {f"{prefix}_perplexity", f"{prefix}_student_perplexity"}
    return keys


# ---- Every script ----


@cases()
def test_the_metrics_have_the_scripts_keys_and_the_students(case: Case, run_twice: Callable[[Case], Runs]) -> None:
    runs = run_twice(case)
    # run_qa evaluates without labels, and computes its metrics after the loop.
    expected = {"eval_agreement"} if case.script is run_qa else student_keys(case, "eval")
    assert runs.ours.metrics.keys() - runs.plain.metrics.keys() == expected
    assert runs.plain.metrics.keys() <= runs.ours.metrics.keys()
    assert all(math.isfinite(value) for value in runs.ours.metrics.values())
    assert 0 <= runs.ours.metrics["eval_agreement"] <= 1


@cases(lambda case: case.script not in (run_swag, run_mlm, run_clm))
def test_predict_gives_what_the_script_expects(case: Case, run_twice: Callable[[Case], Runs]) -> None:
    runs = run_twice(case)
    plain, ours = runs.plain.output, runs.ours.output
    has_labels = "predict_loss" in plain.metrics
    expected = student_keys(case, "predict") if has_labels else {"predict_agreement"}
    assert ours.metrics.keys() - plain.metrics.keys() == expected
    assert plain.metrics.keys() <= ours.metrics.keys()
    assert len(ours) == 3
    assert np.shape(ours.predictions) == np.shape(plain.predictions)
    np.testing.assert_equal(ours.label_ids, plain.label_ids)


@cases()
def test_every_weight_of_both_models_is_trained(case: Case, run_twice: Callable[[Case], Runs]) -> None:
    runs = run_twice(case)
    for name, model in runs.models.items():
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable <= changed(model, runs.before[name]), name


@cases()
def test_both_models_load_without_this_package(case: Case, run_twice: Callable[[Case], Runs]) -> None:
    runs = run_twice(case)
    for name, folder in runs.folders.items():
        model = case.auto_class.from_pretrained(folder)
        assert model.config.model_type == getattr(case, name)
        assert_same_weights(model, runs.models[name])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == runs.ours.trainer.processing_class.get_vocab()


@cases()
def test_the_script_writes_the_same_files(case: Case, run_twice: Callable[[Case], Runs]) -> None:
    runs = run_twice(case)
    plain, ours = (Path(run.trainer.args.output_dir) for run in (runs.plain, runs.ours))
    figures = {"learning_curves.png"}  # of the model cards
    assert {path.name for path in ours.iterdir()} - figures == {path.name for path in plain.iterdir()} | {"student"}
    assert json.loads((ours / "eval_results.json").read_text()) == runs.ours.metrics
    assert json.loads((ours / "all_results.json").read_text()).items() >= runs.ours.metrics.items()


def loss_by_hand(trainer: Trainer) -> float:
    """Mean cross-entropy of a causal language model.

    Plain Trainer takes GPT2LMHeadModel for one that does not shift its labels (its name does not end in ForCausalLM),
    and so divides by one position per row too many.
    """
    rows = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        logits = trainer.model.eval()(rows).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@cases()
def test_the_metrics_of_each_model_are_those_of_the_script_for_it_alone(
    case: Case, run_twice: Callable[[Case], Runs], tmp_path: Path
) -> None:
    """Evaluated only, so that the masks of `run_mlm` are the same."""
    folders = {name: str(folder) for name, folder in run_twice(case).folders.items()}
    both = case.run(
        folders["teacher"],
        tmp_path,
        case.our_class,
        case.our_arguments_class,
        {"do_train": False},
        student_model=folders["student"],
    ).metrics
    for learner, prefix in (("teacher", "eval"), ("student", "eval_student")):
        run = case.run(folders[learner], tmp_path / learner, case.plain_class, arguments={"do_train": False})
        alone = {name: run.metrics[f"eval_{name}"] for name in case.metrics}
        if case.script is run_qa:  # evaluated without labels, and by its own trainer, which knows of one model
            alone = {name: run.metrics[f"eval_{name}"] for name in ("exact_match", "f1") if learner == "teacher"}
        else:
            alone["loss"] = loss_by_hand(run.trainer) if case.script is run_clm else run.metrics["eval_loss"]
        if case.is_language_model:
            alone["perplexity"] = math.exp(alone["loss"])
        assert {name: both[f"{prefix}_{name}"] for name in alone} == pytest.approx(alone, rel=1e-5), learner


# ---- Single scripts ----


@pytest.mark.parametrize(
    ("script", "metric"), [(run_qa, "f1"), (run_mlm, "student_loss"), (run_translation, "student_similarity")]
)
def test_the_best_checkpoint_is_chosen_by_the_scripts_metrics(
    script: Callable[..., Run], metric: str, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.script is script)
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 12,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
    }
    teacher = case.save_model(tmp_path / "teacher", case.teacher, layers=3, seed=1)
    student = case.save_model(tmp_path / "student", case.student, layers=2, seed=2)
    trainer = case.run(teacher, tmp_path, case.our_class, arguments=arguments, student_model=student).trainer
    during_training = [row[f"eval_{metric}"] for row in trainer.state.log_history if f"eval_{metric}" in row][:3]
    best = (min if metric.endswith("loss") else max)(during_training)
    assert trainer.state.best_metric == best
    assert trainer.state.best_global_step == 4 * (1 + during_training.index(best))
    checkpoint = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    for folder, model in ((checkpoint, trainer.teacher_model), (checkpoint / "student", trainer.student_model)):
        assert_same_weights(case.auto_class.from_pretrained(folder), model)


@cases(lambda case: case.is_seq2seq)
def test_predictions_are_what_each_model_generates(case: Case, run_twice: Callable[[Case], Runs]) -> None:
    trainer = run_twice(case).ours.trainer
    output = trainer.predict(trainer.eval_dataset, max_length=12, num_beams=2, student_predictions=True)
    assert len(output) == 4
    predictions = {"teacher": output.predictions, "student": output.student_predictions}
    for name, model in (("teacher", trainer.teacher_model), ("student", trainer.student_model)):
        expected = []
        for batch in trainer.get_eval_dataloader():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            expected += model.eval().generate(**inputs, max_length=12, num_beams=2).tolist()
        pad = trainer.processing_class.pad_token_id
        assert len(expected) == len(predictions[name])
        for row, tokens in zip(predictions[name].tolist(), expected, strict=True):
            assert row[: len(tokens)] == tokens, name
            assert set(row[len(tokens) :]) <= {pad, -100}, name


@cases(lambda case: case.is_seq2seq)
def test_metrics_are_computed_once_per_model_from_its_own_tokens(
    case: Case, run_twice: Callable[[Case], Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run_twice(case).ours.trainer
    calls = []
    monkeypatch.setattr(
        trainer, "compute_metrics", lambda prediction: calls.append(prediction) or {"calls": len(calls)}
    )
    metrics = trainer.evaluate(max_length=12, num_beams=1)
    output = trainer.predict(trainer.eval_dataset, max_length=12, num_beams=1, student_predictions=True)
    assert (metrics["eval_calls"], metrics["eval_student_calls"]) == (1, 2)
    assert len(calls) == 4
    assert not np.array_equal(calls[0].predictions, calls[1].predictions)
    for call, predictions in zip(calls[:2], (output.predictions, output.student_predictions), strict=True):
        np.testing.assert_array_equal(call.predictions, predictions)
        np.testing.assert_array_equal(call.label_ids, output.label_ids)


@cases(lambda case: case.script is run_qa)
def test_the_loop_of_question_answering_gives_start_and_end_logits_of_each_model(
    case: Case, run_twice: Callable[[Case], Runs]
) -> None:
    trainer = run_twice(case).ours.trainer
    output = trainer.loop_without_metrics(trainer.get_eval_dataloader(), "Evaluation", "eval")
    predictions = {"teacher": output.predictions, "student": output.student_predictions}
    for name, model in (("teacher", trainer.teacher_model), ("student", trainer.student_model)):
        assert len(predictions[name]) == 2
        with torch.no_grad():
            batches = [model.eval()(**batch) for batch in trainer.get_eval_dataloader()]
        for part, actual in zip(("start_logits", "end_logits"), predictions[name], strict=True):
            expected = [row for batch in batches for row in batch[part]]
            assert len(actual) == len(expected)
            for row, logits in zip(actual, expected, strict=True):
                np.testing.assert_allclose(row[: len(logits)], logits, rtol=1e-5, atol=1e-6)
