"""The scripts of language models and what they are made of, on tiny models and texts, without a network."""

import json
import math
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from places import ROOT
from safetensors.torch import load_file
from script_runs import printed_table, results, run_script
from script_texts import save_files, save_model, save_texts, texts
from tiny_tokenizer import tiny_tokenizer
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
)

from examples import run_clm_ctcd, run_mlm_ctcd
from examples.common import models as script_models
from examples.common.arguments import LanguageModelArguments
from examples.common.language_models import student_blueprint, teacher_blueprint
from examples.data import text as language_model_data
from examples.data.loading import load_raw_data
from examples.data.text import Blocks, Lines, TextArguments

BERT = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32,max_position_embeddings=32"
LLAMA = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,num_key_value_heads=2,intermediate_size=32"


# ---- Models and data ----


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture
def run(tmp_path: Path):
    """Runs a script on examples of 16 tokens."""

    def start(script: ModuleType, *arguments: str, **options: object) -> Path:
        length = {"max_seq_length" if script is run_mlm_ctcd else "block_size": 16}
        return run_script(script, *arguments, **{"output_dir": tmp_path / "out", **length, **options})

    return start


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def blocks_of(tokenizer, rows: list[str], length: int) -> torch.Tensor:
    """Blocks of joined texts, written out."""
    ids = [index for row in rows for index in tokenizer(row)["input_ids"]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


# ---- Both scripts ----


def test_causal_models_reload_to_the_metrics_that_were_written(run, tmp_path, gpt2, capsys):
    out = run(
        run_clm_ctcd,
        "--do_train",
        "--do_eval",
        model_name_or_path=gpt2,
        student_num_hidden_layers=1,
        per_device_eval_batch_size=1,
        **save_files(tmp_path),
    )
    found = results(out)
    predictions = []
    for folder, prefix, layers in ((out, "eval_", 3), (out / "student", "eval_student_", 1)):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.num_hidden_layers == layers
        ids = blocks_of(tokenizer, texts(20, seed=1), 16)
        assert found["eval_samples"] == len(ids) > 5
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        targets = ids[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        predictions.append(logits.argmax(-1))
        assert found[f"{prefix}loss"] == pytest.approx(loss, rel=1e-4)
        assert found[f"{prefix}perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
        assert found[f"{prefix}accuracy"] == pytest.approx((predictions[-1] == targets).float().mean().item())
    assert found["eval_agreement"] == pytest.approx((predictions[0] == predictions[1]).float().mean().item())
    assert results(out, "all") == results(out, "train") | found
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2

    lines = printed_table(capsys.readouterr().out)
    assert lines[0] == ["teacher", "student"]
    assert {line[0] for line in lines[1:]} == {"parameters", "loss", "accuracy", "perplexity", "agreement"}
    perplexity = next(line for line in lines if line[0] == "perplexity")
    assert perplexity[1:] == [f"{found[key]:.4f}" for key in ("eval_perplexity", "eval_student_perplexity")]


@pytest.mark.parametrize("options", [("--line_by_line",), ("--line_by_line", "--pad_to_max_length"), ()], ids=str)
def test_masked_models_are_trained_and_saved(run, tmp_path, bert, options):
    model = {"model_name_or_path": bert, "student_num_hidden_layers": 2}
    out = run(run_mlm_ctcd, "--do_train", "--do_eval", *options, **model, **save_files(tmp_path))
    found = results(out)
    tokens = blocks_of(tiny_tokenizer("bert"), texts(20, seed=1), 16)
    assert found["eval_samples"] == (20 if options else len(tokens))
    for folder, prefix, layers in ((out, "eval_", 3), (out / "student", "eval_student_", 2)):
        weights = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        assert config_of(folder)["num_hidden_layers"] == layers
        before = AutoModelForMaskedLM.from_pretrained(bert).state_dict()["bert.embeddings.word_embeddings.weight"]
        assert not torch.equal(weights["bert.embeddings.word_embeddings.weight"], before)
        assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
        assert found[f"{prefix}perplexity"] == pytest.approx(math.exp(found[f"{prefix}loss"]), rel=1e-6)
        assert 0 <= found[f"{prefix}accuracy"] <= 1


def test_masked_models_are_scored_at_the_masked_tokens(run, tmp_path, bert, monkeypatch):
    always_the_same = partial(DataCollatorForLanguageModeling, seed=0)
    monkeypatch.setattr(run_mlm_ctcd, "DataCollatorForLanguageModeling", always_the_same)
    student = save_model(tmp_path / "student", "bert", layers=1, seed=1)
    options = {"student_model_name_or_path": student, "mlm_probability": 0.4, "per_device_eval_batch_size": 99}
    found = results(run(run_mlm_ctcd, "--do_eval", model_name_or_path=bert, **options, **save_files(tmp_path)))

    tokenizer = tiny_tokenizer("bert")
    rows = [{"input_ids": ids} for ids in blocks_of(tokenizer, texts(20, seed=1), 16).tolist()]
    batch = always_the_same(tokenizer, mlm_probability=0.4)(rows)
    masked = batch["labels"] != -100
    assert 0.3 < masked.float().mean() < 0.5
    for folder, prefix in ((bert, "eval_"), (student, "eval_student_")):
        with torch.no_grad():
            logits = AutoModelForMaskedLM.from_pretrained(folder)(batch["input_ids"]).logits[masked]
        loss = F.cross_entropy(logits, batch["labels"][masked]).item()
        accuracy = (logits.argmax(-1) == batch["labels"][masked]).float().mean().item()
        assert found[f"{prefix}loss"] == pytest.approx(loss, rel=1e-5)
        assert found[f"{prefix}perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found[f"{prefix}accuracy"] == pytest.approx(accuracy)


def test_from_scratch_the_students_config_is_the_teachers_but_for_what_is_given(run, tmp_path, bert):
    out = run(
        run_mlm_ctcd,
        "--do_train",
        "--do_eval",
        model_type="bert",
        tokenizer_name=bert,
        config_overrides=f"{BERT},hidden_act=relu",
        student_config_overrides="num_hidden_layers=1,hidden_size=8",
        **save_files(tmp_path),
    )
    teacher, student = config_of(out), config_of(out / "student")
    assert (teacher["num_hidden_layers"], teacher["hidden_size"]) == (3, 16)
    assert (student["num_hidden_layers"], student["hidden_size"]) == (1, 8)
    for name in ("hidden_act", "intermediate_size", "max_position_embeddings", "vocab_size"):
        assert teacher[name] == student[name]
    assert teacher["hidden_act"] == "relu"
    assert teacher["vocab_size"] == len(tiny_tokenizer("bert"))
    assert {"eval_perplexity", "eval_student_perplexity"} <= set(results(out))


def test_a_student_is_cut_from_a_teacher_on_its_way(run, tmp_path, bert):
    options = {"model_type": "gpt2", "tokenizer_name": bert, "config_overrides": "n_layer=3,n_embd=16,n_head=2"}
    options |= {"student_num_hidden_layers": 2, "warm_start_steps": 3, **save_files(tmp_path)}
    out = run(run_clm_ctcd, "--do_train", "--do_eval", **options, distillation_mode="kd", save_strategy="steps")
    assert config_of(out / "student")["n_layer"] == 2
    assert results(out, "all")["warm_start_steps"] == 3
    assert {"eval_perplexity", "eval_student_perplexity"} <= results(out).keys()


def test_a_pretrained_teacher_with_a_student_of_another_architecture_from_scratch(run, tmp_path, bert):
    options = {"model_name_or_path": bert, "student_model_type": "distilbert"}
    overrides = "n_layers=1,dim=8,n_heads=2,hidden_dim=16,max_position_embeddings=32"
    out = run(run_mlm_ctcd, "--do_train", student_config_overrides=overrides, **options, **save_files(tmp_path))
    student = config_of(out / "student")
    assert (student["model_type"], student["dim"], student["vocab_size"]) == (
        "distilbert",
        8,
        len(tiny_tokenizer("bert")),
    )
    assert (student["pad_token_id"], student["dropout"]) == (tiny_tokenizer("bert").pad_token_id, 0.1)


def test_a_model_starts_the_same_alone_and_with_another(run, tmp_path, gpt2):
    """Trained alone, or beside another with no soft loss, both from scratch: the same weights."""
    options = {"model_type": "llama", "tokenizer_name": gpt2, "distillation_mode": "standalone"}
    options |= {"config_overrides": LLAMA, **save_files(tmp_path)}
    options["adam_epsilon"] = 1e-4  # gradients that are zero but for rounding must not become steps
    student = {"student_config_overrides": "num_hidden_layers=1"}
    both = run(run_clm_ctcd, "--do_train", output_dir=tmp_path / "both", **student, **options)
    for overrides, folder in ((LLAMA, both), (f"{LLAMA},num_hidden_layers=1", both / "student")):
        alone = run(run_clm_ctcd, "--do_train", "--do_eval", **{**options, "config_overrides": overrides})
        assert results(alone)["eval_perplexity"] == pytest.approx(math.exp(results(alone)["eval_loss"]))
        assert "eval_student_loss" not in results(alone)
        actual, expected = (load_file(path / "model.safetensors") for path in (folder, alone))
        assert actual.keys() == expected.keys()
        assert all(torch.allclose(actual[name], expected[name], atol=1e-5) for name in expected)


def test_frozen_models_teach_what_they_were_trained_for(run, tmp_path, gpt2):
    before = load_file(Path(gpt2) / "model.safetensors")
    options = {"model_name_or_path": gpt2, "student_config_overrides": "n_layer=1", **save_files(tmp_path)}
    out = run(run_clm_ctcd, "--do_train", distillation_mode="kd", **options)
    assert all(torch.equal(value, before[name]) for name, value in load_file(out / "model.safetensors").items())

    third = save_model(tmp_path / "third", seed=5)
    options |= {"distillation_mode": "community", "pretrained_teacher_name_or_path": third}
    out = run(run_clm_ctcd, "--do_train", logging_steps=1, **options)
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["student_from_pretrained_loss"] > 0


def test_the_dtype_is_that_of_both_models(run, tmp_path, gpt2):
    options = {"model_name_or_path": gpt2, "student_config_overrides": "n_layer=1", **save_files(tmp_path)}
    out = run(run_clm_ctcd, "--do_train", dtype="bfloat16", **options)
    for folder in (out, out / "student"):
        assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_a_stream_gives_the_same_models(run, tmp_path, gpt2):
    files = save_files(tmp_path)
    options = {"model_name_or_path": gpt2, "student_num_hidden_layers": 1, "max_train_samples": 8, **files}
    options |= {"train_sampling_strategy": "sequential"}
    outputs = [
        run(run_clm_ctcd, "--do_train", "--do_eval", *stream, output_dir=tmp_path / f"out{len(stream)}", **options)
        for stream in ((), ("--streaming",))
    ]
    for folder in ("", "student"):
        first, second = (load_file(out / folder / "model.safetensors") for out in outputs)
        assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("eval_loss", "eval_student_loss", "eval_accuracy"):
        assert results(outputs[0])[key] == pytest.approx(results(outputs[1])[key])
    assert results(outputs[0], "train")["train_samples"] == 8
    assert "train_samples" not in results(outputs[1], "train")  # a stream has no length


def test_config_file(tmp_path, bert, capsys):
    arguments = {
        "model_name_or_path": bert,
        "student_num_hidden_layers": 1,
        **save_files(tmp_path),
        "max_steps": 1,
        "do_train": True,
        "do_eval": True,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    run_mlm_ctcd.main([str(tmp_path / "arguments.json")])
    assert "perplexity" in capsys.readouterr().out


# ---- Data ----


@pytest.mark.parametrize("suffix", ["txt", "csv", "json", "jsonl", "parquet"])
def test_files_of_every_kind(tmp_path, suffix):
    data_args = TextArguments(**save_files(tmp_path, suffix))
    models = SimpleNamespace(cache_dir=str(tmp_path / "cache"))
    raw = load_raw_data(models, data_args, streaming=False)
    splits = language_model_data.select_splits(raw, data_args, SimpleNamespace(do_train=True, do_eval=True))
    assert splits["train"].column_names == ["text"]
    assert list(splits["train"]["text"]) == texts(60)
    assert list(splits["validation"]["text"]) == texts(20, seed=1)


@pytest.mark.parametrize("keep", [True, False])
def test_causal_models_learn_line_breaks_unless_told_not_to(tmp_path, keep):
    options = {"keep_linebreaks": keep, "train_file": save_texts(tmp_path / "train.txt", ["the cat", "the dog"])}
    data_args = run_clm_ctcd.CausalTextArguments(**options)
    raw = load_raw_data(SimpleNamespace(cache_dir=str(tmp_path / "cache")), data_args)
    assert next(iter(raw["train"]["text"])) == ("the cat\n" if keep else "the cat")


def test_the_column_of_text(tmp_path):
    rows = Dataset.from_dict({"review": ["a"], "text": ["b"]})
    training_args = SimpleNamespace(do_train=True, do_eval=False)

    def chosen(rows: Dataset, **options: str) -> list[str]:
        data_args = TextArguments(dataset_name="x", **options)
        return list(
            language_model_data.select_splits(DatasetDict(train=rows), data_args, training_args)["train"]["text"]
        )

    assert chosen(rows) == ["b"]
    assert chosen(rows, text_column_name="review") == ["a"]
    assert chosen(rows.remove_columns("text")) == ["a"]
    with pytest.raises(ValueError, match=r"`--text_column_name body`: .* only \['review', 'text'\]"):
        chosen(rows, text_column_name="body")


def test_without_validation_texts_the_first_part_of_the_training_texts_is_kept_from_training():
    raw = DatasetDict(train=Dataset.from_dict({"text": [str(i) for i in range(40)]}))
    data_args = TextArguments(dataset_name="x", validation_split_percentage=10)
    splits = language_model_data.select_splits(raw, data_args, SimpleNamespace(do_train=True, do_eval=True))
    assert list(splits["validation"]["text"]) == ["0", "1", "2", "3"]
    assert list(splits["train"]["text"]) == [str(i) for i in range(4, 40)]
    alone = language_model_data.select_splits(raw, data_args, SimpleNamespace(do_train=True, do_eval=False))
    assert {name: len(rows) for name, rows in alone.items()} == {"train": 40}
    data_args.validation_split_percentage = 1
    with pytest.raises(ValueError, match="`--validation_split_percentage 1` of 40 training texts is none"):
        language_model_data.select_splits(raw, data_args, SimpleNamespace(do_train=True, do_eval=True))


def test_blocks_are_the_joined_texts_without_padding():
    tokenizer = tiny_tokenizer("bert")
    rows = [*texts(5), None, ""]
    found = Blocks(tokenizer, 8, masked=True)({"text": rows})
    assert found["input_ids"] == blocks_of(tokenizer, [row or "" for row in rows], 8).tolist()
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    for ids, mask in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
        assert mask == [int(index in special) for index in ids]
    unmasked = Blocks(tokenizer, 8, masked=False)({"text": rows})
    assert unmasked.keys() == {"input_ids", "attention_mask"}  # a GPT-2 would take token types for words


def test_lines_are_cut_and_padded_one_by_one():
    tokenizer = tiny_tokenizer("bert")
    rows = ["the cat", "", "  ", None, "the red dog sees the small bird ."]
    found = Lines(tokenizer, 6, pad=False)({"text": rows})
    expected = [tokenizer(rows[index])["input_ids"] for index in (0, 4)]
    assert found["input_ids"] == [expected[0], [*expected[1][:5], tokenizer.sep_token_id]]
    padded = Lines(tokenizer, 6, pad=True)({"text": rows})["input_ids"]
    assert padded == [[*ids, *[tokenizer.pad_token_id] * (6 - len(ids))] for ids in found["input_ids"]]


def test_too_little_text_for_one_example(run, tmp_path, gpt2):
    files = {"train_file": save_texts(tmp_path / "train.txt", ["the cat"])}
    with pytest.raises(ValueError, match=r"The 1 texts of the split 'train' make no example of 16 tokens.*block_size"):
        run(run_clm_ctcd, "--do_train", model_name_or_path=gpt2, student_num_hidden_layers=1, **files)


def test_masked_training_needs_a_mask_token(run, tmp_path, gpt2):
    options = {"model_type": "bert", "tokenizer_name": gpt2, "student_num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"gpt2.* has no mask token, .* `run_clm_ctcd.py`"):
        run(run_mlm_ctcd, "--do_train", **options, **save_files(tmp_path))


# ---- Metrics ----


def test_accuracies_against_counting():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, (4, 6))
    labels[generator.random(labels.shape) < 0.4] = -100
    predictions = generator.integers(0, 3, labels.shape)

    def counted(pairs: list[tuple[int, int]]) -> float:
        scored = [(guess, label) for guess, label in pairs if label != -100]
        return sum(guess == label for guess, label in scored) / len(scored)

    cells = [(row, column) for row in range(4) for column in range(6)]
    masked = counted([(predictions[cell], labels[cell]) for cell in cells])
    shifted = counted([(predictions[row, column - 1], labels[row, column]) for row, column in cells if column > 0])
    assert masked != shifted
    prediction = EvalPrediction(predictions, labels)
    assert language_model_data.masked_accuracy(prediction) == {"accuracy": pytest.approx(masked)}
    assert language_model_data.next_token_accuracy(prediction) == {"accuracy": pytest.approx(shifted)}
    nothing = EvalPrediction(predictions, np.full_like(labels, -100))
    assert language_model_data.masked_accuracy(nothing) == {}


def test_perplexity_of_a_loss_beyond_the_numbers():
    found = language_model_data.perplexities({"eval_loss": 2.0, "eval_student_loss": 1000.0})
    assert found == {"eval_perplexity": pytest.approx(math.exp(2)), "eval_student_perplexity": math.inf}
    assert language_model_data.perplexities({"eval_loss": 0.0}) == {"eval_perplexity": 1.0}


# ---- Configs ----


@pytest.mark.parametrize(
    ("model_type", "overrides", "student"),
    [
        ("qwen3", "num_hidden_layers=4,hidden_size=16,head_dim=8", "num_hidden_layers=2"),  # `layer_types`
        ("gpt2", "num_hidden_layers=4", "n_layer=2"),  # another name for the same setting
        ("llama", "num_hidden_layers=4,hidden_size=64,num_attention_heads=4", "hidden_size=32,num_hidden_layers=2"),
    ],
)
def test_settings_that_follow_from_others_follow_the_overrides(model_type, overrides, student):
    options = {"config_overrides": overrides, "student_config_overrides": student, "tokenizer_name": "x"}
    model_args = LanguageModelArguments(model_type=model_type, **options)
    tokenizer = tiny_tokenizer("gpt2")
    teacher, student = (make(model_args, tokenizer).build() for make in (teacher_blueprint, student_blueprint))
    assert (teacher.num_hidden_layers, student.num_hidden_layers) == (4, 2)
    for config in (teacher, student):
        assert config.vocab_size == len(tokenizer)
        assert config.eos_token_id == tokenizer.eos_token_id
        assert len(getattr(config, "layer_types", None) or range(config.num_hidden_layers)) == config.num_hidden_layers
    if model_type == "llama":
        assert (teacher.head_dim, student.head_dim) == (16, 8)


def test_entries_of_each_layer_follow_the_number_of_layers_of_a_named_config(tmp_path):
    Qwen3Config(num_hidden_layers=3, hidden_size=16).save_pretrained(tmp_path)
    options = {"config_overrides": "num_hidden_layers=2", "student_config_overrides": "num_hidden_layers=5"}
    model_args = LanguageModelArguments(config_name=str(tmp_path), tokenizer_name="x", **options)
    tokenizer = tiny_tokenizer("gpt2")
    teacher, student = (make(model_args, tokenizer).build() for make in (teacher_blueprint, student_blueprint))
    assert [len(config.layer_types) for config in (teacher, student)] == [2, 5]


def test_a_named_config_keeps_its_vocabulary(tmp_path):
    LlamaConfig(vocab_size=128, num_hidden_layers=3, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    options = {"config_name": str(tmp_path), "config_overrides": "num_hidden_layers=2", "tokenizer_name": "x"}
    model_args = LanguageModelArguments(**options, student_config_name=str(tmp_path))
    teacher, student = (
        make(model_args, tiny_tokenizer("gpt2")).build() for make in (teacher_blueprint, student_blueprint)
    )
    assert (teacher.vocab_size, teacher.num_hidden_layers) == (128, 2)
    assert (student.vocab_size, student.num_hidden_layers) == (128, 3)


def test_a_config_from_a_saved_model_is_no_longer_about_that_model(gpt2):
    overrides = {"student_config_overrides": "num_hidden_layers=2"}  # GPT-2's own name for it is `n_layer`
    model_args = LanguageModelArguments(model_name_or_path=gpt2, **overrides)
    saved = AutoConfig.from_pretrained(gpt2)
    student = student_blueprint(model_args, tiny_tokenizer("gpt2")).build()
    assert (saved.name_or_path, saved.architectures) == (gpt2, ["GPT2LMHeadModel"])
    assert (student.name_or_path, student.architectures) == ("", None)
    assert (student.n_layer, student.n_embd) == (2, 16)


def test_embeddings_grow_to_the_tokenizer(run, tmp_path):
    model = save_model(tmp_path / "model")
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "more")
    options = {"model_name_or_path": model, "student_model_name_or_path": save_model(tmp_path / "s", layers=1, seed=1)}
    out = run(run_clm_ctcd, "--do_train", tokenizer_name=tmp_path / "more", **options, **save_files(tmp_path))
    assert [config_of(folder)["vocab_size"] for folder in (out, out / "student")] == [len(tokenizer)] * 2


def test_the_length_is_limited_by_tables_of_positions_and_rotary_configs(caplog):
    tokenizer = tiny_tokenizer("gpt2")
    small = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, bos_token_id=0, eos_token_id=0, n_embd=8, n_layer=1, n_head=1, n_positions=48)
    )
    llama = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=8, max_position_embeddings=40))
    models = {"model": gpt2, "student_model": llama}
    assert script_models.allowed_length("block_size", None, tokenizer, models) == 40
    assert script_models.allowed_length("block_size", None, tokenizer, {"model": gpt2}) == 48
    assert not caplog.text
    assert script_models.allowed_length("block_size", 64, tokenizer, models) == 40
    assert "`--block_size 64` is more than `student_model` allows. Using 40." in caplog.text


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": None}, "There is no teacher: give `--model_name_or_path`, or .* `--model_type`"),
        ({"config_overrides": "n_layer=1"}, "`--config_overrides n_layer=1` .* `--model_name_or_path no/model`"),
        ({"model_name_or_path": None, "model_type": "gpt2"}, "needs a tokenizer for both models: give `--tokenizer_n"),
        (
            {"student_config_overrides": "n_layer=1"},
            "`--student_num_hidden_layers` gives a student with weights and `--student_config_overrides` one from s",
        ),
        ({"student_model_type": "gpt2", "student_config_name": "x"}, "both give a config: choose one"),
        ({"student_num_hidden_layers": None}, "needs a student: give .* or `--student_config_overrides`"),
        (
            {"model_name_or_path": None, "model_type": "gpt2", "tokenizer_name": "x", "distillation_mode": "kd"},
            "`--distillation_mode kd` freezes the teacher, which would be made from scratch: .* `--model_name_or_p",
        ),
        (
            {"student_num_hidden_layers": None, "student_model_type": "gpt2", "distillation_mode": "reversed"},
            "freezes the student, which would be made from scratch: .* `--student_model_name_or_path`",
        ),
        ({"train_file": None}, "There is no data: give `--dataset_name`, or `--train_file`"),
        ({"dataset_name": "x"}, "`--train_file` is given beside `--dataset_name`: choose one"),
        ({"train_file": "t.xml"}, r"`--train_file t.xml` is not supported: .*\.parquet, \.txt"),
        ({"train_file": "t.txt"}, "`--train_file t.txt` does not exist"),
        ({"validation_split_percentage": 100}, "`--validation_split_percentage 100` is not valid: .* 1 to 99"),
    ],
)
@pytest.mark.parametrize("script", [run_clm_ctcd, run_mlm_ctcd], ids=["clm", "mlm"])
def test_bad_arguments(run, tmp_path, script, options, message):
    options = {
        "model_name_or_path": "no/model",
        "student_num_hidden_layers": 1,
        "train_file": save_texts(tmp_path / "train.txt", texts(4)),
        **options,
    }
    with pytest.raises(ValueError, match=message):
        run(script, "--do_train", **options)


@pytest.mark.parametrize("probability", [0, 1.5])
def test_bad_share_of_masked_tokens(run, tmp_path, probability):
    options = {"model_name_or_path": "no/model", "student_num_hidden_layers": 1, "mlm_probability": probability}
    with pytest.raises(ValueError, match=rf"`--mlm_probability {float(probability)}` is not valid"):
        run(run_mlm_ctcd, "--do_train", **options, **save_files(tmp_path))


@pytest.mark.parametrize("overrides", ["n_layer=two", "n_layers_of_it=2", "n_layer", "n_layer=2, n_head=2"])
def test_bad_overrides(overrides):
    model_args = LanguageModelArguments(model_type="gpt2", tokenizer_name="x", student_config_overrides=overrides)
    with pytest.raises(
        ValueError, match=rf"`--student_config_overrides {overrides}` does not fit a GPT2Config: .*pairs"
    ):
        student_blueprint(model_args, tiny_tokenizer("gpt2"))


def test_unknown_architecture():
    model_args = LanguageModelArguments(model_type="gpt7", tokenizer_name="x")
    with pytest.raises(ValueError, match=r"`--model_type gpt7` is unknown. Valid types: .*gpt2"):
        teacher_blueprint(model_args, tiny_tokenizer("gpt2"))


def test_missing_splits():
    rows = Dataset.from_dict({"text": ["a"]})
    both = SimpleNamespace(do_train=True, do_eval=True)
    data_args = TextArguments(dataset_name="x")
    with pytest.raises(ValueError, match=r"`--do_train` needs the split 'train', .* only \['validation'\]"):
        language_model_data.select_splits(DatasetDict(validation=rows), data_args, both)
    data_args.streaming = True
    with pytest.raises(
        ValueError, match=r"only \['train'\]. The length of a stream is unknown, so 5 % .* `--validation_file`"
    ):
        language_model_data.select_splits(DatasetDict(train=rows), data_args, both)


# ---- Real text ----


@pytest.mark.skipif(not (ROOT.parent / "shared/data/corpus").is_dir(), reason="the corpus is not at hand")
def test_real_text(run, bert, tmp_path):
    """A folder in the Hub's layout; its training texts, of which there are many, are not tokenized."""
    folder = str(ROOT.parent / "shared/data/corpus")
    options = {"model_name_or_path": bert, "student_num_hidden_layers": 1, "dataset_name": folder}
    out = run(run_mlm_ctcd, "--do_eval", "--line_by_line", max_eval_samples=12, **options)
    assert results(out)["eval_samples"] == 12
    assert "on the data set corpus" in (out / "README.md").read_text()
