"""The command that reports on a grid, its figures, and the latency of models."""

import json
import random
import re
from pathlib import Path

import pytest
from paper_grid import LATENCY, SEEDS, Result, loss_of, make_grid
from PIL import Image
from tiny import tiny_bert
from toy_protocol import call

from ctcd_trainer.students.costs import cpu_name
from examples.paper import ablations, figures, grouping, latency, report


@pytest.fixture(scope="module")
def grid() -> list[Result]:
    return make_grid()


# ---- The command ----


def write(path: Path, results: list[Result], end: str = "") -> Path:
    path.write_text("".join(json.dumps(result) + "\n" for result in results) + end)
    return path


def test_the_command_writes_report_and_figures(tmp_path, grid) -> None:
    half = len(grid) // 2
    files = [write(tmp_path / "a.jsonl", grid[:half], end='{"key": "cut o'), write(tmp_path / "b.jsonl", grid[half:])]
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY))
    output = tmp_path / "docs" / "report.md"
    call(
        *(report, *files, "--output", output),
        *("--figures", tmp_path / "docs" / "images", "--latency", tmp_path / "latency.json"),
    )
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", output.read_text())
    assert links == [
        f"images/nano-{name}.png" for name in ("curves", "differences", "quality", "ablations", "cotraining")
    ]
    for link in links:
        with Image.open(output.parent / link) as image:
            assert round(image.info["dpi"][0]) >= 150
            assert min(image.size) > 500
            assert len(image.convert("L").getcolors(1 << 16)) > 20  # more than empty axes


def test_without_output_the_report_is_printed(tmp_path, capsys, grid) -> None:
    call(report, write(tmp_path / "a.jsonl", grid))
    assert capsys.readouterr().out == report.write_report(grid)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file '.*results.jsonl'.*examples.paper.run"),
        ("", r"results.jsonl'.*no cell of the grid has finished"),
        ("nonsense\n", r"Line 1 of '.*results.jsonl'"),
    ],
)
def test_unusable_results_are_refused(tmp_path, content: str | None, message: str) -> None:
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        call(report, path)


def test_results_that_cannot_be_compared_are_refused(tmp_path, grid) -> None:
    orphans = [result for result in grid if result["cell"]["start"]]
    with pytest.raises(SystemExit, match=rf"{len(orphans)} cells can be compared.*Pass"):
        call(report, write(tmp_path / "a.jsonl", orphans))


def test_a_file_that_is_no_latency_is_refused(tmp_path, grid) -> None:
    path = tmp_path / "latency.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"latency.json' was not written by examples.paper.latency"):
        call(report, write(tmp_path / "a.jsonl", grid), "--latency", path)


# ---- Figures and latency ----


def test_figures_without_anything_to_draw_are_not_written(tmp_path) -> None:
    path = tmp_path / "none.png"
    empty = grouping.arrange([])
    assert not figures.draw_curves([], path)
    assert not figures.draw_differences({"methods": []}, [], {}, path)
    assert not figures.draw_quality(empty, {}, {}, {}, path)
    assert not figures.draw_ablations([], [], {}, path)
    assert not figures.draw_cotraining(empty, path)
    assert not path.exists()


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_drawn_from_any_part_of_a_grid(tmp_path, grid, seed: int) -> None:
    rng = random.Random(seed)
    part = rng.sample([result for result in grid if result["cell"]["task"] == "mlm"], 6 + 6 * seed)
    part = [{**result, "curve": result["curve"][: rng.randint(0, 5)]} for result in part]
    drawn = report.draw_figures(grouping.arrange(part), [{}, LATENCY][seed % 2] or report.NO_LATENCY, tmp_path, "nano")
    assert drawn
    assert {path.name for path in drawn.values()} == {path.name for path in tmp_path.iterdir()}


def test_differences_over_steps_are_those_of_the_curves(grid) -> None:
    experiments = grouping.arrange(grid)
    variant = next(v for v in ablations.variants(experiments.pretraining, experiments.baseline) if v.label == "0.3")
    found = ablations.curve_differences(
        variant, experiments.pretraining, experiments.baseline, "student", ("alone", "student")
    )
    gains = [loss_of("ctcd", "student", seed) - 0.04 - loss_of("alone", "student", seed) for seed in SEEDS]
    assert list(found) == [40, 80, 120, 160, 200]
    assert all(values == pytest.approx(gains) for values in found.values())


def test_the_figure_of_cotraining_has_the_means_of_every_method(tmp_path, monkeypatch, grid) -> None:
    drawn = []
    monkeypatch.setattr(figures, "draw_points", lambda axis, learner, found, joined: drawn.append((learner, found)))
    pairs = [cell for cell in grid if cell["cell"]["task"] in ("cola", "stsb") and cell["cell"]["rows"] == 2000]
    assert figures.draw_cotraining(grouping.arrange(pairs), tmp_path / "pairs.png")
    assert len(drawn) == 2 * (3 + 2)  # teacher and student each; STS-B has no calibration error
    methods = ["alone", "kd", "reversed", "ctcd", "community", "community-kd"]
    losses = [found for learner, found in drawn if learner == "student"][1]  # the second panel of CoLA
    for place, method in enumerate(methods):
        if method == "reversed":  # trains no student
            assert place not in losses
        else:
            mean = sum(loss_of(method, "student", seed, "cola", 0.5) for seed in SEEDS) / len(SEEDS)
            assert losses[place].mean == pytest.approx(mean)


def test_latency_finds_both_models_of_a_folder(tmp_path) -> None:
    tiny_bert(num_layers=2).save_pretrained(tmp_path / "run")
    tiny_bert(num_layers=1).save_pretrained(tmp_path / "run" / "student")
    output = tmp_path / "latency.json"
    call(latency, tmp_path / "run", "--output", output, "--sequence_length", 8, "--repeats", 3)
    found = report.read_latency(output)
    assert [model["layers"] for model in found["models"]] == [2, 1]
    assert all(model["latency_ms"] > 0 for model in found["models"])
    assert found["conditions"]["sequence_length"] == 8
    assert found["conditions"]["device"] == cpu_name()
    parameters = sum(parameter.numel() for parameter in tiny_bert(num_layers=1).parameters())
    assert latency.latency_of(found["models"], 1, parameters) == found["models"][1]["latency_ms"]
    assert latency.latency_of(found["models"], 1, 2 * parameters) is None
    assert latency.latency_of(found["models"], 12, parameters) is None


def test_latency_refuses_what_it_cannot_time(tmp_path) -> None:
    tiny_bert().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], r"empty' holds no model.*save_pretrained"),
        ([tmp_path / "none"], r"none' holds no model: there is no such folder"),
        ([tmp_path / "model", "--sequence_length", 4000], r"--sequence_length 4000 is more than the \d+ positions"),
    ):
        with pytest.raises(SystemExit, match=message):
            call(latency, *arguments, "--output", tmp_path / "latency.json")
