"""The benchmarks, but for the one of classification: they run, and what they compare computes the same."""

import os
import platform
import re
import sys
from dataclasses import replace

import pytest
import torch
from allocations import allocate, fragment

from examples.benchmarks import bench_checkpoints as checkpoints
from examples.benchmarks import bench_fused_linear as fused
from examples.benchmarks import bench_language_models as language_models
from examples.benchmarks import bench_scaling as scaling
from examples.benchmarks import measuring as common
from examples.benchmarks.peaks import peak_memory_of


def report(module, monkeypatch, capsys, *arguments: object) -> str:
    """What `main` of a benchmark prints."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def tables(text: str) -> list[list[list[str]]]:
    """The cells of the Markdown tables in a text, without the lines below their headers."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    lines = [[[cell.strip() for cell in line.strip("|").split("|")] for line in own.splitlines()] for own in found]
    return [[header, *rows] for header, _, *rows in lines]


def assert_figures(row: list[str]) -> None:
    """Times, ratio and, unless it is not compared, peak memory of a line under `COMPARISON_HEADER`."""
    assert all(float(cell) > 0 for cell in row[2:4])
    median, smallest, largest = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row[4]).groups())
    assert 0 < smallest <= median <= largest
    if row[6] != "-":
        assert float(row[8]) == pytest.approx(float(row[6]) / float(row[7]), rel=0.1)  # of rounded figures


# ---- peaks.py and measuring.py ----


def test_peak_memory_is_that_of_the_action_alone():
    allocate(300)  # a peak of this process, which must not count
    assert peak_memory_of(allocate, 100) == pytest.approx(100, abs=30)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about the allocator of glibc")
def test_live_memory_leaves_out_what_the_allocator_keeps():
    assert peak_memory_of(fragment) == pytest.approx(180, abs=30)
    assert peak_memory_of(fragment, live=True) == pytest.approx(100, abs=30)
    assert not any(name.startswith("MALLOC") for name in os.environ)


def test_actions_take_turns_and_change_the_order():
    order = []
    times = common.in_turns({name: lambda own=name: order.append(own) for name in "ab"}, rounds=2, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert [len(own) for own in times.values()] == [2, 2]


@pytest.mark.parametrize(
    ("targets", "verdict"),
    [((0.5, 0.6), "pass"), ((0.4, 0.6), "above target"), ((0.5, 0.4), "above target"), ((None, None), "-")],
)
def test_comparison_is_judged_by_the_median_time_and_by_the_peak(targets, verdict):
    seconds = [1.0, 1.0, 3.0], [2.0, 4.0, 6.0]
    row = common.comparison_row("work", "other", seconds, targets[0], (50.0, 100.0), targets[1])
    assert row[4] == "0.500 (0.250 to 0.500)"
    assert row[8] == "0.500"
    assert row[-1] == verdict


# ---- bench_checkpoints.py ----


def test_checkpoints_report(monkeypatch, capsys):
    ((header, *rows),) = tables(report(checkpoints, monkeypatch, capsys, "--quick", "--markdown"))
    assert header[2:] == ["ours (s)", "theirs (s)", "ratio (min to max)", "target", "verdict"]
    assert [row[5] for row in rows] == ["<= 1.10", "<= 1.10", "-"]
    for row in rows:
        assert_figures([*row[:5], *["-"] * 6])


def test_checkpoints_save_all_that_the_two_alone_save(tmp_path):
    """Otherwise the comparison would be of unlike things."""
    trainers = checkpoints.make_trainers(checkpoints.Workload(True, 1, str(tmp_path)), str(tmp_path))
    sizes = {}
    for variant, trainer in trainers.items():
        checkpoints.save(trainer)
        checkpoints.wait_for_disk(trainer)
        (folder,) = (tmp_path / variant).iterdir()
        sizes[variant] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    both, *alone = sizes.values()
    assert both == pytest.approx(sum(alone), rel=0.05)


# ---- bench_scaling.py ----


def test_scaling_report_counts_the_bytes_of_all_gradients(tmp_path, monkeypatch, capsys):
    ((header, *rows),) = tables(report(scaling, monkeypatch, capsys, "--quick", "--markdown", "--rounds", 1))
    assert [row[0] for row in rows] == ["teacher alone", "co-training"]
    assert [row[4] for row in rows] == ["-", ">= 1.70"]
    models = scaling.Workload(True, 1, str(tmp_path)).models
    teacher, student = (4 * sum(parameter.numel() for parameter in model.parameters()) for model in models)
    for row, size in zip(rows, (teacher, teacher + student), strict=True):
        cells = dict(zip(header, row, strict=True))
        assert float(cells["one process (samples/s)"]) > 0
        assert float(cells["two processes (samples/s)"]) > 0
        assert float(cells["gradients sent (MB a step)"]) == float(cells["parameters (MB)"]) == round(size / 1e6, 3)
        assert float(cells["of the teacher's"]) == round(size / teacher, 3)


# ---- bench_language_models.py ----


@pytest.mark.slow
def test_language_models_report(monkeypatch, capsys):
    text = report(language_models, monkeypatch, capsys, "--quick", "--markdown")
    (table,) = tables(text)
    assert table[0] == common.COMPARISON_HEADER
    others = ["the two plain steps", "naive co-distillation", "fused_lm_head=False"]
    assert [row[:2] for row in table[1:]] == [[work, other] for work in ("masked LM", "causal LM") for other in others]
    assert [(row[5], row[9]) for row in table[1:]] == [
        *(("<= 0.48", "<= 1.10"), ("<= 0.36", "<= 0.60"), ("-", "-")),
        *(("<= 0.90", "<= 1.10"), ("<= 0.45", "<= 0.40"), ("-", "-")),
    ]
    for row in table[1:]:
        assert_figures(row)
    assert len(re.findall(r"ours \d+ tokens per second", text)) == 2


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_variants_compute_the_same_loss_and_gradients_by_different_paths(name, tmp_path, caplog):
    """Otherwise the comparison would be between different things, or between equal ones."""
    caplog.set_level("INFO", logger="ctcd_trainer.pair.fused_heads")
    work = replace(language_models.WORKS[name].quick(), dropout=0.0)
    batch = language_models.batch_of(work)
    losses, gradients = {}, {}
    for variant in (language_models.OURS, language_models.UNFUSED, language_models.NAIVE):
        trainer = language_models.trainer_of(work, variant, str(tmp_path))
        trainer.model.train()  # in evaluation the pair gives logits, and so takes no fused pass
        losses[variant] = trainer.compute_loss(trainer.model, dict(batch))
        losses[variant].backward()
        models = trainer.model if variant == language_models.NAIVE else trainer.pair.learners
        parameters = {name: model.named_parameters() for name, model in models.items()}
        gradients[variant] = {(name, key): p.grad for name, own in parameters.items() for key, p in own}
    paths = [record.getMessage() for record in caplog.records if "language-model heads" in record.getMessage()]
    assert [("fused pass" in path, "fused_lm_head" in path) for path in paths] == [(True, False), (False, True)]
    expected = losses[language_models.NAIVE]
    for variant in (language_models.OURS, language_models.UNFUSED):
        torch.testing.assert_close(losses[variant].detach(), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients[variant], gradients[language_models.NAIVE], rtol=1e-4, atol=1e-6)


def test_masked_batch_scores_the_stated_share():
    labels = language_models.batch_of(language_models.WORKS["masked"])["labels"]
    assert labels.shape == (16, 128)
    assert (labels != -100).float().mean().item() == pytest.approx(0.15, abs=0.02)


# ---- bench_fused_linear.py ----


@pytest.mark.slow
def test_fused_linear_report_with_chunks_and_growth(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("matplotlib.image")
    figure = tmp_path / "figures" / "growth.png"
    options = ["--quick", "--markdown", "--chunk_size", 8, 16, "--plot", figure]
    text = report(fused, monkeypatch, capsys, *options)
    comparison, chunks, positions, vocabulary = tables(text)

    assert comparison[0] == common.COMPARISON_HEADER
    assert [(row[5], row[9]) for row in comparison[1:]] == [
        *(("<= 0.52", "<= 0.25"), ("<= 0.95", "<= 0.60"), ("<= 1.35", "-"))
    ]
    assert comparison[3][1].startswith("matrix products, ")
    for row in comparison[1:]:
        assert_figures(row)

    assert [row[0] for row in chunks[1:]] == ["default", "8", "16"]
    assert [row[0] for row in positions] == ["positions", "8", "16"]
    assert [row[0] for row in vocabulary] == ["vocabulary", "64", "128"]
    assert all(float(cell) > 0 for table in (positions, vocabulary) for row in table[1:] for cell in row[1:7])
    assert image.imread(figure)[..., :3].std() > 0.05  # something is drawn


def test_fused_and_naive_give_the_same_loss_and_gradients():
    problem = fused.Problem(fused.Size(33, 50, (16, 8)))
    loss = problem.run(fused.OURS, chunk_size=8)
    gradients = [tensor.grad for tensor in problem.hidden + problem.weights]
    torch.testing.assert_close(loss, problem.run(fused.NAIVE), rtol=1e-5, atol=0)
    expected = [tensor.grad for tensor in problem.hidden + problem.weights]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_products_are_those_of_a_backward_pass(chunk_size):
    """With the logits in the place of their gradients, as of half the sum of their squares."""
    problem = fused.Problem(fused.Size(33, 50, (16, 8)))
    problem.run(fused.PRODUCTS, chunk_size)
    products = [tensor.grad for tensor in problem.hidden + problem.weights]
    tensors = [tensor.detach().requires_grad_() for tensor in problem.hidden + problem.weights]
    sum(((h @ w.t()) ** 2).sum() / 2 for h, w in zip(tensors[:2], tensors[2:], strict=True)).backward()
    torch.testing.assert_close(products, [tensor.grad for tensor in tensors], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(fused.Size, "fits", lambda size, variant: variant != fused.NAIVE or size.positions < 16)
    grown = fused.sweep("positions", [8, 16], fused.Size(8, 50, (16, 8)), rounds=1)
    assert [line[2] == "nan" for line in grown.lines()[1:]] == [False, True]
    assert all(time > 0 for time in grown.seconds[fused.OURS])


def test_growth_of_a_linear_time_has_the_exponent_one():
    sizes = [fused.Size(positions, 50) for positions in (256, 512, 1024, 2048)]
    times = {fused.NAIVE: [1.0, 2.0, 4.0, float("nan")], fused.OURS: [1.0, 4.0, 16.0, 64.0]}
    grown = fused.Sweep("positions", sizes, times, {})
    assert grown.exponent(fused.NAIVE) == pytest.approx(1.0)
    assert grown.exponent(fused.OURS) == pytest.approx(2.0)
