"""`train_generations`: each pair learns from the frozen best teacher before it, and the best models are kept."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_bert, tiny_rows
from transformers import AutoModelForSequenceClassification, TrainerCallback

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments, Generation, train_generations
from ctcd_trainer.generations import metric_key
from ctcd_trainer.graph import PRETRAINED


class Kill(TrainerCallback):
    """Ends the process, so to speak, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def maker(sources: list, kill: tuple[int, int] | None = None, **settings):
    def make_trainer(generation: Generation) -> CoDistillationTrainer:
        sources.append(generation.source)
        first = generation.source is None
        args = CoDistillationTrainingArguments(
            output_dir=generation.output_dir,
            distillation_mode="standalone" if first else "community",
            **{"save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.02},
            **{"report_to": "none", "use_cpu": True, "disable_tqdm": True},
            **{"max_steps": 4, **settings},
        )
        return CoDistillationTrainer(
            model=tiny_bert(2, seed=1),
            student_model=tiny_bert(1, seed=2),
            pretrained_teacher=generation.source,
            args=args,
            train_dataset=tiny_rows(16),
            eval_dataset=tiny_rows(12, seed=3),
            callbacks=[Kill(kill[1])] if kill is not None and kill[0] == generation.number else None,
        )

    return make_trainer


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("whole")
    sources = []
    return train_generations(maker(sources), 3, folder), folder, sources


def test_each_generation_learns_from_the_best_teacher_before_it(whole):
    found, folder, sources = whole
    losses = [metrics["eval_loss"] for metrics in found.metrics]
    best_so_far = [min(range(n), key=losses.__getitem__) + 1 for n in (1, 2)]
    assert sources == [None, *(str(folder / f"generation-{number}") for number in best_so_far)]
    args = torch.load(folder / "generation-2" / "training_args.bin", weights_only=False)
    assert {edge.source for edge in args.graph.edges} >= {PRETRAINED}


def test_the_best_model_of_each_learner_is_kept(whole):
    found, folder, _ = whole
    for learner, key in (("teacher", "eval_loss"), ("student", "eval_student_loss")):
        losses = [metrics[key] for metrics in found.metrics]
        assert found.best[learner] == losses.index(min(losses)) + 1
        part = "" if learner == "teacher" else learner
        kept = folder / "best" / part
        assert found.folders[learner] == str(kept)
        expected = weights_of(str(folder / f"generation-{found.best[learner]}" / part))
        actual = weights_of(str(kept))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not list((folder / "best").glob("checkpoint-*"))
    assert json.loads((folder / "best" / "generations.json").read_text())["best"] == found.best


def test_generations_that_were_killed_go_on(whole, tmp_path):
    found, folder, _ = whole
    with pytest.raises(KeyboardInterrupt):
        train_generations(maker([], kill=(2, 3)), 3, tmp_path)
    sources = []
    again = train_generations(maker(sources), 3, tmp_path)
    assert len(sources) == 2  # the first generation is finished, and is not made again
    strip = lambda metrics: {name: value for name, value in metrics.items() if "loss" in name}  # noqa: E731
    assert [strip(metrics) for metrics in again.metrics] == [strip(metrics) for metrics in found.metrics]
    for name in ("generation-2", "generation-3", "best/student"):
        ours, theirs = weights_of(str(tmp_path / name)), weights_of(str(folder / name))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    train_generations(maker(sources), 3, tmp_path)
    assert len(sources) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generations": 0}, "`generations=0` is not valid"),
        ({"metric": "charm"}, "`metric='charm'`, and it is not known"),
        ({"metric": "accuracy"}, "`metric='accuracy'`: the evaluation of generation 1 has no 'eval_accuracy'"),
        ({"output": "elsewhere"}, "The trainer of generation 1 has `output_dir="),
        ({"eval_dataset": None}, "`eval_dataset` of generation 1 is None"),
    ],
)
def test_wrong_generations_are_refused(tmp_path, options, message):
    def make_trainer(generation: Generation) -> CoDistillationTrainer:
        folder = options.get("output", Path(generation.output_dir).name)
        trainer = maker([], max_steps=1)(Generation(1, str(tmp_path / "all" / folder)))
        if "eval_dataset" in options:
            trainer.eval_dataset = None
        return trainer

    given = {"generations": 1} | {name: value for name, value in options.items() if name in ("generations", "metric")}
    with pytest.raises(ValueError, match=message):
        train_generations(make_trainer, output_dir=tmp_path / "all", **given)


def test_each_learner_has_its_own_value_of_the_metric():
    metrics = ["eval_accuracy", "eval_student_accuracy", "eval_dev_accuracy", "eval_dev_student_accuracy"]
    for metric in ("accuracy", "student_accuracy", "eval_student_accuracy"):
        assert [metric_key(metric, learner, metrics) for learner in ("teacher", "student")] == metrics[:2]
    assert [metric_key("dev_accuracy", learner, metrics) for learner in ("teacher", "student")] == metrics[2:]
