"""The pair as a model: it returns its loss, and it can be used as the teacher that it stands for."""

import copy
import pickle
import re

import pytest
import torch
from accelerate.utils import convert_to_fp32
from naive_losses import naive_losses
from peft import LoraConfig, get_peft_model
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import VOCAB_SIZE, rows_of, tiny_batch, tiny_model
from tiny_tokenizer import bert_tokenizer, gpt2_tokenizer
from torch import nn
from torch.utils import _pytree as pytree
from transformers import TrainerCallback, pipeline
from transformers.trainer_utils import _is_peft_model
from transformers.utils import ModelOutput

from ctcd_trainer import CoDistillationOutput, make_pair
from ctcd_trainer.arguments import DistillationArguments

FAMILIES = {
    "masked-lm": ("bert", "distilbert"),
    "causal-lm": ("gpt2", "llama"),
    "seq2seq-lm": ("t5", "bart"),
    "token-classification": ("bert", "distilbert"),
    "question-answering": ("bert", "distilbert"),
}


def tiny_pair(head: str = "causal-lm", arguments: DistillationArguments | None = None, **settings):
    teacher, student = FAMILIES[head]
    models = tiny_model(teacher, head, 2, seed=1, **settings), tiny_model(student, head, 1, seed=2, **settings)
    return make_pair(*models, arguments)


def unlabelled(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "start_positions", "end_positions")}


def equal(first, second) -> bool:
    """Whether all tensors in two structures are equal, bit for bit."""
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


# ---- Its output ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", list(FAMILIES))
def test_it_returns_all_losses_and_what_the_teacher_returns(head, training):
    pair, batch = (
        tiny_pair(head, DistillationArguments(temperature=2.0, student_from_teacher_weight=0.5)),
        tiny_batch(head),
    )
    expected = naive_losses(head, pair.teacher, pair.student, batch, tau=2.0)
    alone = pair.teacher.train(training)(**pair.named_inputs(pair.teacher, batch))

    output = pair.train(training)(**batch, return_logits=True)

    assert isinstance(output, ModelOutput)
    assert output.losses.keys() == {f"{name}_loss" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[f"{name}_loss"], value)
    weights = {"student_from_teacher": 0.5}
    torch.testing.assert_close(output.loss, sum(weights.get(name, 1.0) * value for name, value in expected.items()))
    assert output.outputs.keys() == {"teacher", "student"}
    names = alone.keys() - {"loss", "past_key_values"}
    assert {"start_logits", "end_logits"} <= names if head == "question-answering" else "logits" in names
    for name in names:
        assert equal(output[name], alone[name]), name
        assert equal(getattr(output, name), output.outputs["teacher"][name])
    whole = pair(**batch, return_logits=True, num_items_in_batch=2 * pair.task.counted(batch).ne(-100).sum())
    torch.testing.assert_close(whole.losses, {name: value / 2 for name, value in output.losses.items()})


@pytest.mark.parametrize("training", [True, False])
def test_without_labels_there_is_no_loss(training):
    pair, batch = tiny_pair().train(training), tiny_batch("causal-lm")
    for _ in range(2):  # also when a batch with labels has made the pair run without logits
        output = pair(**unlabelled(batch))
        assert output.loss is None
        assert not output.losses
        assert equal(output.logits, pair.teacher(**unlabelled(batch)).logits)
        pair(**batch)
    assert pair.fused_heads.used is (True if training else None)


@pytest.mark.parametrize("head", ["causal-lm", "classification"])
def test_labels_that_are_none_are_no_labels(head):
    pair = tiny_pair() if head == "causal-lm" else make_pair(tiny_bert(2), tiny_bert(1))
    batch = tiny_batch("causal-lm") if head == "causal-lm" else collate(tiny_rows(4))
    for training in (True, False):
        output = pair.train(training)(**{**batch, "labels": None})
        assert output.loss is None
        assert not output.losses
    assert pair(**{**batch, "labels": None}, learner="student").get("loss") is None


def test_a_language_model_in_training_returns_no_logits_unless_they_are_asked_for():
    pair, batch = tiny_pair(), tiny_batch("causal-lm")
    fused, whole = pair(**batch), pair(**batch, return_logits=True)
    assert list(fused) == ["loss", "losses"]
    with pytest.raises(AttributeError, match=r"no 'logits'.*`return_logits=True`"):
        _ = fused.logits
    assert whole.logits.shape == (*batch["labels"].shape, VOCAB_SIZE)
    torch.testing.assert_close((fused.loss, fused.losses), (whole.loss, whole.losses))
    with torch.no_grad():
        assert pair(**batch).logits is not None


def test_it_takes_the_options_of_the_teachers_forward():
    pair, batch = tiny_pair().eval(), tiny_batch("causal-lm")
    output = pair(**batch, output_hidden_states=True, use_cache=True)
    alone = pair.teacher(**batch, output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == 3
    assert equal(output.hidden_states, alone.hidden_states)
    assert output.past_key_values.get_seq_length() == alone.past_key_values.get_seq_length() > 0
    plain = pair(**batch)
    assert plain.hidden_states is None  # as in the output of the teacher
    with pytest.raises(AttributeError, match=r"no 'start_logits', only \['loss', 'logits'"):
        _ = plain.start_logits
    assert "hidden_states" not in plain
    ids = batch["input_ids"]
    assert equal(pair(ids).logits, pair.teacher(ids).logits)
    in_a_tuple = pair(**batch, return_dict=False)
    assert isinstance(in_a_tuple, tuple)
    assert equal(in_a_tuple[:2], (plain.loss, plain.logits))
    assert equal(pair(ids, learner="student").logits, pair.student(ids).logits)


def test_its_output_can_be_copied_as_any_models_output():
    output = tiny_pair("question-answering").eval()(**tiny_batch("question-answering"), output_hidden_states=True)
    assert output["start_logits"] is output.start_logits is output.to_tuple()[list(output).index("start_logits")]
    assert output[0] is output.loss
    leaves, spec = pytree.tree_flatten(output)
    halves = pytree.tree_map(lambda value: value.detach().half(), output)
    copies = {
        "pytree": pytree.tree_unflatten(leaves, spec),
        "accelerate": convert_to_fp32(output),
        "copy": copy.copy(output),
        "deepcopy": copy.deepcopy(pytree.tree_map(torch.detach, output)),
        "pickle": pickle.loads(pickle.dumps(pytree.tree_map(torch.detach, output))),
        "fp32": convert_to_fp32(halves),
    }
    for name, other in copies.items():
        assert isinstance(other, CoDistillationOutput), name
        assert list(other) == list(output), name
        assert equal(other, output) or name == "fp32", name
        assert other.hidden_states is other["hidden_states"]
        assert other.loss.dtype == other.outputs["student"].start_logits.dtype == torch.float32


# ---- It stands for its teacher ----


def test_pipelines_take_it_as_the_teacher(caplog):
    wordpiece, byte_level = bert_tokenizer(), gpt2_tokenizer()
    size = {"vocab_size": len(wordpiece)}
    tasks = {
        "text-classification": (make_pair(tiny_bert(3, 1, **size), tiny_bert(2, 2, **size)), wordpiece, {}),
        "fill-mask": (tiny_pair("masked-lm", **size), wordpiece, {}),
        "text-generation": (
            tiny_pair("causal-lm", vocab_size=len(byte_level)),
            byte_level,
            {"max_new_tokens": 5, "do_sample": False},
        ),
    }
    for task, (pair, tokenizer, options) in tasks.items():
        text = "the [MASK] sees anna" if task == "fill-mask" else "the cat sees anna"
        pair.eval()
        caplog.clear()
        results = [
            pipeline(task, model=x, tokenizer=tokenizer, device="cpu")(text, **options) for x in (pair, pair.teacher)
        ]
        assert results[0] == results[1]
        assert results[0]
        assert "not supported" not in caplog.text
    wrong = pipeline("text-classification", model=tiny_bert(1, 1, **size).bert, tokenizer=wordpiece, device="cpu")
    assert "'BertModel' is not supported" in caplog.text
    assert wrong is not None


def test_what_it_does_not_have_is_looked_up_in_the_teacher(tmp_path):
    trainer = tiny_trainer(tmp_path)
    pair, teacher = trainer.model, trainer.teacher_model
    assert pair.bert is teacher.bert
    assert pair.config is teacher.config
    assert pair.base_model is teacher.base_model
    assert pair.num_labels == 3
    assert not pair.can_generate()
    assert pair.get_input_embeddings() is teacher.get_input_embeddings()
    assert tiny_pair("seq2seq-lm").shared.weight.shape == (VOCAB_SIZE, 16)
    message = (
        "Neither the pair nor its teacher, a BertForSequenceClassification, has 'vision_tower'. The plain models "
        "are `trainer.teacher_model` and `trainer.student_model`, or `pair.learners[...]` for one of "
        "['teacher', 'student']."
    )
    with pytest.raises(AttributeError, match=re.escape(message)):
        _ = pair.vision_tower
    assert not hasattr(pair, "_private")


def test_it_generates_as_the_teacher():
    pair = tiny_pair().eval()
    prompt = torch.tensor([[5, 6, 7]])
    assert pair.can_generate()
    assert pair.transformer is pair.teacher.transformer
    assert pair.generation_config is pair.teacher.generation_config
    assert pair.get_output_embeddings() is pair.teacher.lm_head
    options = {"max_new_tokens": 6, "do_sample": False}
    assert equal(pair.generate(prompt, **options), pair.teacher.generate(prompt, **options))


def test_layers_can_be_replaced():
    pair = tiny_pair(tie_word_embeddings=False)
    embeddings, head = nn.Embedding(VOCAB_SIZE, 16), nn.Linear(16, VOCAB_SIZE, bias=False)
    pair.set_input_embeddings(embeddings)
    pair.set_output_embeddings(head)
    assert pair.teacher.transformer.wte is pair.get_input_embeddings() is embeddings
    assert pair.teacher.lm_head is pair.get_output_embeddings() is head


def test_an_adapted_teachers_methods_are_at_hand(capsys):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_lora_weights=False)
    teacher = get_peft_model(tiny_bert(3, seed=1), config)
    pair = make_pair(teacher, tiny_bert(2, seed=2)).eval()
    batch = unlabelled(collate(tiny_rows(4)))
    pair.print_trainable_parameters()
    assert f"all params: {teacher.num_parameters():,}" in capsys.readouterr().out
    pair.add_adapter("second", config)
    pair.set_adapter("second")
    assert pair.active_adapters == teacher.active_adapters == ["second"]
    with_adapter = pair(**batch).logits
    with pair.disable_adapter():
        without = pair(**batch).logits
    assert not torch.allclose(with_adapter, without)
    torch.testing.assert_close(without, tiny_bert(3, seed=1).eval()(**batch).logits)
    assert not any("lora" in name for name in pair.student.state_dict())
    merged = pair.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, with_adapter)


def test_no_one_takes_it_for_an_adapted_or_a_quantised_model():
    teacher = get_peft_model(tiny_bert(3, seed=1), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    facts = ("hf_device_map", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")
    facts += ("quantization_method", "is_parallelizable", "model_parallel")
    pair = make_pair(teacher, tiny_bert(2, seed=2))
    for name in facts:
        setattr(teacher, name, True)
    assert [name for name in facts if hasattr(pair, name)] == []
    assert not _is_peft_model(pair)
    assert not pair._hf_peft_config_loaded


@pytest.mark.parametrize("head", ["causal-lm", "seq2seq-lm", "token-classification"])
def test_resizing_resizes_both_models(head):
    pair, batch = tiny_pair(head), tiny_batch(head)
    pair(**batch)  # language models have found their output layers

    assert pair.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False) is pair.get_input_embeddings()

    for model in pair.learners.values():
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == VOCAB_SIZE + 4
    batch["input_ids"][:, 0] = VOCAB_SIZE + 3
    losses = pair(**batch).losses
    torch.testing.assert_close(
        losses,
        {f"{name}_loss": value for name, value in naive_losses(head, pair.teacher, pair.student, batch).items()},
    )
    assert pair.resize_token_embeddings() is pair.get_input_embeddings()
    pair.resize_token_embeddings(pad_to_multiple_of=8)
    assert pair.student.config.vocab_size == VOCAB_SIZE + 8


def bert_pair(student: nn.Module | None = None, **arguments):
    pretrained = tiny_bert(2, seed=3) if arguments.get("distillation_mode") == "community" else None
    student = tiny_bert(2, seed=2) if student is None else student
    return make_pair(tiny_bert(3, seed=1), student, DistillationArguments(**arguments), pretrained_teacher=pretrained)


def with_two_tokenizers():
    pair = bert_pair()
    pair.two_tokenizers = True
    return pair


def quantised():
    """A pair whose student says that it is quantised."""
    pair = bert_pair()
    pair.student.quantization_method = "int8"
    return pair


REFUSED = {
    "the models have two tokenizers": with_two_tokenizers,
    "the models share parameters": lambda: bert_pair(share="embeddings"),
    "the teacher model is frozen": lambda: bert_pair(distillation_mode="kd"),
    "the pretrained model is frozen": lambda: bert_pair(distillation_mode="community"),
    "the student model is quantised": quantised,
    "the student model has adapters": lambda: bert_pair(
        get_peft_model(tiny_bert(2, seed=2), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    ),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_resizing_that_cannot_hold_for_all_models_changes_nothing(reason):
    pair = REFUSED[reason]()
    before = copy.deepcopy({name: model.state_dict() for name, model in pair.models.items()})
    for options in ({"new_num_tokens": 60}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match=f"of the pair: {reason}"):
            pair.resize_token_embeddings(**options)
    for name, model in pair.models.items():
        assert_same_weights(model, before[name])
        assert model.config.vocab_size == 48
    assert pair.resize_token_embeddings() is pair.get_input_embeddings()


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_and_is_another_pair(make):
    pair, batch = tiny_pair(), tiny_batch("causal-lm")
    pair(**batch)
    other = make(pair)
    assert other.fused_heads.used
    assert_same_weights(other, pair)
    output = other(**batch)
    assert equal(output, pair(**batch))
    output.loss.backward()
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert any(parameter.grad is not None for parameter in other.student.parameters())
    assert other.task is not None


class Generating(TrainerCallback):
    """Generates with the model that callbacks get, and computes its predictions."""

    def __init__(self) -> None:
        self.texts = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model.training
        batch = tiny_batch("causal-lm")
        assert model(**unlabelled(batch)).logits.shape[-1] == VOCAB_SIZE
        self.texts.append(model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False))


def test_callbacks_can_generate_and_the_training_goes_on_unchanged(tmp_path):
    trainers = []
    for callbacks in ([], [Generating()]):
        pair = tiny_pair()
        trainer = tiny_trainer(
            tmp_path,
            model=pair.teacher,
            student_model=pair.student,
            train_dataset=rows_of(tiny_batch("causal-lm", 24)),
            data_collator=None,
            callbacks=callbacks,
        )
        trainer.train()
        trainers.append(trainer)
    assert len(callbacks[0].texts) == 5
    assert_same_weights(trainers[0].model, trainers[1].model)
