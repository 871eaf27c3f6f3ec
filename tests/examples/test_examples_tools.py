"""The tools around the examples: the generator of the demo's data, the comparison of runs, the benchmark."""

import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from places import EXAMPLES, ROOT
from processes import run_python
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tiny import tiny_bert

from examples.benchmarks import bench_sequence_classification as benchmark
from examples.demo import compare_runs as comparison
from examples.demo import make_negation_data as generator


def call(monkeypatch, module: ModuleType, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


# ---- All scripts ----

#: Starts each script in turn, as `python path/to/script.py --help` does, in a process whose path lacks the repository.
START = """
import os, runpy, sys
root, *scripts = sys.argv[1:]
sys.path = [folder for folder in sys.path if os.path.realpath(folder) != root]
for script in scripts:
    for name in [name for name in sys.modules if name.split(".")[0] == "examples"]:
        del sys.modules[name]
    before, sys.argv = list(sys.path), [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code in (None, 0), script
    sys.path = before
"""


def test_every_script_starts_from_any_folder(tmp_path):
    scripts = [*EXAMPLES.glob("run_*.py"), *EXAMPLES.glob("benchmarks/bench_*.py"), *EXAMPLES.glob("demo/[a-z]*.py")]
    assert len(scripts) == 5 + 5 + 2
    done = run_python("-c", START, ROOT.resolve(), *sorted(scripts), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("usage:") == len(scripts)


# ---- make_negation_data.py ----

SIZES = {"train": 3000, "validation": 600, "test": 600}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, str]]]:
    return generator.make_splits(0, SIZES)


def meaning(clause: str) -> tuple[bool, int]:
    """Whether a clause is positive, and its intensity, read from its words alone."""
    words = clause.split()
    pairs = [pair.split("/") for aspects in generator.TOPICS.values() for _, text in aspects for pair in text.split()]
    bad, good = ({pair[index] for pair in pairs} for index in (0, 1))
    (positive,) = [word in good for word in words if word in good | bad]
    for word in words:
        positive ^= word in {"not", "never", "hardly", "nobody", "failed"}
    strong = any(word in {"extremely", "strongly", "absolutely"} for word in words)
    weak = any(word in {"little", "slightly", "somewhat"} for word in words)
    return positive, strong - weak


def label_by_rule(sentence: str) -> str:
    """The rule of the generator's docstring, applied to nothing but the text."""
    text = sentence.rstrip(".").lower()
    if match := re.fullmatch(r"(?:although|though) (.*), (.*)", text):
        deciding = match[2]
    elif match := re.fullmatch(r"(.*), (?:although|though) (.*)", text):
        deciding = match[1]
    elif match := re.fullmatch(r"(.*), (?:but|yet) (.*)", text):
        deciding = match[2]
    elif match := re.fullmatch(r"(.*) and (.*)", text):
        first, second = meaning(match[1])[1], meaning(match[2])[1]
        assert first != second
        deciding = match[1] if first > second else match[2]
    else:
        deciding = text
    return "positive" if meaning(deciding)[0] else "negative"


def test_generator_follows_its_rule(splits):
    for rows in splits.values():
        assert [label for _, label in rows] == [label_by_rule(sentence) for sentence, _ in rows]


def test_generator_is_deterministic_by_seed(splits):
    assert generator.make_splits(0, SIZES) == splits
    assert generator.make_splits(1, SIZES)["train"] != splits["train"]


def test_generator_balance_lengths_and_no_overlap(splits):
    sentences = [sentence for rows in splits.values() for sentence, _ in rows]
    assert len(set(sentences)) == len(sentences) == sum(SIZES.values())
    assert all(6 <= len(sentence.split()) <= 25 for sentence in sentences)
    for name, rows in splits.items():
        assert Counter(label for _, label in rows) == dict.fromkeys(generator.LABELS, SIZES[name] // 2)


def test_generator_cannot_be_solved_by_counting_words(splits):
    (sentences, labels), (test_sentences, test_labels) = (
        zip(*rows, strict=True) for rows in (splits["train"], splits["test"])
    )
    classifier = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(sentences, labels)
    assert classifier.score(test_sentences, test_labels) < 0.65


def test_generator_words_of_structure_say_nothing(splits):
    """Negating, contrasting and intensifying words occur about equally often with both labels."""
    words = "not never hardly nobody failed but yet although though and little slightly somewhat extremely strongly"
    for word in (*words.split(), "absolutely"):
        labels = [label for sentence, label in splits["train"] if word in re.findall(r"\w+", sentence.lower())]
        assert len(labels) > 100
        assert labels.count("positive") / len(labels) == pytest.approx(0.5, abs=0.08)


def test_generator_writes_csv_files(tmp_path, monkeypatch, capsys):
    call(monkeypatch, generator, tmp_path / "data", "--seed", 3, "--train", 20, "--validation", 10, "--test", 4)
    for name, size in {"train": 20, "validation": 10, "test": 4}.items():
        with (tmp_path / "data" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == size
        assert all(row["label"] == label_by_rule(row["sentence"]) for row in rows)
    output = capsys.readouterr().out
    assert "no real reviews" in output
    assert "20 rows, 10 negative, 10 positive" in output


# ---- compare_runs.py ----


def write_run(folder: Path, accuracy: float, student: bool = True) -> Path:
    """What a run leaves, as far as the comparison reads it."""
    models = {"": tiny_bert(2)} | ({"student": tiny_bert(1)} if student else {})
    for name, model in models.items():
        model.save_pretrained(folder / name)
    results = {"epoch": 1.0, "eval_loss": 0.4, "eval_accuracy": accuracy, "eval_runtime": 2.0, "eval_samples": 9}
    results |= {"eval_samples_per_second": 3.0, "train_loss": 0.5}
    log_history = [
        {"loss": 1.4 / step, "step": step, "epoch": step / 40} | ({"teacher_hard_loss": 0.7 / step} if student else {})
        for step in range(10, 50, 10)
    ]
    if student:
        results |= {"eval_student_loss": 0.5, "eval_student_accuracy": accuracy - 0.1, "eval_agreement": 0.8125}
        log_history = [entry | {"student_hard_loss": 0.9 / entry["step"]} for entry in log_history]
        log_history += [{key: value for key, value in results.items() if key[:5] == "eval_"} | {"step": 40}]
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log_history}))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [write_run(tmp_path / "together", 0.9), write_run(tmp_path / "alone", 0.85)]


def test_comparison_table_json_and_figure(runs, tmp_path, monkeypatch, capsys):
    figure, table = tmp_path / "figures" / "comparison.png", tmp_path / "comparison.json"
    arguments = ["--labels", "co-trained", "trained alone", "--output", figure, "--json", table]
    call(monkeypatch, comparison, *runs, *arguments, "--sequence_length", 16, "--repeats", 3)

    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == [
        *("run", "model", "parameters (M)", "on disk (MB)", "latency (ms)", "loss", "accuracy", "agreement")
    ]
    assert lines[2].split() == ["co-trained", "teacher", *lines[2].split()[2:5], "0.4000", "0.9000", "0.8125"]
    assert lines[5].split()[-3:] == ["0.5000", "0.7500", "0.8125"]
    assert "16 tokens" in lines[7]
    assert "1 torch thread" in lines[7]

    written = json.loads(table.read_text())
    assert written["latency_conditions"]["sequence_length"] == 16
    assert [(row["run"], row["model"]) for row in written["rows"]] == [
        (run, model) for run in ("co-trained", "trained alone") for model in ("teacher", "student")
    ]
    for row, folder, layers in zip(written["rows"][:2], (runs[0], runs[0] / "student"), (2, 1), strict=True):
        assert row["parameters (M)"] == tiny_bert(layers).num_parameters() / 1e6
        assert row["on disk (MB)"] == (folder / "model.safetensors").stat().st_size / 1e6
        assert row["latency (ms)"] > 0

    image = pytest.importorskip("matplotlib.image").imread(figure)
    assert image.shape[:2] == (660, 2025)
    assert image[..., :3].std() > 0.05  # something is drawn


def test_comparison_markdown_with_a_run_of_one_model(runs, tmp_path, monkeypatch, capsys):
    """As from Hugging Face's run_glue.py: no student, evaluated only at the end."""
    single = write_run(tmp_path / "single", 0.8, student=False)
    figure = tmp_path / "comparison.png"
    arguments = ["--markdown", "--output", figure, "--sequence_length", 16, "--repeats", 1]
    call(monkeypatch, comparison, runs[0], single, *arguments)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert [row[:2] for row in cells[2:]] == [["together", "teacher"], ["together", "student"], ["single", "teacher"]]
    assert cells[4][-2:] == ["0.8000", "-"]
    assert set(cells[1][2]) == {"-", ":"}
    assert figure.exists()
    run = comparison.load_run(single, "single")
    assert run.curve("eval_accuracy") == ([40], [0.8])
    assert comparison.main_metric([run]) == "accuracy"


def test_comparison_of_metrics_of_both_mnli_sets():
    results = {"eval_accuracy": 0.8, "eval_student_accuracy_mm": 0.7, "eval_runtime_mm": 1.0, "eval_agreement_mm": 0.6}
    assert comparison.metrics_of(results, "teacher") == {"accuracy": 0.8, "agreement_mm": 0.6}
    assert comparison.metrics_of(results, "student") == {"accuracy_mm": 0.7, "agreement_mm": 0.6}


def test_comparison_refuses_what_is_no_run(runs, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"nowhere' is not the folder of a finished run: there is no such folder"):
        call(monkeypatch, comparison, runs[0], tmp_path / "nowhere")
    (runs[1] / "all_results.json").unlink()
    with pytest.raises(SystemExit, match=r"alone' is not .*: it has no all_results.json. Pass the --output_dir of a"):
        call(monkeypatch, comparison, *runs)
    with pytest.raises(SystemExit):
        call(monkeypatch, comparison, runs[0], "--labels", "a", "b")
    assert "--labels has 2 names for 1 runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, comparison, runs[0], runs[0])
    assert "two runs have the same name" in capsys.readouterr().err


# ---- benchmarks ----


def test_benchmark_gives_its_figures(monkeypatch, capsys):
    call(monkeypatch, benchmark, "--quick", "--markdown")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert rows[0][1:] == ["co-training", "teacher alone", "student alone", "ratio (min to max)", "target", "verdict"]
    assert [row[0].split(",")[0] for row in rows[2:]] == [
        *("one step (s)", "trainer.train() (s)", "peak memory (MB)", "peak memory (MB)")
    ]
    for row in rows[2:]:
        assert all(float(cell) > 0 for cell in row[1:4])
        assert float(row[4].split()[0]) > 0
    assert [row[5] for row in rows[2:4]] == ["<= 1.03", "<= 1.00"]


def test_benchmark_step_trains_both_models_as_the_loop_does(tmp_path):
    """The timed step is no empty one: it gives what `trainer.train()` gives, weight for weight."""
    workload = benchmark.Workload(quick=True, steps=1, folder=str(tmp_path))
    for variant in benchmark.VARIANTS:
        trainer = workload.make_trainer(variant)
        trainer.train()
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        for group in trainer.optimizer.param_groups:
            group["lr"] = 1e-3  # the schedule has ended
        benchmark.optimizer_step(trainer, workload.batch)
        changed = [not old.equal(new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
        assert all(changed)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
