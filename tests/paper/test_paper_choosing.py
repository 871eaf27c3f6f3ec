"""Which setting of co-training is chosen on the dev sets, and what the report says that it is worth."""

import statistics as naive

import pytest
from paper_grid import SEEDS, loss_of, make_cell, make_grid, metric_of, parse, row_of

from examples.paper import report


@pytest.fixture(scope="module")
def sections() -> dict[str, list[list[dict[str, str]]]]:
    return parse(report.write_report(make_grid()))


def gain(learner: str, theirs: tuple[str, str], shift: float = 0.0, against: float = 0.0) -> list[float]:
    """What co-training gains in loss, seed by seed; positive is better."""
    return [loss_of(*theirs, seed) + against - loss_of("ctcd", learner, seed) - shift for seed in SEEDS]


def test_settings_are_ranked_on_dev_with_what_they_are_worth_on_the_validation_set(sections) -> None:
    tried = [row for row in sections["All that were tried, (b)"][0] if row["measure"] == "MLM loss"]
    ranks = [float(row["dev"]) for row in tried]
    assert ranks == sorted(ranks, reverse=True)
    expected = {
        "as the baseline": gain("student", ("kd", "student")),
        "soft weights 0.5": gain("student", ("kd", "student"), 0.01),
        "soft weights 1, 0.25 for the teacher": gain("student", ("kd", "student"), 0.02),
        "temperature 2": gain("student", ("kd", "student"), 0.03),
        "soft warm-up 0.3": gain("student", ("kd", "student"), -0.04),
        "400 steps": gain("student", ("kd", "student"), 0.004),
        "soft weights 4, temperature 8": gain("student", ("kd", "student")),
    }
    for setting, gains in expected.items():
        row = row_of(tried, method="ctcd", setting=setting)
        assert (row["validation"], row["dev"]) == (f"{naive.mean(gains):+.4f}", f"{1.5 * naive.mean(gains):+.4f}")
        assert row["bootstrap interval"] == f"[{min(gains):+.4f}, {max(gains):+.4f}]"
    assert not any("rows" in row["setting"] for row in tried)  # no KD was trained on fewer rows
    assert {row["method"] for row in tried} == {"ctcd", "student-from-teacher", "community"}


def test_only_models_that_learn_from_the_one_beside_them_are_candidates(sections) -> None:
    methods = {claim: {row["method"] for row in sections[f"All that were tried, ({claim})"][0]} for claim in "abc"}
    assert methods["a"] == {"ctcd", "teacher-from-student", "community"}
    assert methods["c"] == {"ctcd", "student-from-teacher", "community"}


def test_the_choice_is_the_best_on_dev_even_where_another_is_better_on_the_validation_set() -> None:
    cells = [make_cell("mlm", method, seed) for method in ("alone", "ctcd") for seed in SEEDS]
    lucky = [make_cell("mlm", "ctcd", seed, shift=0.5, temperature=4.0) for seed in SEEDS]
    for cell in lucky:
        cell["models"]["teacher"]["scores"]["dev"]["loss"] = 0.1
    row = row_of(parse(report.write_report([*cells, *lucky]))["Choosing a setting on dev"][0], claim="(a)")
    gains = gain("teacher", ("alone", "teacher"), 0.5)
    assert (row["setting"], row["tried"], row["measure"]) == ("temperature 4", "2", "MLM loss")
    assert (row["validation"], row["verdict"]) == (f"{naive.mean(gains):+.4f}", "does not hold")


def test_settings_of_a_task_are_ranked_over_all_numbers_of_rows(sections) -> None:
    tried = [row for row in sections["All that were tried, (a)"][0] if row["measure"] == "RTE"]
    assert {(row["method"], row["setting"]) for row in tried} == {
        (method, setting)
        for method in ("ctcd", "community")
        for setting in ("4 epochs, all rows", "4 epochs, 2,000 rows")
    }
    gains = [metric_of("ctcd", "teacher", seed, "rte") - metric_of("alone", "teacher", seed, "rte") for seed in SEEDS]
    for row in tried:
        if row["method"] == "ctcd":
            assert row["validation"] == f"{naive.mean(gains):+.2f}"
