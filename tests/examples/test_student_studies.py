"""`examples/studies`: runs that are named in a file, what they cost, the Pareto front, tables and figure."""

import itertools
import json
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from matplotlib import image
from script_glue import save_glue, save_model
from transformers import AutoModelForSequenceClassification

from examples.studies import costs, evidence, figure, report, run, scoring, split_labels, split_rows, study
from examples.studies.pareto import Point, front

FILES = Path(study.__file__).parent
VARIANTS = {
    "1 layer": {"student_num_hidden_layers": 1},
    "share=prefix": {"student_num_hidden_layers": 2, "student_layers": "first", "share": "prefix"},
    "one base": {
        **{"student_num_hidden_layers": 2, "student_layers": "first", "student_init": "shared"},
        **{"lora_r": 2, "student_lora_r": 2, "lora_target_modules": "all-linear"},
    },
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A study of a tiny model, as the file says it."""
    folder = tmp_path_factory.mktemp("study")
    return {
        "common": {
            "model_name_or_path": save_model(folder / "teacher", head=False),
            "dataset_name": save_glue(folder / "glue", "cola"),
            **{"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "max_seq_length": 16},
        },
        "tasks": {"cola": {"task_name": "cola"}},
        "variants": VARIANTS,
        "seeds": [1, 2],
    }


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


# ---- study.py, run.py ----


def test_the_studies_of_this_project_can_be_read(monkeypatch):
    for name in ("MINILM", "GLUE", "DATA", "STUDENT"):
        monkeypatch.setenv(name, f"/{name.lower()}")
    for path in FILES.glob("*.yaml"):
        cells = list(study.load_study(path).cells())
        assert {cell.arguments["model_name_or_path"] for cell in cells} - {"@alone"} == {"/minilm"}
        assert "/data" not in json.dumps(study.load_study(path).variants)  # what is published says no path
        assert len({cell.folder(Path()) for cell in cells}) == len(cells)
    assert len(list(FILES.glob("*.yaml"))) == 4


def test_arguments_of_the_variant_count_most(tmp_path, settings):
    own = {"common": {"learning_rate": 1, "seed": 1}, "tasks": {"a": {"learning_rate": 2}, "b": {}}, "seeds": [7]}
    own["variants"] = {"x": {"learning_rate": 3, "do_eval": False}, "y": {}}
    read = study.load_study(write(tmp_path / "study.yaml", own))
    rates = [(cell.variant, cell.task, cell.arguments["learning_rate"]) for cell in read.cells()]
    assert rates == [("x", "a", 3), ("x", "b", 3), ("y", "a", 2), ("y", "b", 1)]
    assert [cell.arguments["do_eval"] for cell in read.cells()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, "'seeds' is missing"),
        ({"varaints": {}}, "'varaints' is unknown"),
        ({"common": {"dataset_name": "${NOT_SET_ANYWHERE}"}}, "NOT_SET_ANYWHERE from the environment"),
        ({"variants": {"a=b": {}, "a:b": {}}}, "'a=b' and 'a:b' have one folder"),
    ],
)
def test_a_study_that_is_wrong_is_refused(tmp_path, settings, change, message):
    values = {name: value for name, value in {**settings, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        study.load_study(write(tmp_path / "study.yaml", values))


def test_what_is_finished_is_not_run_again_and_other_runs_go_on_after_a_failure(tmp_path, settings, capsys):
    variants = {"wrong": {"student_num_hidden_layers": 9}, **VARIANTS}
    path = write(tmp_path / "study.yaml", {**settings, "variants": variants})
    output = tmp_path / "out"
    arguments = [str(path), "--output", str(output), "--seeds", "2", "--variants", "wrong", "1 layer"]
    killed = next(c for c in study.load_study(path).cells() if (c.variant, c.seed) == ("1 layer", 2))
    killed.folder(output).mkdir(parents=True)  # a run that was killed between training and evaluation is not finished
    (killed.folder(output) / "arguments.json").write_text(json.dumps(killed.all_arguments(output)))
    (killed.folder(output) / "all_results.json").write_text(json.dumps({"train_samples": 12}))
    assert run.main(arguments) == 1
    printed = capsys.readouterr()
    assert "cola, wrong, seed 2: FAILED" in printed.out
    assert "`num_hidden_layers=9` is not valid" in printed.err
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    metrics = json.loads((output / "cola" / "1-layer" / "seed-2" / "all_results.json").read_text())
    (record,) = records
    assert (record["variant"], record["seed"], record["train_rows"]) == ("1 layer", 2, 12)
    assert record["teacher"]["matthews_correlation"] == metrics["eval_matthews_correlation"]
    assert record["student"]["matthews_correlation"] == metrics["eval_student_matthews_correlation"]
    assert record["student"]["loss"] == metrics["eval_student_loss"]
    assert "runtime" not in record["teacher"]

    arguments[-2:] = ["1 layer"]
    assert run.main(arguments) == 0
    assert "seed 2" not in capsys.readouterr().out
    settings = {**settings, "common": {**settings["common"], "max_steps": 3}}
    write(path, settings)
    with pytest.raises(ValueError, match="holds a run with max_steps=2, and the study has 3"):
        run.main(arguments)


# ---- split_labels.py ----


def test_labels_are_taken_from_most_rows(tmp_path):
    data = save_glue(tmp_path / "glue", "cola")
    split_labels.main([data, "cola", str(tmp_path / "own"), "--rows", "10", "--labelled", "0.3"])
    parts = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "own").iterdir()
    }
    whole = Dataset.from_parquet(f"{data}/cola/train-00000-of-00001.parquet")
    known = set(zip(whole["sentence"], whole["label"], strict=True))
    assert [(len(rows), set(rows[0])) for _, rows in sorted(parts.items())] == [
        (3, {"sentence", "label"}),
        (7, {"sentence"}),
        (13, {"sentence", "label"}),
    ]
    assert all((row["sentence"], row["label"]) in known for row in parts["labelled"])
    drawn = [row["sentence"] for part in ("labelled", "unlabelled") for row in parts[part]]
    assert len(set(drawn)) == 10
    assert set(drawn) <= {sentence for sentence, _ in known}
    with pytest.raises(SystemExit):
        split_labels.main([data, "cola", str(tmp_path / "own"), "--rows", "99"])


# ---- pareto.py ----


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_dominates(seed):
    draw = random.Random(seed)
    points = {str(index): Point(draw.randint(0, 9), 2 ** draw.randint(0, 6)) for index in range(12)}
    naive = [
        name
        for name, own in points.items()
        if not any(
            other.quality >= own.quality
            and other.cost <= own.cost
            and (other.quality, other.cost) != (own.quality, own.cost)
            for other in points.values()
        )
    ]
    assert set(front(points)) == set(naive)
    by_cost = [points[name] for name in front(points)]
    assert all(a.cost <= b.cost and a.quality <= b.quality for a, b in itertools.pairwise(by_cost))


def test_costs_within_the_tolerance_are_the_same():
    assert front({"better": Point(80, 10.2), "worse": Point(79, 10.0)}) == ["better"]
    assert front({"better": Point(80, 10.4), "cheaper": Point(79, 10.0)}) == ["cheaper", "better"]
    assert set(front({"a": Point(80, 10.2), "b": Point(80, 10.0)})) == {"a", "b"}


# ---- costs.py ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory, settings) -> dict:
    """What the variants cost, but for the memory."""
    read = study.load_study(write(tmp_path_factory.mktemp("costs") / "study.yaml", settings))
    arguments = {variant: read.arguments(variant, "cola") for variant in VARIANTS}
    return costs.measure_times(arguments, "1 layer", tokens=8, rounds=2, latency_tokens=8)


def test_parameters_are_counted_once_where_they_are_shared(measured, settings):
    teacher = AutoModelForSequenceClassification.from_pretrained(settings["common"]["model_name_or_path"])
    of = {name: value.numel() for name, value in teacher.named_parameters()}
    layer, head = (sum(n for name, n in of.items() if part in name) for part in ("layer.0.", "classifier"))
    pooler = sum(n for name, n in of.items() if "pooler" in name)
    whole = sum(of.values())
    alone, prefix, base = (measured[variant]["parameters"] for variant in VARIANTS)
    assert alone == {
        "teacher": whole,
        "student": whole - 2 * layer,
        "both": 2 * (whole - layer),
        "trained": alone["both"],
    }
    assert (prefix["teacher"], prefix["student"]) == (whole, whole - layer)
    assert prefix["both"] == prefix["trained"] == whole + pooler + head
    assert (base["teacher"], base["student"]) == (whole, whole - layer)
    assert base["both"] - base["trained"] == whole  # the frozen base with its head


def test_times_are_measured(measured):
    assert {*measured} == {*VARIANTS, "teacher"}
    for variant in VARIANTS:
        own = measured[variant]
        low, high = own["step_ratio_range"]
        assert 0 < low <= own["step_ratio"] <= high
        assert min(own["step_s"], own["latency_ms"]) > 0


def test_the_file_of_costs_holds_memory_and_conditions(tmp_path, settings, monkeypatch):
    def here(action, *arguments, live):  # a process of its own has a test among those of the benchmarks
        assert live
        action(*arguments)
        return 64.0

    monkeypatch.setattr(costs, "peak_memory_of", here)
    path = write(tmp_path / "study.yaml", {**settings, "variants": {"1 layer": VARIANTS["1 layer"]}})
    options = ["--tokens", "8", "--rounds", "1", "--latency_tokens", "8"]
    costs.main([str(path), "--reference", "1 layer", "--output", str(tmp_path / "costs.json"), *options])
    written = json.loads((tmp_path / "costs.json").read_text())
    assert written["costs"]["1 layer"]["peak_mb"] == 64
    assert (written["conditions"]["reference"], written["conditions"]["tokens"]) == ("1 layer", 8)


def test_a_reference_that_is_not_there_is_refused(tmp_path, settings):
    path = write(tmp_path / "study.yaml", settings)
    with pytest.raises(SystemExit):
        costs.main([str(path), "--reference", "none", "--output", str(tmp_path / "costs.json")])


# ---- report.py, figure.py ----


def records_of(scores: dict[str, list[float]], task: str = "sst2") -> list[dict]:
    return [
        {
            "variant": variant,
            "task": task,
            "seed": seed,
            "choice": VARIANTS[variant],
            "train_rows": 12,
            "teacher": {"loss": 0.5, "accuracy": score + 0.1, "agreement": 0.9},
            "student": {"loss": 1 - score, "accuracy": score, "agreement": 0.9},
        }
        for variant, values in scores.items()
        for seed, score in enumerate(values)
    ]


@pytest.fixture
def results(tmp_path) -> Path:
    scores = {"1 layer": [0.5, 0.52], "share=prefix": [0.6, 0.7], "one base": [0.55, 0.45]}
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records_of(scores)))
    return path


def line_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if f"| {name} " in line)
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_table_and_figure_of_choices(tmp_path, results, measured):
    costs_path, output, png = tmp_path / "costs.json", tmp_path / "out.md", tmp_path / "figures" / "choices.png"
    known = {
        variant: {**measured[variant], "peak_mb": 100.0, "latency_ms": milliseconds}
        for variant, milliseconds in zip(VARIANTS, [1.0, 2.0, 2.01], strict=True)
    }
    conditions = {"reference": "1 layer", "tokens": 8, "latency_tokens": 8, "machine": "any", "date": "today"}
    costs_path.write_text(json.dumps({"conditions": conditions, "costs": {**known, "teacher": measured["teacher"]}}))
    report.main([str(results), "--costs", str(costs_path), "--output", str(output), "--figure", str(png)])
    text = output.read_text()
    assert line_of(text, "2: share=prefix")[:3] == ["2: share=prefix", "75.0 ± 7.1", "65.0 ± 7.1"]
    assert line_of(text, "1: 1 layer")[2] == "51.0 ± 1.4"
    assert line_of(text, "2: share=prefix")[-1] == "sst2 (latency), sst2 (parameters)"
    assert line_of(text, "1: 1 layer")[-1] == "sst2 (latency), sst2 (parameters)"
    assert line_of(text, "3: one base")[-1] == "-"
    assert "sst2: accuracy" in text
    pixels = image.imread(png)
    assert pixels.shape[0] > 300
    assert pixels[..., :3].min() == 0  # something is drawn
    with pytest.raises(SystemExit):
        report.main([str(results), "--output", str(output), "--figure", str(png)])


def test_regression_has_no_agreement(tmp_path):
    scores = {"pearson": 0.6, "spearmanr": 0.4, "combined_score": 0.5, "loss": 0.25}
    record = {"variant": "any", "task": "stsb", "seed": 0, "choice": {}, "train_rows": 12}
    (tmp_path / "results.jsonl").write_text(json.dumps({**record, "teacher": scores, "student": scores}))
    report.main([str(tmp_path / "results.jsonl"), "--output", str(tmp_path / "out.md")])
    expected = ["stsb", "any", "1", "50.0", "50.0", "0.250", "0.250", "-"]
    assert line_of((tmp_path / "out.md").read_text(), "any") == expected


def test_the_reference_is_compared_seed_by_seed(tmp_path, results):
    output = tmp_path / "out.md"
    report.main([str(results), "--reference", "share=prefix", "--output", str(output)])
    quality, comparison, _ = output.read_text().split("\n\n")
    assert line_of(quality, "one base")[:3] == ["sst2", "one base", "2"]
    differences = [100 * (0.6 - 0.55), 100 * (0.7 - 0.45)]
    half = 12.706 * statistics.stdev(differences) / 2**0.5  # the t quantile of one degree of freedom
    mean = statistics.mean(differences)
    row = line_of(comparison, "one base")
    assert row[3] == f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    assert row[5].startswith("+0.150 [")  # a lower loss is better
    with pytest.raises(SystemExit):
        report.main([str(results), "--reference", "none", "--output", str(output)])


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"student_num_hidden_layers": 3}, "depth"),
        ({"student_num_hidden_layers": 3, "student_intermediate_size": 8}, "width"),
        ({"student_layers": "first", "share": "prefix"}, "sharing"),
        ({"student_lora_r": 8}, "adapters"),
        ({"student_num_hidden_layers": 3, "distillation_mode": "standalone"}, "trained alone"),
    ],
)
def test_kinds_of_choices(choice, kind):
    assert figure.kind_of(choice) == kind
    assert kind in figure.KINDS


# ---- Models of other variants, tuned arguments, large test sets ----


def test_a_variant_starts_from_another_one_with_the_arguments_that_trials_chose(tmp_path, settings):
    rows = [{"sentence": f"{word} again", "label": float(word == "good")} for word in ("good", "bad") * 4]
    data = {"train": rows, "validation": rows[:4], "test": [{**row, "part": "validation"} for row in rows[:4]]}
    data["test"] += [{**row, "part": "test"} for row in rows]
    files = {}
    for name, own in data.items():
        files[f"{name}_file"] = str(tmp_path / f"{name}.jsonl")
        Path(files[f"{name}_file"]).write_text("".join(json.dumps(row) + "\n" for row in own))
    common = {name: value for name, value in settings["common"].items() if name != "dataset_name"}
    values = {
        "common": {**common, **files, "text_column_names": "sentence", "do_predict": True, "save_logits": True},
        "tasks": {"own": {}},
        "variants": {
            "from it": {"model_name_or_path": "@alone", "distillation_mode": "kd", "student_num_hidden_layers": 1},
            "alone": {
                **{"distillation_mode": "standalone", "student_num_hidden_layers": 1},
                "tune": {"student_learning_rate": [0.0, 0.05]},
            },
        },
        "seeds": [1],
    }
    path, output = write(tmp_path / "study.yaml", values), tmp_path / "out"
    assert run.main([str(path), "--output", str(output), "--variants", "from it"]) == 0
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(record["variant"], record["seed"], record["trial"]) for record in records] == [
        ("alone", study.TUNING_SEED, {"student_learning_rate": 0.0}),
        ("alone", study.TUNING_SEED, {"student_learning_rate": 0.05}),
        ("alone", 1, {}),
        ("from it", 1, {}),
    ]
    tried = [record["scores"]["validation"]["student"]["nll"] for record in records[:2]]
    assert "test" not in records[0]["scores"]
    chosen = json.loads((output / "own" / "alone" / "seed-1" / "arguments.json").read_text())
    assert chosen["student_learning_rate"] == (0.0, 0.05)[tried[1] < tried[0]]
    folders = [output / "own" / name / "seed-1" for name in ("alone", "from-it")]
    assert json.loads((folders[1] / "arguments.json").read_text())["model_name_or_path"] == str(folders[0])
    assert [list(folder.rglob("*.safetensors")) != [] for folder in folders] == [True, False]

    record = records[-1]["scores"]["test"]["student"]
    logits = np.load(folders[1] / "predict_logits.npz")["student"].astype(float)[4:]
    labels = np.array([row["label"] for row in rows])
    squared = np.square(logits[:, 0] - labels).mean()
    assert record["nll"] == pytest.approx(squared)
    assert record["scaled_nll"] == record["nll"]


def test_scores_of_classes_after_temperature_scaling():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(400, 3))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = np.array([generator.choice(3, p=row) for row in chances])
    assert scoring.fitted_temperature(4 * logits, labels) == pytest.approx(4, rel=0.2)
    losses = [-np.log(row[label]) for row, label in zip(chances, labels, strict=True)]
    assert scoring.losses_of(4 * logits, labels, 4.0) == pytest.approx(losses)
    assert scoring.score_of("own", logits, labels) == pytest.approx(100 * (logits.argmax(-1) == labels).mean())


def test_no_test_row_shares_a_phrase_with_a_training_row():
    rows = Dataset.from_dict({"sentence": ["a b c d e", "x a b c d", "a b c x d", "A b", "c d"]})
    train = Dataset.from_dict({"sentence": ["z a b c d z", "a b"]})
    assert split_rows.without_phrases_of(rows, [train], ["sentence"])["sentence"] == ["a b c x d", "c d"]


def test_a_study_names_variants_that_exist(tmp_path, settings):
    values = {**settings, "variants": {"a": {"model_name_or_path": "@b"}}}
    with pytest.raises(ValueError, match="`model_name_or_path: @b` of 'a' names no variant"):
        study.load_study(write(tmp_path / "study.yaml", values))


# ---- evidence.py ----


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two variants, whose logits are drawn: the second one is the better one."""
    folder, generator = tmp_path_factory.mktemp("scored"), np.random.default_rng(0)
    labels = generator.integers(0, 2, 600)
    rows = [
        {"sentence": "x", "label": int(y), "part": part}
        for part in ("validation", "test")
        for y in np.split(labels, 2)[0]
    ]
    test_file = folder / "test.jsonl"
    test_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = np.array([row["label"] for row in rows])
    for variant, signal in (("weak", 0.5), ("strong", 2.0)):
        for seed in (1, 2):
            own = folder / "own" / variant / f"seed-{seed}"
            own.mkdir(parents=True)
            (own / "arguments.json").write_text(json.dumps({"test_file": str(test_file)}))
            margin = signal * (2 * labels - 1) + generator.normal(size=len(labels))
            logits = np.stack([-margin, margin], axis=-1).astype(np.float32)
            np.savez(own / "predict_logits.npz", teacher=logits, student=logits / 2)
            scores = scoring.scores_of("own", own, str(test_file), "validation")
            record = {"key": f"own/{variant}/seed-{seed}", "variant": variant, "task": "own", "seed": seed}
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps({**record, "scores": scores}) + "\n")
    return folder


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "RESAMPLES", 100)


@pytest.mark.usefixtures("fewer_resamples")
def test_differences_and_their_intervals(scored):
    found = evidence.Evidence(scored)
    ours, theirs = ("strong", "student"), ("weak", "student")
    for measure, sign in (("score", 1), ("nll", -1), ("scaled_nll", -1)):
        values = [found.values("own", variant, learner, measure) for variant, learner in (ours, theirs)]
        expected = sign * np.mean([values[0][seed] - values[1][seed] for seed in (1, 2)])
        mean, (low, high), seeds = evidence.difference(found, "own", ours, theirs, measure)
        assert mean == pytest.approx(expected)
        assert seeds == 2
        assert 0 < low < mean < high
    same = evidence.difference(found, "own", ours, ours, "nll")
    assert same == (0.0, (0.0, 0.0), 2)


@pytest.mark.usefixtures("fewer_resamples")
def test_tables_of_evidence(scored, capsys, tmp_path):
    arguments = [str(scored), "--ours", "strong", "--against", "weak", "--output", str(tmp_path / "evidence.md")]
    evidence.main(arguments)
    table, comparison = (tmp_path / "evidence.md").read_text().split("\n\n")
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["weak", "strong"]
    assert "student, strong" in comparison
    with pytest.raises(SystemExit):
        evidence.main([*arguments[:2], "middle", *arguments[3:]])
    assert "'middle' is none of the variants" in capsys.readouterr().err
