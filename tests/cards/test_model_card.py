"""The model cards of a pair: they say what was measured and nothing of the machine, and their code works."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny import assert_same_weights, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from tiny_tokenizer import bert_tokenizer
from transformers import TrainerState, Wav2Vec2FeatureExtractor, default_data_collator

from ctcd_trainer.cards import card as model_card
from ctcd_trainer.cards.facts import CardFacts
from ctcd_trainer.cards.results import Results, metrics_of
from ctcd_trainer.students.costs import _on_device, latencies_of
from ctcd_trainer.tasks import find_task

FOLDERS = {"teacher": "", "student": "student"}
#: As it is outside of the tests, which take no time for drawing.
draw_curves = model_card.draw_curves


def share_of_right(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pair that was evaluated after each of 25 steps and at the end, with a tokenizer."""
    tokenizer = bert_tokenizer()
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("work") / "mine",
        model=tiny_bert(3, 1, vocab_size=len(tokenizer)),
        student_model=tiny_bert(2, 2, vocab_size=len(tokenizer)),
        processing_class=tokenizer,
        compute_metrics=share_of_right,
        eval_dataset=tiny_rows(6),
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=5,
        max_steps=25,
        temperature=2.0,
        seed=7,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def cards_of(trainer, **options):
    """The text of both cards, written with some options."""
    trainer.create_model_card(**options)
    return read_cards(trainer.args.output_dir)


def read_cards(root):
    return {name: (root_of(root, name) / "README.md").read_text() for name in FOLDERS}


def root_of(root, name):
    return Path(root, FOLDERS[name])


def rows_below(text, title):
    """The cells of the table below a title, by line, without the rule."""
    part = text.split(f"# {title}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def code_of(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def metadata_of(text):
    return ModelCard(text).data


# ---- What was measured ----


def test_the_final_metrics_of_both_models_are_those_of_the_last_evaluation(trained):
    last = trained.state.log_history[-1]
    for name, text in cards_of(trained).items():
        own, other = (f"**{n}** (this model)" if n == name else n for n in FOLDERS)
        assert rows_below(text, "Results") == [
            ["metric", own, other],
            ["loss", f"{last['eval_loss']:.4f}", f"{last['eval_student_loss']:.4f}"],
            ["accuracy", f"{last['eval_accuracy']:.4f}", f"{last['eval_student_accuracy']:.4f}"],
        ]
        assert f"the same prediction at {100 * last['eval_agreement']:.1f} % of the scored positions" in text


def test_evaluations_by_step_are_thinned_to_twenty_with_the_first_and_the_last(trained):
    during = [entry for entry in trained.state.log_history[:-1] if "eval_loss" in entry]
    assert len(during) == 25
    keys = ["eval_loss", "eval_student_loss", "eval_accuracy", "eval_student_accuracy", "eval_agreement"]
    by_step = {
        str(entry["step"]): [f"{entry['epoch']:.2f}", *(f"{entry[key]:.4f}" for key in keys)] for entry in during
    }
    for text in cards_of(trained).values():
        head, *rows = rows_below(text, "Evaluations during the training")
        assert head[2:] == ["teacher loss", "student loss", "teacher accuracy", "student accuracy", "agreement"]
        assert len(rows) == 20
        assert [rows[0][0], rows[-1][0]] == ["1", "25"]
        assert all(by_step[row[0]] == row[1:] for row in rows)


def test_the_metadata_are_valid_and_each_models_own(trained):
    options = {"language": "en", "license": "mit", "tags": "mine", "dataset_tags": "nyu-mll/glue"}
    last = trained.state.log_history[-1]
    cards = cards_of(trained, model_name="big", dataset="GLUE RTE", dataset_args="rte", **options)
    for name, text in cards.items():
        data = metadata_of(text)
        assert (data.language, data.license, data.library_name) == ("en", "mit", "transformers")
        assert (data.pipeline_tag, data.datasets, data.metrics) == (
            "text-classification",
            ["nyu-mll/glue"],
            ["accuracy"],
        )
        wanted = {"mine", "generated_from_trainer", "ctcd", "co-distillation", "knowledge-distillation"}
        assert set(data.tags) == wanted
        assert data.model_name == {"teacher": "big", "student": "big-student"}[name]
        prefix = {"teacher": "eval_", "student": "eval_student_"}[name]
        values = {result.metric_type: result.metric_value for result in data.eval_results}
        assert values == {key: last[f"{prefix}{key}"] for key in ("loss", "accuracy")}
        places = {(r.task_type, r.dataset_type, r.dataset_name, r.dataset_config) for r in data.eval_results}
        assert places == {("text-classification", "nyu-mll/glue", "GLUE RTE", "rte")}
        assert f"\n# {data.model_name}\n" in text
        assert "on the data set GLUE RTE" in text


def test_with_the_best_checkpoint_loaded_the_final_metrics_are_its_own(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        eval_dataset=tiny_rows(6, seed=3),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="student_loss",
        learning_rate=0.3,
    )
    trainer.train()
    best = min((e for e in trainer.state.log_history if "eval_loss" in e), key=lambda e: e["eval_student_loss"])
    assert best["step"] < trainer.state.global_step
    assert rows_below(cards_of(trainer)["student"], "Results")[1][1:] == [
        f"{best['eval_loss']:.4f}",
        f"{best['eval_student_loss']:.4f}",
    ]


def test_sizes_are_those_of_the_models_and_of_their_files(trained):
    for name, text in cards_of(trained).items():
        _, *rows = rows_below(text, "Size and speed")
        for row, other in zip(rows, FOLDERS, strict=True):
            model = trained.pair.learners[other]
            bytes_on_disk = (root_of(trained.args.output_dir, other) / "model.safetensors").stat().st_size
            assert float(row[1]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=1e-3)
            assert float(row[2]) == pytest.approx(bytes_on_disk / 1e6, rel=1e-3)
            assert float(row[3]) > 0
            assert ("this model" in row[0]) == (other == name)
        assert "one sequence of 30 random tokens on the CPU" in text  # the models have 32 positions
        assert f"{torch.get_num_threads()} torch thread(s), float32" in text


def test_timing_leaves_modes_and_the_random_state_as_they_were():
    models = {"a": tiny_bert(2).train(), "b": tiny_bert(1).eval()}
    models["a"].bert.encoder.eval()
    modes = [module.training for model in models.values() for module in model.modules()]
    state = torch.get_rng_state()
    assert latencies_of(models).milliseconds.keys() == models.keys()
    assert [module.training for model in models.values() for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    loss = models["a"](input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.tensor([1])).loss
    loss.backward()


def test_a_model_elsewhere_is_copied_whole_and_stays_as_it_is():
    model = tiny_model("gpt2", "causal-lm")
    before = model.state_dict(keep_vars=True)
    copied = _on_device(model, "meta")
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}
    assert copied.lm_head.weight is copied.transformer.wte.weight  # tied, as they were
    assert all(tensor is before[name] for name, tensor in model.state_dict(keep_vars=True).items())


@pytest.mark.parametrize(
    ("family", "head"),
    [("vit", "image-classification"), ("t5", "seq2seq-lm"), ("bert", "multiple-choice")],
)
def test_models_that_take_no_single_sequence_are_not_timed_and_the_card_says_why(family, head):
    measured = latencies_of({"model": tiny_model(family, head)})
    assert measured.milliseconds == {}
    assert "not measured: a " in measured.conditions


def test_metrics_of_any_number_of_learners_and_data_sets_are_told_apart():
    evaluation = {
        "eval_loss": 1.0,
        "eval_small_loss": 2.0,
        "eval_tiny_f1": 3.0,
        "eval_dev_small_f1": 4.0,
        "eval_dev_f1": 5.0,
        "eval_agreement": 0.5,
        "eval_runtime": 9.0,
        "eval_dev_samples_per_second": 9.0,
        "eval_note": "text",
        "step": 3,
    }
    assert metrics_of(evaluation, ["big", "small", "tiny"]) == {
        "big": {"loss": 1.0, "dev_f1": 5.0, "agreement": 0.5},
        "small": {"loss": 2.0, "dev_f1": 4.0, "agreement": 0.5},
        "tiny": {"f1": 3.0, "agreement": 0.5},
    }


# ---- The gain ----


def test_the_gain_is_the_difference_to_the_baseline(trained, tmp_path):
    last = trained.state.log_history[-1]
    alone = {"eval_loss": 2.0, "eval_student_accuracy": 0.25, "eval_agreement": 0.5, "eval_runtime": 3.0}
    (tmp_path / "all_results.json").write_text(json.dumps(alone))
    by_name = {"teacher": {"eval_loss": 2.0}, "student": {"accuracy": 0.25}}
    for baseline in (alone, tmp_path, tmp_path / "all_results.json", by_name):
        cards = cards_of(trained, baseline=baseline)
        loss, accuracy = last["eval_loss"], last["eval_student_accuracy"]
        assert rows_below(cards["teacher"], "Gain over the baseline")[1:] == [
            ["loss", "2.0000", f"{loss:.4f}", f"{loss - 2:+.4f}"]
        ]
        assert rows_below(cards["student"], "Gain over the baseline")[1:] == [
            ["accuracy", "0.2500", f"{accuracy:.4f}", f"{accuracy - 0.25:+.4f}"]
        ]
        assert "Lower is better: loss." in cards["teacher"]
        assert "Lower is better" not in cards["student"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baseline": {"pupil": {"loss": 1.0}}}, r"baseline.*pupil.*teacher.*student"),
        ({"baseline": "nowhere.json"}, r"baseline.*nowhere\.json.*all_results"),
        ({"baseline": 0.8}, r"baseline=0\.8.*float"),
        ({"finetuned_from": {"pupil": "a/b"}}, r"finetuned_from.*pupil.*teacher"),
    ],
)
def test_a_baseline_or_origin_that_fits_no_model_is_refused_before_a_card_is_written(options, words, tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=words):
        trainer.create_model_card(**options)
    assert not (tmp_path / "README.md").exists()


# ---- Where the models came from, and what is nobody's business ----


def test_each_card_names_the_base_of_its_own_model(tmp_path):
    teacher, student = tiny_bert(3, 1), tiny_bert(2, 2)
    teacher.config._name_or_path, student.config._name_or_path = "google-bert/bert-base-uncased", "distilbert"
    cards = cards_of(tiny_trainer(tmp_path, model=teacher, student_model=student))
    assert metadata_of(cards["teacher"]).base_model == "google-bert/bert-base-uncased"
    assert metadata_of(cards["student"]).base_model == "distilbert"
    given = cards_of(
        tiny_trainer(tmp_path, model=teacher, student_model=student),
        finetuned_from={"teacher": "", "student": "me/other"},
    )
    assert metadata_of(given["teacher"]).base_model is None
    assert "trained from scratch" in given["teacher"].split("\n- Its partner")[0]
    assert metadata_of(given["student"]).base_model == "me/other"


@pytest.mark.parametrize("folder", ["cellar", "cellar/start", "../here/cellar"])
def test_nothing_of_the_machine_and_no_secret_is_in_a_card(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cellar" / "start").mkdir(parents=True)
    teacher, student = tiny_bert(3, 1), tiny_bert(2, 2)
    teacher.config._name_or_path, student.config._name_or_path = str(tmp_path / "gone"), folder
    trainer = tiny_trainer(
        tmp_path / "out",
        model=teacher,
        student_model=student,
        hub_token="hf_abcdefghijk",
        run_name=str(tmp_path),
        optim_args=f"file={tmp_path}/x",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 0.001, "note": f"{tmp_path}/y", "api_key": "sesame"},
    )
    for text in cards_of(trainer, dataset=f"{tmp_path}/reviews", dataset_tags=str(tmp_path / "cellar")).values():
        assert str(tmp_path) not in text
        for secret in ("abcdefghijk", "cellar", "gone", "sesame", "optim_args", "run_name"):
            assert secret not in text
        assert "- `lr_scheduler_type`: `cosine_with_min_lr`" in text
        assert "the data set reviews" in text
        assert "the weights of a model that is not on the Hub" in text
        assert metadata_of(text).base_model is None


def test_the_arguments_are_those_that_are_not_at_their_default(trained):
    text = cards_of(trained)["student"].split("### Arguments")[1].split("\n## ")[0]
    listed = dict(re.findall(r"- `(\w+)`: `(.*)`", text))
    expected = {
        "temperature": "2.0",
        "seed": "7",
        "max_steps": "25",
        "learning_rate": "0.01",
        "eval_strategy": "steps",
    }
    assert expected.items() <= listed.items()
    assert not {"weight_decay", "student_from_teacher_weight", "output_dir", "accelerator_config"} & listed.keys()


def test_no_argument_outside_of_the_white_list_is_shown(tmp_path):
    trainer = tiny_trainer(tmp_path)
    for field in dataclasses.fields(trainer.args):
        if isinstance(getattr(trainer.args, field.name), str):
            object.__setattr__(trainer.args, field.name, f"secret of {field.name}")
    shown = trainer._card_facts().shown_arguments
    choices = {"distillation_mode", "soft_loss", "lr_scheduler_type", "optim", "eval_strategy", "share"}
    choices |= {"feature_loss", "feature_source"}
    assert {name for name, value in shown.items() if "secret" in value} <= choices  # a path is refused for these


def test_a_weight_of_zero_is_an_argument_but_the_weights_of_the_mode_are_none(tmp_path):
    trainer = tiny_trainer(tmp_path, distillation_mode="kd", student_hard_weight=0.0, student_weight_decay=0.0)
    cards = cards_of(trainer)
    for text in cards.values():
        assert "- `student_hard_weight`: `0.0`" in text
        assert "- `student_weight_decay`: `0.0`" in text
        assert "_from_" not in text.split("### Arguments")[1]
        assert "The teacher is frozen: the training does not change it." in text
        assert "The student learns from the predictions of the teacher (weight 1)." in text
        assert set(metadata_of(text).tags) == {"generated_from_trainer", "knowledge-distillation"}
    trainer = tiny_trainer(tmp_path, distillation_mode="kd", student_feature_weight=0.5, feature_layers="0:1")
    text = cards_of(trainer)["student"]
    assert "of the teacher (weight 1) and from the layers of the teacher (weight 0.5)." in text
    assert "- `feature_layers`: `0:1`" in text


def test_cards_tell_what_weighs_a_soft_loss(tmp_path):
    settings = {
        "student_from_teacher_gate": "wsl",
        "student_from_teacher_schedule": "fall:0.4",
        "eval_strategy": "epoch",
    }
    edges = {"student->teacher": {"weight": "auto", "temperature": 2.0}}
    text = cards_of(tiny_trainer(tmp_path, eval_dataset=tiny_rows(4), edges=edges, **settings))["teacher"]
    assert "the predictions of the student (weight from held-out rows)" in text
    assert "the predictions of the teacher (weight 1, schedule fall:0.4, gate wsl)" in text
    assert "- `student_from_teacher_gate`: `wsl`" in text
    assert "- `edges`: `{'student->teacher': {'weight': 'auto', 'temperature': 2.0}}`" in text


def test_a_pair_without_distillation_is_not_called_distilled(tmp_path):
    for text in cards_of(tiny_trainer(tmp_path, distillation_mode="standalone")).values():
        assert "without\ndistillation" in text
        assert metadata_of(text).tags == ["generated_from_trainer"]


# ---- The partner, and how to load ----


def test_the_cards_link_to_each_other_by_repository_or_by_place(tmp_path):
    here = cards_of(tiny_trainer(tmp_path))
    assert "[`student`](student/README.md)" in here["teacher"]
    assert "[`..`](../README.md)" in here["student"]
    hub = cards_of(tiny_trainer(tmp_path, hub_model_id="me/pair"))
    assert "(https://huggingface.co/me/pair-student)" in hub["teacher"]
    assert "(https://huggingface.co/me/pair)" in hub["student"]
    assert 'from_pretrained("me/pair")' in hub["teacher"]
    assert 'from_pretrained("me/pair-student")' in hub["student"]
    named = cards_of(tiny_trainer(tmp_path, hub_model_id="me/pair", student_hub_model_id="org/small"))
    assert "(https://huggingface.co/org/small)" in named["teacher"]
    assert "\n# small\n" in named["student"]


def test_the_code_loads_model_and_tokenizer_and_predicts(trained, monkeypatch, capsys):
    for name, text in cards_of(trained).items():
        monkeypatch.chdir(root_of(trained.args.output_dir, name))
        loaded = {}
        exec(code_of(text), loaded)
        assert_same_weights(loaded["model"], trained.pair.learners[name])
        assert loaded["tokenizer"].get_vocab() == trained.processing_class.get_vocab()
        assert "'label': 'LABEL_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "head", "tag"),
    [
        ("bert", "masked-lm", "fill-mask"),
        ("gpt2", "causal-lm", "text-generation"),
        ("t5", "seq2seq-lm", "text2text-generation"),
        ("distilbert", "token-classification", "token-classification"),
        ("electra", "question-answering", "question-answering"),
        ("vit", "image-classification", "image-classification"),
    ],
)
def test_every_head_has_a_card_whose_code_loads_it(family, head, tag, tmp_path, monkeypatch):
    rows = rows_of(tiny_batch(head))
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model(family, head, 2, seed=1),
        student_model=tiny_model(family, head, 1, seed=2),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        max_steps=1,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    cards = cards_of(trainer)
    for name, text in cards.items():
        monkeypatch.chdir(root_of(tmp_path, name))
        loaded = {}
        exec(code_of(text), loaded)
        assert_same_weights(loaded["model"], trainer.pair.learners[name])
        data = metadata_of(text)
        assert data.pipeline_tag == tag
        found = {result.metric_type: result.metric_value for result in data.eval_results}
        prefix = "eval_student_" if name == "student" else "eval_"
        assert found["loss"] == metrics[f"{prefix}loss"]
        if head.endswith("-lm"):
            assert found["perplexity"] == pytest.approx(np.exp(metrics[f"{prefix}loss"]))
            assert data.metrics == ["perplexity"]


def test_adapters_are_loaded_on_the_model_that_they_need(tmp_path, monkeypatch):
    def adapted(model):
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))

    trainer = tiny_trainer(tmp_path, student_model=adapted(tiny_bert(2, 2)), eval_dataset={"dev": tiny_rows(6)})
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    assert "ctcd_trainer" in (tmp_path / "student/README.md").read_text()  # and not PEFT's empty one
    cards = cards_of(trainer)
    assert metadata_of(cards["teacher"]).library_name == "transformers"
    data = metadata_of(cards["student"])
    assert data.library_name == "peft"
    assert "lora" in data.tags
    assert "dev loss | " in cards["student"]
    assert f"{metrics['eval_dev_student_loss']:.4f}" in cards["student"]
    assert [result.metric_value for result in data.eval_results] == [metrics["eval_dev_student_loss"]]
    monkeypatch.chdir(tmp_path / "student")
    loaded = {"base_model": tiny_bert(2, 2)}
    exec(code_of(cards["student"]), loaded)
    assert_same_weights(loaded["model"], trainer.student_model)


def test_the_code_loads_a_feature_extractor(tmp_path, monkeypatch):
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model("wav2vec2", "audio-classification", 2),
        student_model=tiny_model("wav2vec2", "audio-classification", 1),
        processing_class=Wav2Vec2FeatureExtractor(sampling_rate=8000),
    )
    trainer.save_model()
    for name, text in read_cards(tmp_path).items():
        monkeypatch.chdir(root_of(tmp_path, name))
        loaded = {}
        exec(code_of(text), loaded)
        assert loaded["processor"].sampling_rate == 8000


def test_an_adapter_of_a_model_on_the_hub_names_it_in_the_code(tmp_path):
    base = tiny_bert(2, 2)
    base.config._name_or_path = "google-bert/bert-base-uncased"
    student = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    text = cards_of(tiny_trainer(tmp_path, student_model=student))["student"]
    assert 'ForSequenceClassification.from_pretrained("google-bert/bert-base-uncased", num_labels=3)' in code_of(text)
    assert metadata_of(text).base_model == "google-bert/bert-base-uncased"
    compile(code_of(text), "card", "exec")


# ---- What is not there ----


def test_without_an_evaluation_there_is_no_result_and_the_card_says_so(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    for text in cards_of(trainer).values():
        data = metadata_of(text)
        assert (data.eval_results, data.metrics, data.datasets) == (None, None, None)
        assert "## Results" not in text
        assert "It was not evaluated." in text


def test_a_regression_has_no_agreement(tmp_path):
    trainer = tiny_trainer(tmp_path, "regression", eval_dataset=tiny_rows(6, "regression"))
    trainer.train()
    trainer.evaluate()
    for text in cards_of(trainer).values():
        assert "scored positions" not in text
        assert [row[0] for row in rows_below(text, "Results")] == ["metric", "loss"]


# ---- The figure ----


def test_a_figure_is_beside_each_card_with_a_text_that_says_what_it_shows(trained, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(model_card, "draw_curves", draw_curves)
    accuracy = trained.state.log_history[-1]["eval_student_accuracy"]
    for name, text in cards_of(trained, baseline={"student": {"accuracy": 0.125}}).items():
        [(words, file)] = re.findall(r"!\[(.+)\]\((.+)\)", text)
        assert file == model_card.FIGURE
        assert f"validation accuracy of the student {accuracy:.4f}; its baseline 0.1250" in words
        pixels = image.imread(root_of(trained.args.output_dir, name) / file)[..., :3]
        assert pixels.std() > 0.05
        assert pixels.shape[1] > 1000


def test_without_matplotlib_a_card_has_no_figure_and_says_nothing_of_it(trained, monkeypatch):
    monkeypatch.setattr(model_card, "draw_curves", draw_curves)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for text in cards_of(trained).values():
        assert "png" not in text
        assert "matplotlib" not in text.lower()


# ---- Cards of saves ----


def test_every_checkpoint_has_a_short_card_of_each_model_with_its_own_metrics(tmp_path):
    trainer = tiny_trainer(
        tmp_path, eval_dataset=tiny_rows(6), eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2
    )
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    for step in (2, 4):
        for text in read_cards(tmp_path / f"checkpoint-{step}").values():
            losses = [f"{logged[step][key]:.4f}" for key in ("eval_loss", "eval_student_loss")]
            assert rows_below(text, "Results")[1] == ["loss", *losses]
            assert metadata_of(text).eval_results
            assert "atency" not in text


def test_a_save_replaces_its_own_short_card_but_no_other(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    assert "Nothing was trained" in (tmp_path / "README.md").read_text()
    trainer.train()
    trainer.save_model()
    assert "5 optimizer steps" in (tmp_path / "README.md").read_text()
    trainer.create_model_card(license="mit")
    (tmp_path / "student/README.md").write_text("Mine.")
    trainer.save_model()
    assert "license: mit" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "student/README.md").read_text() == "Mine."


def test_a_card_that_cannot_be_made_costs_no_save(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path)
    monkeypatch.setattr(Results, "of", lambda *args: 1 / 0)
    trainer.save_model()
    assert (tmp_path / "student/model.safetensors").exists()
    assert not (tmp_path / "README.md").exists()


def test_cards_need_no_trainer_and_any_number_of_learners_has_one(tmp_path):
    learners = {"teacher": tiny_bert(3, 1), "student": tiny_bert(2, 2), "tiny": tiny_bert(1, 3)}
    args = tiny_args(tmp_path)
    state = TrainerState(log_history=[{"step": 1, "eval_loss": 1.0, "eval_student_loss": 2.0, "eval_tiny_loss": 3.0}])
    facts = CardFacts(learners, find_task(learners["teacher"]), args, args, state, {"tiny": "me/tiny"}, {})
    model_card.write_model_cards(facts, tmp_path, complete=False)
    for name, folder in (("teacher", ""), ("student", "student"), ("tiny", "tiny")):
        text = (tmp_path / folder / "README.md").read_text()
        assert f"**{name}** (this model)" in text
        assert rows_below(text, "Results")[1] == ["loss", "1.0000", "2.0000", "3.0000"]
        assert text.count("\n- Its partner is ") == 2
        assert ("[me/tiny](https://huggingface.co/me/tiny)" in text) == (name != "tiny")


def test_without_a_student_the_card_is_trainers_own(tmp_path):
    trainer = tiny_trainer(tmp_path, student_model=None, distillation_mode="standalone")
    trainer.create_model_card()
    assert "Training procedure" in (tmp_path / "README.md").read_text()
