"""The fused losses of language-model heads equal `F.cross_entropy` of full logits, and the divergences as defined."""

import math

import pytest
import torch
from torch.nn import functional as F

from ctcd_trainer.graph import EDGES, Edge
from ctcd_trainer.losses.fused_linear import LinearHead, ScoredPositions, linear_losses

POSITIONS = 11
BOTH = {"teacher": 1.0, "student": 1.0}


def make_head(width, vocabulary, seed, dtype=torch.float32, bias=True, positions=POSITIONS, **settings):
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return LinearHead(new(positions, width), new(vocabulary, width), new(vocabulary) if bias else None, **settings)


def make_labels(vocabulary, positions=POSITIONS):
    return torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(9))


def tensors_of(heads):
    return [t for head in heads.values() for t in (head.hidden, head.weight, head.bias) if t is not None]


def naive_logits(head):
    z = head.scale * (head.hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def naive_soft(learner, source, name, tau):
    """By definition, with probabilities; `source` detached; sum over the positions."""
    shared = min(learner.shape[1], source.shape[1])
    learner, source = learner[:, :shared], source.detach()[:, :shared]
    if name == "mse":
        return ((learner - source) ** 2).mean(1).sum()
    q, p = torch.softmax(learner / tau, 1), torch.softmax(source / tau, 1)
    if name == "kl":
        return tau**2 * (p * (p.log() - q.log())).sum()
    if name == "reverse_kl":
        return tau**2 * (q * (q.log() - p.log())).sum()
    assert name == "js"
    m = (p + q) / 2
    return tau**2 * 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())


def naive_gates(learner, source, labels, gate):
    """The factor of each position, by definition."""
    learner, source = torch.softmax(learner.detach(), 1), torch.softmax(source.detach(), 1)
    if gate == "correct":
        return (source.argmax(1) == labels).to(source.dtype)
    if gate == "wsl":
        positions = torch.arange(len(labels))
        return 1 - torch.exp(-learner[positions, labels].log() / source[positions, labels].log())
    return 1 + (source * source.log()).sum(1) / math.log(source.shape[1])


def naive_losses(heads, labels, hard_weights, edges, name, tau):
    z = {learner: naive_logits(head) for learner, head in heads.items()}
    values = {f"{m}_hard_loss": F.cross_entropy(z[m], labels, reduction="sum") for m in hard_weights}
    gates = {e.gate_name: naive_gates(z[e.learner], z[e.source], labels, e.gate) for e in edges if e.gate != "none"}
    for e in edges:
        settings = e.soft_loss or name, e.temperature or tau
        factors = gates.get(e.gate_name, torch.ones(len(labels)))
        rows = zip(factors, z[e.learner].split(1), z[e.source].split(1), strict=True)
        soft = sum((factor * naive_soft(*pair, *settings) for factor, *pair in rows), torch.zeros(()))
        values[e.loss_name] = naive_soft(z[e.learner], z[e.source], *settings) if e.gate == "none" else soft
    weights = [*hard_weights.values(), *(e.weight for e in edges)]
    total = sum(w * v for w, v in zip(weights, values.values(), strict=True))
    return total, values | {gate: factors.sum() for gate, factors in gates.items()}


def check(heads, labels, hard_weights, edges, name="kl", tau=1.0, rtol=1e-5, **options):
    """Loss, its parts and all gradients are those of the naive computation."""
    tensors = [t for t in tensors_of(heads) if t.requires_grad]
    expected, expected_values = naive_losses(heads, labels, hard_weights, edges, name, tau)
    expected_grads = torch.autograd.grad(expected, tensors, allow_unused=True)
    total, values = linear_losses(heads, labels, hard_weights, edges, name, tau, **options)
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    torch.testing.assert_close(total, expected, rtol=rtol, atol=1e-6, check_dtype=False)
    assert values.keys() == expected_values.keys()
    for key, value in values.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected_values[key], rtol=10 * rtol, atol=1e-6, check_dtype=False)
    for grad, wanted, tensor in zip(grads, expected_grads, tensors, strict=True):
        if wanted is None:
            assert grad is None or not grad.any()
            continue
        assert grad.dtype == tensor.dtype
        scale = wanted.abs().max().item()
        torch.testing.assert_close(grad, wanted, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "mse"])
def test_loss_and_gradients_equal_full_logits(name, tau):
    heads = {"teacher": make_head(6, 37, 1), "student": make_head(4, 37, 2)}
    check(heads, make_labels(37), BOTH, EDGES[:2], name, tau)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "mse"])
def test_every_weight_and_a_frozen_third_model_count(name):
    heads = {"teacher": make_head(6, 37, 1), "student": make_head(4, 37, 2)}
    frozen = make_head(5, 37, 3)
    heads["pretrained"] = LinearHead(frozen.hidden.detach(), frozen.weight.detach(), frozen.bias.detach())
    edges = [Edge(e.source, e.learner, weight) for e, weight in zip(EDGES, (0.5, 2.0, 0.3, 0.7), strict=True)]
    check(heads, make_labels(37), {"teacher": 0.4, "student": 1.7}, edges, name, 2.0)


@pytest.mark.parametrize(
    ("hard_weights", "edges"),
    [({"student": 1.0}, EDGES[:1]), ({"teacher": 1.0}, EDGES[1:2]), (BOTH, ()), ({}, EDGES[:2])],
    ids=["kd", "reversed", "standalone", "soft losses alone"],
)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_each_mode_trains_the_right_models(hard_weights, edges, tau):
    heads = {"teacher": make_head(6, 37, 1), "student": make_head(4, 37, 2)}
    check(heads, make_labels(37), hard_weights, edges, tau=tau)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "mse"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_vocabularies_of_two_sizes_are_compared_on_the_shared_ids(name, tau):
    heads = {"teacher": make_head(6, 37, 1), "student": make_head(4, 40, 2)}
    check(heads, make_labels(37), BOTH, EDGES[:2], name, tau)
    check(
        {"teacher": make_head(6, 40, 1), "student": make_head(4, 37, 2)}, make_labels(37), BOTH, EDGES[:2], name, tau
    )


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "mse"])
def test_scale_softcap_and_missing_bias_are_honoured(name):
    heads = {"teacher": make_head(6, 37, 1, softcap=3.0), "student": make_head(4, 37, 2, bias=False, scale=0.3)}
    check(heads, make_labels(37), BOTH, EDGES[:2], name, 2.0)
    check(
        {"teacher": make_head(6, 37, 1, softcap=3.0, scale=2.0), "student": make_head(4, 37, 2)},
        make_labels(37),
        BOTH,
        (),
    )


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
def test_the_size_of_a_chunk_changes_nothing(chunk_size):
    heads = {"teacher": make_head(6, 37, 1), "student": make_head(4, 37, 2)}
    check(heads, make_labels(37), BOTH, EDGES[:2], "js", 2.0, chunk_size=chunk_size)


def test_many_blocks_within_many_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr("ctcd_trainer.losses.fused_linear._CPU_BLOCK_BYTES", 1)
    heads = {"teacher": make_head(6, 37, 1, positions=70), "student": make_head(4, 37, 2, positions=70)}
    check(heads, make_labels(37, 70), BOTH, EDGES[:2], chunk_size=16)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "mse"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_gradcheck_in_double_precision(name, tau):
    # The gradients of the soft losses are those for fixed sources, so one direction at a time, from constants.
    student = make_head(3, 7, 2, torch.float64, positions=5, softcap=2.0, scale=0.7)
    teacher = make_head(4, 7, 1, torch.float64, positions=5)
    fixed = LinearHead(teacher.hidden.detach(), teacher.weight.detach(), teacher.bias.detach())

    def loss(hidden, weight, bias):
        heads = {"teacher": fixed, "student": LinearHead(hidden, weight, bias, student.scale, student.softcap)}
        return linear_losses(heads, make_labels(7, 5), {"student": 0.6}, EDGES[:1], name, tau, chunk_size=2)[0]

    assert torch.autograd.gradcheck(loss, (student.hidden, student.weight, student.bias))


def test_no_position_gives_zero_and_zero_gradients():
    heads = {"teacher": make_head(6, 37, 1, positions=0), "student": make_head(4, 37, 2, positions=0)}
    total, values = linear_losses(heads, make_labels(37, 0), BOTH, EDGES[:2])
    total.backward()
    assert total == 0
    assert all(value == 0 for value in values.values())
    for tensor in tensors_of(heads):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_only_what_requires_gradients_gets_them():
    teacher, student = make_head(6, 37, 1), make_head(4, 37, 2)
    heads = {
        "teacher": LinearHead(teacher.hidden, teacher.weight.detach(), teacher.bias.detach()),  # as LoRA trains it
        "student": LinearHead(student.hidden.detach(), student.weight, student.bias),
    }
    check(heads, make_labels(37), BOTH, EDGES[:2])


def test_the_backward_scales_the_gradients_and_a_second_one_adds_the_same():
    heads = {"teacher": make_head(6, 37, 1), "student": make_head(4, 37, 2)}
    naive, _ = naive_losses(heads, make_labels(37), BOTH, EDGES[:2], "kl", 1.0)
    expected = torch.autograd.grad(3 * naive, tensors_of(heads))
    total, _ = linear_losses(heads, make_labels(37), BOTH, EDGES[:2])
    for times in (1, 2):
        (3 * total).backward(retain_graph=True)
        for tensor, wanted in zip(tensors_of(heads), expected, strict=True):
            torch.testing.assert_close(tensor.grad, times * wanted, rtol=1e-5, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_as_close_to_fp32_as_products_in_that_dtype_are(name, dtype):
    def scaled(width, seed):
        head = make_head(width, 400, seed)
        return LinearHead(head.hidden, (head.weight.detach() * 0.3).requires_grad_(), head.bias)

    heads = {"teacher": scaled(32, 1), "student": scaled(16, 2)}
    labels = make_labels(400)
    expected, values = naive_losses(heads, labels, BOTH, EDGES[:2], name, 2.0)
    expected_grads = torch.autograd.grad(expected, tensors_of(heads))
    with torch.autocast("cpu", dtype=dtype):
        total, own = linear_losses(heads, labels, BOTH, EDGES[:2], name, 2.0)
    grads = torch.autograd.grad(total, tensors_of(heads))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=0)
    for key, value in own.items():
        torch.testing.assert_close(value, values[key], rtol=3 * tolerance, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - wanted).norm() <= tolerance * wanted.norm()


def test_half_precision_weights_get_gradients_in_their_dtype_summed_in_fp32():
    """With many positions, a sum in bf16 would stop growing: 256 + 1 is 256 there."""
    count = 2048
    weight = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    head = LinearHead(torch.ones(count, 1, dtype=torch.bfloat16), weight)
    total, _ = linear_losses(
        {"teacher": head}, torch.zeros(count, dtype=torch.long), {"teacher": 1.0}, (), chunk_size=8
    )
    total.backward()
    assert weight.grad.dtype == torch.bfloat16
    third = count / 3
    torch.testing.assert_close(
        weight.grad.float().flatten(), torch.tensor([-2 * third, third, third]), rtol=1e-2, atol=0
    )


def test_small_gradients_survive_fp16():
    """Probabilities of 1e-7 over a large vocabulary are below what fp16 holds."""
    vocabulary = 60_000
    head = make_head(4, vocabulary, 1, positions=4)
    small = LinearHead(head.hidden, (head.weight.detach() * 1e-2).requires_grad_(), None)
    wanted = torch.autograd.grad(
        F.cross_entropy(naive_logits(small), make_labels(9, 4), reduction="sum"), small.weight
    )[0]
    with torch.autocast("cpu", dtype=torch.float16):
        total, _ = linear_losses({"teacher": small}, make_labels(9, 4), {"teacher": 1.0}, ())
    grad = torch.autograd.grad(total, small.weight)[0]
    torch.testing.assert_close(grad[9:].sum(), wanted[9:].sum(), rtol=1e-2, atol=1e-5)
    assert (grad - wanted).norm() <= 5e-3 * wanted.norm()


def test_many_positions_of_one_label_do_not_overflow_fp16():
    """Their sum is far beyond the largest number of fp16, 65,504, before it is divided by their number."""
    count = 4096
    generator = torch.Generator().manual_seed(0)
    hidden = (20 + torch.randn(count, 4, generator=generator)).requires_grad_()
    head = LinearHead(hidden, (1e-3 * torch.randn(50, 4, generator=generator)).requires_grad_())
    labels = torch.zeros(count, dtype=torch.long)
    naive = F.cross_entropy(naive_logits(head), labels, reduction="sum")
    wanted = torch.autograd.grad(naive, head.weight)[0]
    assert wanted.abs().max() > 65_504
    for chunk_size in (None, 64, 4096):
        with torch.autocast("cpu", dtype=torch.float16):
            total, _ = linear_losses({"teacher": head}, labels, {"teacher": 1.0}, (), chunk_size=chunk_size)
        grad = torch.autograd.grad(total, head.weight)[0]
        assert (grad - wanted).norm() <= 5e-3 * wanted.norm()


def test_the_logits_of_all_positions_never_exist_at_once():
    """The largest tensor that the pass makes is a chunk, not positions x vocabulary."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    heads = {"teacher": make_head(6, 500, 1, positions=256), "student": make_head(4, 500, 2, positions=256)}
    with Watch():
        total, _ = linear_losses(heads, make_labels(500, 256), BOTH, EDGES[:2], "js", 2.0, chunk_size=16)
        total.backward()
    assert largest <= max(16 * 500, 500 * 6, 256 * 6)


def test_scored_positions_are_selected_in_order():
    targets = torch.tensor([[-100, 5, -100], [7, -100, 3]])
    scored = ScoredPositions(targets)
    assert scored.labels.tolist() == [5, 7, 3]
    assert scored.index.tolist() == [1, 3, 5]
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    assert torch.equal(scored.select(hidden), hidden[targets != -100])


def test_a_head_makes_the_logits_that_its_fields_say():
    head = make_head(6, 37, 1, scale=0.5, softcap=3.0)
    torch.testing.assert_close(head.logits(), naive_logits(head))
