import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from toy_protocol import GRID, call, numbers, write_toy

from examples.paper import prepare, report, run
from examples.paper.cells import METHODS, Cell, expand
from examples.paper.data import Masking, Prepared, Schedule
from examples.paper.settings import load_scale


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared toy scale whose whole grid has been run."""
    folder = tmp_path_factory.mktemp("toy")
    config = write_toy(folder)
    call(prepare, "--config", config, "--output", folder / "prepared")
    call(run, "--config", config, "--prepared", folder / "prepared", "--output", folder / "out", "--threads", 1)
    return folder


@pytest.fixture(scope="module")
def results(toy: Path) -> list[dict]:
    return [json.loads(line) for line in (toy / "out" / "results.jsonl").read_text().splitlines()]


def test_every_method_is_trained_and_scored(results: list[dict]) -> None:
    pretraining = [result for result in results if result["cell"]["task"] == "mlm"]
    assert len(pretraining) == 2 * 6 + 2 + 1 + 2 + 2
    trained = {result["cell"]["method"]: set(result["models"]) for result in pretraining}
    both = {"teacher", "student"}
    assert trained == {
        "alone": both,
        "kd": {"student"},
        "reversed": {"teacher"},
        "ctcd": both,
        "student-from-teacher": both,
        "teacher-from-student": both,
        "community": both,
        "community-kd": both,
    }
    for result in results:
        for model in result["models"].values():
            for scores in model["scores"].values():
                assert all(math.isfinite(score) for score in scores.values())
    # Each model of the main grid is fine-tuned by itself: 10 models, 2 seeds; and the student of KD on a second task.
    assert sum(result["cell"]["learner"] is not None for result in results) == 10 * 2 + 1


def test_a_curve_ends_with_the_score_of_the_validation_set(results: list[dict]) -> None:
    for result in results:
        if result["cell"]["task"] == "mlm":
            assert [point["step"] for point in result["curve"]] == [2, 4, 6]
            for name, model in result["models"].items():
                assert result["curve"][-1][name]["loss"] == pytest.approx(model["scores"]["validation"]["loss"])


def test_methods_are_given_equal_data_and_equal_steps(results: list[dict]) -> None:
    compute = {
        result["cell"]["method"]: result["compute"]
        for result in results
        if result["cell"]["task"] == "mlm" and result["cell"]["seed"] == 1
    }
    assert len({(each["steps"], each["tokens"]) for each in compute.values()}) == 1
    assert compute["alone"]["tokens"] == 6 * 4 * 16
    # A frozen model costs its forward pass alone, and a third model costs one more.
    assert compute["kd"]["flops"] < compute["alone"]["flops"] < compute["community"]["flops"]


def test_frozen_models_are_those_trained_alone_with_the_same_seed(toy: Path, results: list[dict]) -> None:
    keys = {
        (result["cell"]["method"], result["cell"]["seed"]): result["key"]
        for result in results
        if result["cell"]["task"] == "mlm" and result["cell"]["temperature"] in (None, 1.0)
    }
    for seed in (0, 1):
        for method, name in {"kd": "model.safetensors", "reversed": "student/model.safetensors"}.items():
            frozen, source = (
                (toy / "out" / "cells" / keys[each, seed] / "models" / name).read_bytes() for each in (method, "alone")
            )
            if seed == 1:  # of seed 0 there are several trainings alone
                assert frozen == source


def test_a_finished_grid_computes_nothing_again(toy: Path, capsys: pytest.CaptureFixture) -> None:
    before = (toy / "out" / "results.jsonl").read_bytes()
    options = ["--config", toy / "toy.yaml", "--prepared", toy / "prepared", "--output", toy / "out"]
    call(run, *options)
    assert (toy / "out" / "results.jsonl").read_bytes() == before
    call(run, *options, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(before.splitlines())
    assert all("  done  " in line for line in lines)


def test_chosen_cells_bring_those_that_they_need(toy: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--config", toy / "toy.yaml", "--prepared", toy / "prepared", "--output", toy / "none"]
    call(run, *options, "--list", "--tasks", "stsb", "--methods", "kd", "--seeds", 1)
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "mlm alone seed 1 steps 6",
        "mlm kd seed 1 steps 6",
        "stsb alone seed 1 from mlm kd seed 1 steps 6 student",
    ]


def test_the_masks_do_not_depend_on_the_method_and_change_from_pass_to_pass(toy: Path) -> None:
    scale, prepared = load_scale(toy / "toy.yaml"), Prepared.load(toy / "prepared")
    cells = [cell for cell in expand(scale.grid, scale.defaults) if cell.rows == 8]
    rows, masking = prepared.parts("mlm")["train"], Masking(prepared.tokenizer)
    first, second = (Schedule(rows, cell, masking) for cell in cells[:2])
    assert cells[0].method != cells[1].method
    assert len(first) == 24
    for index in range(24):
        assert first[index]["input_ids"].equal(second[index]["input_ids"])
        assert first[index]["labels"].equal(second[index]["labels"])
    assert sorted(first.order[:8]) == sorted(first.order[8:16]) == list(range(8))
    same = next(place for place in range(8, 16) if first.order[place] == first.order[0])
    assert not first[0]["labels"].equal(first[same]["labels"])
    kept = first[0]["labels"] == -100
    original = rows[first.order[0]]["input_ids"]
    assert first[0]["input_ids"][kept].equal(original[kept])
    assert first[0]["labels"][~kept].equal(original[~kept])


def test_the_report_has_the_numbers_of_the_results(toy: Path, results: list[dict]) -> None:
    call(report, toy / "out" / "results.jsonl", "--output", toy / "report.md", "--figures", toy / "figures")
    text = (toy / "report.md").read_text()
    assert len(list((toy / "figures").glob("*.png"))) >= 4
    losses = [
        result["models"]["teacher"]["scores"]["validation"]["loss"]
        for result in results
        if result["cell"]["method"] == "reversed" and result["cell"]["task"] == "mlm"
    ]
    row = next(line for line in text.splitlines() if line.startswith("| reversed "))
    assert f"{sum(losses) / 2:.3f} ± {abs(losses[0] - losses[1]) / 2**0.5:.3f}" in row


#: Not there on a machine that has torch, transformers and accelerate, and what these need.
BARE = """
import importlib.util, sys
absent = ("datasets", "evaluate", "peft", "scipy", "sklearn", "matplotlib", "pandas", "pyarrow", "tensorboard")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in absent else found(name, *rest)
from examples.paper.run import main
main()
"""


@pytest.mark.slow
def test_a_prepared_grid_runs_where_only_torch_transformers_and_accelerate_are_installed(toy: Path) -> None:
    options = {"--config": "toy.yaml", "--prepared": "prepared", "--output": "bare"}
    command = [sys.executable, "-c", BARE, "--threads", "1", "--tasks", "rte", "--methods", "kd", "--seeds", "1"]
    command += [str(part) for name, value in options.items() for part in (name, toy / value)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    bare, whole = (numbers(toy / name / "results.jsonl") for name in ("bare", "out"))
    assert bare == {key: whole[key] for key in bare}
    assert len(bare) == 3


def test_preparing_again_gives_the_same_keys_and_leaves_nothing_old(toy: Path, tmp_path: Path) -> None:
    config = write_toy(tmp_path)
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    scratch = write_toy(tmp_path, models={"source": str(tmp_path / "model"), "teacher": {"hidden_act": "relu"}})
    call(prepare, "--config", scratch, "--output", tmp_path / "prepared")
    assert not list((tmp_path / "prepared" / "models").rglob("*.safetensors"))
    with pytest.raises(SystemExit, match=r"prepared with `models: teacher: .*relu.*has `models: teacher: \{\}`"):
        call(run, "--config", toy / "toy.yaml", "--prepared", tmp_path / "prepared", "--output", tmp_path / "out")
    write_toy(tmp_path)
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    assert Prepared.load(tmp_path / "prepared").fingerprints == Prepared.load(toy / "prepared").fingerprints


def test_no_row_is_both_for_training_and_for_choosing(toy: Path) -> None:
    for task in ("mlm", "rte", "stsb"):
        parts = Prepared.load(toy / "prepared").parts(task)
        rows = {part: {tuple(row["input_ids"].tolist()) for row in parts[part]} for part in ("train", "dev")}
        if task == "mlm":  # without their masks
            rows["dev"] = {
                tuple(row["input_ids"].where(row["labels"] == -100, row["labels"]).tolist()) for row in parts["dev"]
            }
        assert not rows["train"] & rows["dev"]
        assert len(rows["dev"]) == len(parts["dev"])


def test_several_processes_of_one_training_are_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="group of 2 processes.*without torchrun"):
        call(run, "--config", toy / "toy.yaml", "--prepared", toy / "prepared", "--output", tmp_path / "out")


def test_a_number_is_the_same_with_and_without_a_point(toy: Path) -> None:
    values = {"task": "rte", "method": "ctcd", "seed": 0, "batch_size": 8, "learning_rate": 1}
    fingerprints = Prepared.load(toy / "prepared").fingerprints
    keys = {Cell(**values, epochs=epochs, temperature=2).key(fingerprints) for epochs in (3, 3.0)}
    assert len(keys) == 1
    with pytest.raises(ValueError, match=r"`learning_rate: '5e-4x'` is no number"):
        Cell(**{**values, "learning_rate": "5e-4x"}, epochs=1)


def test_a_failed_cell_is_named_and_the_others_are_computed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grid = [
        {"task": "mlm", "seed": 0, "method": "alone", "rows": 10**6},
        {"task": "mlm", "seed": 0, "method": "kd", "rows": 10**6},
        {"task": "mlm", "seed": 0, "method": "alone"},
    ]
    config = write_toy(tmp_path, grid)
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    with pytest.raises(SystemExit, match="1"):
        call(run, "--config", config, "--prepared", tmp_path / "prepared", "--output", tmp_path / "out")
    errors = capsys.readouterr().err
    assert "failed: mlm alone seed 0 rows 1000000 steps 6: ValueError: `rows: 1000000` of mlm, but only" in errors
    assert len(numbers(tmp_path / "out" / "results.jsonl")) == 1


def test_models_that_are_gone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_toy(tmp_path, [{"task": "mlm", "seed": 0, "method": "alone"}])
    options = ["--prepared", tmp_path / "prepared", "--output", tmp_path / "out"]
    call(prepare, "--config", config, "--output", tmp_path / "prepared")
    call(run, "--config", config, *options)
    (tmp_path / "out" / "cells").rename(tmp_path / "moved")
    more = write_toy(tmp_path, [{"task": "mlm", "seed": 0, "method": "kd"}])
    with pytest.raises(SystemExit, match="1"):
        call(run, "--config", more, *options)
    assert "Bring them back, or remove the line of this cell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "best"}, "`method: best` is unknown"),
        ({"steps": 3, "epochs": 1}, "`steps` .3. or `epochs` .1."),
        ({"speed": 3}, "Unknown settings of a cell: speed"),
        ({"teacher_init": "random"}, "`teacher_init: random` is unknown"),
        ({"task": "qnli"}, "tasks .'qnli'., which are not in"),
    ],
)
def test_a_bad_grid_is_refused_before_any_work(change: dict, message: str, toy: Path, tmp_path: Path) -> None:
    config = write_toy(tmp_path, [{"task": "mlm", "seed": 0, "method": "alone", **change}])
    with pytest.raises(SystemExit, match=message):
        call(run, "--config", config, "--prepared", toy / "prepared", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_grid_of_the_fixture_has_every_method() -> None:
    named = {
        method
        for block in GRID
        for method in ([block["method"]] if isinstance(block["method"], str) else block["method"])
    }
    assert named == set(METHODS)


@pytest.mark.parametrize("name", ["nano", "small", "base"])
def test_the_scales_that_come_along_have_every_kind_of_cell(name: str) -> None:
    scale = load_scale(ROOT / "examples" / "paper" / f"{name}.yaml")
    cells = expand(scale.grid, scale.defaults)
    for place, cell in enumerate(cells):
        assert all(source in cells[:place] for source in cell.sources)
        assert cell.task in ("mlm", *scale.tasks)
    pretrained = {cell.method for cell in cells if cell.task == "mlm" and cell.learner is None}
    assert pretrained == set(METHODS)
    assert {cell.learner for cell in cells} == {None, "teacher", "student"}
