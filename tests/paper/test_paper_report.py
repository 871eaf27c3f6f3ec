"""The tables of the paper's report: the right numbers in the right cells, whether or not a grid has ended."""

import random
import statistics as naive

import pytest
from paper_grid import (
    GAINS,
    GLUE,
    LATENCY,
    SEEDS,
    SOFT,
    TRAINED,
    Result,
    loss_of,
    make_cell,
    make_grid,
    metric_of,
    over_seeds,
    parse,
    row_of,
)

from examples.paper import ablations, grouping, report

PRETRAINING, FINETUNING = "Pre-training", "Fine-tuning: every pre-trained model by itself"
CLAIM_A = "(a) The co-trained teacher beats the teacher trained alone"
CLAIM_B = "(b) The co-trained student beats the student of KD"
CLAIM_C = "(c) The co-trained student beats the teacher trained alone"
ABLATIONS = "Pre-training: MLM loss"


@pytest.fixture(scope="module")
def grid() -> list[Result]:
    return make_grid()


@pytest.fixture(scope="module")
def sections(grid) -> dict[str, list[list[dict[str, str]]]]:
    return parse(report.write_report(grid, LATENCY))


# ---- The tables ----


@pytest.mark.parametrize("method", GAINS)
def test_pretraining_table_has_the_mean_loss_of_the_baseline_alone(sections, method: str) -> None:
    row = row_of(sections[PRETRAINING][0], method=method)
    for learner in ("teacher", "student"):
        losses = [loss_of(method, learner, seed) for seed in SEEDS]
        trained = learner in TRAINED.get(method, ("teacher", "student"))
        assert row[f"{learner}, validation loss"] == (over_seeds(losses, 3) if trained else "-")
    assert row["seeds"] == "3"


def test_compute_of_a_run_is_beside_the_scores(sections) -> None:
    row = row_of(sections[PRETRAINING][1], method="ctcd")
    assert (row["tokens (M)"], row["FLOPs"], row["seconds"]) == ("0.41", "4.00e+13", "510")
    assert [row["method"] for row in sections[PRETRAINING][1]] == list(GAINS)


def test_a_run_that_was_held_up_does_not_count_in_the_time_of_the_others(grid) -> None:
    cells = [{**cell, "compute": {**cell["compute"]}} for cell in grid]
    slow = next(c for c in cells if (c["cell"]["task"], c["cell"]["method"], c["cell"]["seed"]) == ("mlm", "kd", 2))
    slow["compute"]["seconds"] = 1e6
    assert row_of(parse(report.write_report(cells))[PRETRAINING][1], method="kd")["seconds"] == "510"


@pytest.mark.parametrize(("method", "learner"), [("ctcd", "teacher"), ("kd", "student"), ("reversed", "teacher")])
def test_every_method_is_compared_with_the_same_model_alone_seed_by_seed(sections, method: str, learner: str) -> None:
    gains = [loss_of(method, learner, seed) - loss_of("alone", learner, seed) for seed in SEEDS]
    row = row_of(sections[PRETRAINING][0], method=method)
    assert row[f"{learner} - alone"] == f"{naive.mean(gains):+.3f} ± {naive.stdev(gains):.3f}"


def test_compute_is_beside_the_scores_of_models_fine_tuned_and_of_pairs(sections) -> None:
    row = row_of(sections[FINETUNING][2], task="RTE", model="student")
    assert (row["runs"], row["steps"], row["FLOPs"]) == ("21", "100", "2.00e+13")  # of 7 methods with 3 seeds
    row = row_of(sections["Compute of co-training"][0], task="CoLA, 2,000 rows", method="reversed")
    assert (row["runs"], row["steps"], row["tokens (M)"], row["seconds"]) == ("3", "100", "0.205", "510")


@pytest.mark.parametrize(("method", "learner"), [("alone", "teacher"), ("kd", "student"), ("ctcd", "student")])
def test_finetuned_models_are_rows_of_the_method_that_pretrained_them(sections, method: str, learner: str) -> None:
    metrics, qualities = (row_of(table, method=method, model=learner) for table in sections[FINETUNING][:2])
    for task, name in zip(GLUE, ("CoLA", "RTE", "STS-B"), strict=True):
        assert metrics[name] == over_seeds([metric_of(method, learner, seed, task) for seed in SEEDS], 1)
    averages = [naive.mean(metric_of(method, learner, seed, task) for task in GLUE) for seed in SEEDS]
    assert metrics["average of 3"] == over_seeds(averages, 1)
    losses = [loss_of(method, learner, seed, "rte") for seed in SEEDS]
    assert qualities["RTE NLL"] == over_seeds(losses, 3)
    assert qualities["RTE calibration error"] == over_seeds([loss / 100 for loss in losses], 3)
    assert "STS-B MSE" in qualities
    assert "STS-B calibration error" not in qualities


def test_copies_of_models_have_no_rows(sections) -> None:
    rows = {(row["method"], row["model"]) for row in sections[FINETUNING][0]}
    assert len(rows) == 14
    assert not {("kd", "teacher"), ("reversed", "student")} & rows


def test_cotraining_has_a_table_for_each_task_and_number_of_labels(sections) -> None:
    for rows, shift in (("2,000 rows", 0.5), ("all rows", 0.0)):
        row = row_of(sections[f"RTE, {rows}"][0], method="ctcd")
        losses = [loss_of("ctcd", "student", seed, "rte", shift) for seed in SEEDS]
        assert row["student, RTE NLL"] == over_seeds(losses, 3)
        metrics = [metric_of("ctcd", "teacher", seed, "rte", shift) for seed in SEEDS]
        assert row["teacher, RTE"] == over_seeds(metrics, 1)


def test_models_are_described_with_their_latency(sections) -> None:
    row = row_of(sections["Size and latency"][0], model="student")
    assert (row["layers"], row["parameters (M)"], row["CPU latency (ms)"]) == ("3", "17.4", "10.8")


# ---- The claims ----


@pytest.mark.parametrize(
    ("claim", "ours", "theirs"),
    [
        (CLAIM_A, ("ctcd", "teacher"), ("alone", "teacher")),
        (CLAIM_B, ("ctcd", "student"), ("kd", "student")),
        (CLAIM_C, ("ctcd", "student"), ("alone", "teacher")),
        (CLAIM_B, ("community", "student"), ("community-kd", "student")),
        (CLAIM_C, ("community", "student"), ("community-kd", "teacher")),
    ],
)
def test_claims_compare_the_right_models_seed_by_seed(sections, claim: str, ours, theirs) -> None:
    names = f"{' '.join(ours)} - {' '.join(theirs)}"
    (table,) = sections[claim]
    gains = [loss_of(*theirs, seed) - loss_of(*ours, seed) for seed in SEEDS]
    row = row_of(table, protocol="pre-training", measure="MLM loss", difference_of=names)
    assert row["mean"] == f"{naive.mean(gains):+.4f}"
    assert row["bootstrap interval"] == f"[{min(gains):+.4f}, {max(gains):+.4f}]"
    assert row["verdict"] == ("holds" if min(gains) > 0 else "does not hold" if max(gains) < 0 else "undecided")
    row = row_of(table, protocol="co-trained, 2,000 rows", measure="average of 3 tasks", difference_of=names)
    averages = [
        naive.mean(metric_of(*ours, seed, task) - metric_of(*theirs, seed, task) for task in GLUE) for seed in SEEDS
    ]
    assert row["mean"] == f"{naive.mean(averages):+.2f}"
    row = row_of(table, protocol="co-trained, all rows", measure="RTE calibration error", difference_of=names)
    errors = [loss_of(*theirs, seed, "rte") / 100 - loss_of(*ours, seed, "rte") / 100 for seed in SEEDS]
    assert row["mean"] == f"{naive.mean(errors):+.4f}"


def test_the_tally_counts_what_the_t_interval_shows_as_well(sections, grid) -> None:
    (table,) = sections[CLAIM_A]
    rows = [row for row in table if row["difference of"] == "ctcd teacher - alone teacher"]
    held = [row for row in rows if row["verdict"] == "holds"]
    by_t = sum(float(row["t interval"].strip("[]").split(", ")[0]) > 0 for row in held)
    assert 0 < by_t <= len(held)
    assert f"({len(rows)} measures)" in report.write_report(grid)
    assert f"holds {len(held)} ({by_t} of them by the t interval as well)" in report.write_report(grid)


def test_ties_are_undecided() -> None:
    cells = []
    for seed in SEEDS:
        cells.append(make_cell("mlm", "alone", seed))
        cells.append(make_cell("mlm", "ctcd", seed, scored_as="alone"))
    row = row_of(parse(report.write_report(cells))[CLAIM_A][0], measure="MLM loss")
    assert (row["mean"], row["verdict"]) == ("+0.0000", "undecided")


def test_one_seed_gives_numbers_without_spread_and_no_interval() -> None:
    text = report.write_report(make_grid((4,)))
    row = row_of(parse(text)[CLAIM_A][0], protocol="pre-training", difference_of="ctcd teacher - alone teacher")
    assert (row["bootstrap interval"], row["t interval"], row["seeds"], row["verdict"]) == ("-", "-", "1", "one seed")
    assert row_of(parse(text)[PRETRAINING][0], method="ctcd")["teacher, validation loss"] == (
        f"{loss_of('ctcd', 'teacher', 4):.3f}"
    )
    assert "1 seed (4)" in text


def test_a_second_frozen_teacher_makes_a_method_of_its_own() -> None:
    cells = [make_cell("mlm", "alone", 0)]
    for method, shift in (("community", 0.0), ("community-kd", 0.5)):
        cells += [make_cell("mlm", method, 0), make_cell("mlm", method, 0, shift, pretrained_teacher="prepared")]
    found = parse(report.write_report(cells))
    assert [row["method"] for row in found[PRETRAINING][0]] == [
        *("alone", "community", "community (prepared)", "community-kd", "community-kd (prepared)")
    ]
    names = "community (prepared) teacher - community-kd (prepared) teacher"
    gain = loss_of("community-kd", "teacher", 0) + 0.5 - loss_of("community", "teacher", 0)
    assert row_of(found[CLAIM_A][0], difference_of=names)["mean"] == f"{gain:+.4f}"


# ---- The ablations ----


@pytest.mark.parametrize(
    ("axis", "value", "shift"),
    [
        ("hard : soft weight", "1 : 0.5", 0.01),
        ("hard : soft weight", "1 : 1 (teacher 1 : 0.25)", 0.02),
        ("temperature", "2", 0.03),
        ("soft warm-up (share of the steps)", "0.3", -0.04),
        ("length of training", "400 steps", 0.004),  # against "alone" of 400 steps, whose losses are 9 above
        ("rows (passes)", "400 (8 passes)", 0.0),
        ("temperature", "**1**", 0.0),
    ],
)
def test_ablations_compare_with_the_models_alone_of_the_same_training(sections, axis, value, shift) -> None:
    row = row_of(sections[ABLATIONS][0], axis=axis, value=value)
    for learner in ("teacher", "student"):
        gains = [loss_of("ctcd", learner, seed) + shift - loss_of("alone", learner, seed) for seed in SEEDS]
        assert row[f"validation: {learner} - alone"] == f"{naive.mean(gains):+.4f} ± {naive.stdev(gains):.4f}"
        assert row[f"dev: {learner} - alone"] == f"{1.5 * naive.mean(gains):+.4f} ± {1.5 * naive.stdev(gains):.4f}"
    if axis != "rows (passes)":  # no KD was trained on fewer rows
        gains = [loss_of("ctcd", "student", seed) + shift - loss_of("kd", "student", seed) for seed in SEEDS]
        assert row["validation: student - kd"].startswith(f"{naive.mean(gains):+.4f}")
    else:
        assert row["validation: student - kd"] == "-"


def test_kd_at_the_same_temperature_is_preferred_to_the_baseline(grid) -> None:
    cells = [*grid, *(make_cell("mlm", "kd", seed, temperature=2.0, shift=1.0) for seed in SEEDS)]
    row = row_of(parse(report.write_report(cells))[ABLATIONS][0], axis="temperature", value="2")
    gains = [loss_of("ctcd", "student", seed) + 0.03 - loss_of("kd", "student", seed) - 1.0 for seed in SEEDS]
    assert row["validation: student - kd"].startswith(f"{naive.mean(gains):+.4f}")


def test_each_direction_alone_is_an_axis(sections) -> None:
    rows = [row for row in sections[ABLATIONS][0] if row["axis"] == "who learns"]
    assert [row["value"] for row in rows] == ["**both**", "student from teacher", "teacher from student"]


def test_cells_that_differ_in_two_axes_are_counted_and_left_out(grid) -> None:
    assert "3 co-trainings differ from the baseline in several axes" in report.write_report(grid)
    experiments = grouping.arrange(grid)
    labels = [variant.label for variant in ablations.variants(experiments.pretraining, experiments.baseline)]
    assert not {"8", "1 : 4"} & set(labels)


def test_the_baseline_is_the_setting_of_most_cells(grid) -> None:
    experiments = grouping.arrange(list(reversed(grid)))
    chosen = {name: experiments.baseline[name] for name in ("steps", "rows", *SOFT)}
    assert chosen == {"steps": 200, "rows": None, **SOFT, "teacher_soft_weight": 1.0}
    assert len(experiments.pretrained) == len(GAINS) * len(SEEDS)


def test_models_alone_belong_to_the_baseline_and_do_not_decide_it() -> None:
    cells = [*(make_cell("mlm", "alone", seed) for seed in SEEDS), make_cell("mlm", "ctcd", 0, temperature=2.0)]
    experiments = grouping.arrange(cells)
    assert experiments.baseline["temperature"] == 2.0
    assert len(experiments.pretrained) == 4


def test_models_of_other_pretrainings_have_a_table_of_their_own(grid, sections) -> None:
    more = []
    for seed in SEEDS:
        start = make_cell("mlm", "ctcd", seed, steps=800, teacher_init="scratch")
        origin = {"start": start["key"], "learner": "teacher", "learners": ("teacher",), "scored_as": "ctcd"}
        more += [start, make_cell("rte", "alone", seed, shift=0.3, steps=None, epochs=3.0, **origin)]
    found = parse(report.write_report([*grid, *more]))
    assert found[FINETUNING] == sections[FINETUNING]
    ((row,),) = found["Pre-trained with 800 steps, teacher scratch, fine-tuned"]
    expected = over_seeds([metric_of("ctcd", "teacher", seed, "rte", 0.3) for seed in SEEDS], 1)
    assert row == {"method": "ctcd", "model": "teacher", "RTE": expected, "average of 1": expected, "seeds": "3"}


# ---- Grids that have not ended ----


@pytest.mark.parametrize("seed", range(12))
def test_any_part_of_a_grid_makes_a_report(grid, seed: int) -> None:
    rng = random.Random(seed)
    part = rng.sample(grid, rng.randint(1, len(grid) // 4))
    if all(result["cell"]["start"] for result in part):
        with pytest.raises(ValueError, match="pre-trainings"):
            report.write_report(part, LATENCY)
        return
    text = report.write_report(part, LATENCY)
    pretrained = grouping.arrange(part).pretrained
    rows = parse(text).get(PRETRAINING, [[]])[0]
    assert {row["method"] for row in rows} == {result["cell"]["method"] for result in pretrained}


def test_missing_scores_curves_and_compute_are_left_out(grid) -> None:
    bare = [
        {
            **result,
            "curve": [],
            "compute": {},
            "environment": {},
            "models": {name: {"scores": {}} for name in result["models"]},
        }
        for result in grid
    ]
    found = parse(report.write_report(bare))
    assert row_of(found[PRETRAINING][0], method="ctcd")["teacher, validation loss"] == "-"
    assert CLAIM_A not in found
