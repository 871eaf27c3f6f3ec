"""`CoDistillationMixin` over a Trainer class of the user."""

import inspect
import pydoc
import re

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_same_weights, collate, tiny_args, tiny_bert, tiny_rows, tiny_trainer
from transformers import Seq2SeqTrainer, Trainer

from ctcd_trainer import CoDistillationMixin, CoDistillationSeq2SeqTrainer, CoDistillationTrainer

OWN = [
    *("student_model", "student_model_init", "student_processing_class", "pretrained_teacher", "augmentation"),
    *("augmented", "task", "soft_loss_func"),
]


class TheirTrainer(Trainer):
    """Takes its arguments in another order, an argument of its own, and the rest as it comes."""

    def __init__(self, args, model=None, greeting="hello", train_dataset=None, **kwargs):
        self.greeting = greeting
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.seen = type(self.model).__name__


class Mine(CoDistillationMixin, TheirTrainer):
    pass


class AdaptingTrainer(Trainer):
    """Puts an adapter on the model, as the trainers of TRL do."""

    def __init__(self, model, args=None, peft_config=None, **kwargs):
        model = model if peft_config is None else get_peft_model(model, peft_config)
        super().__init__(model, args, **kwargs)


class MineAdapting(CoDistillationMixin, AdaptingTrainer):
    pass


def models() -> dict:
    return {"model": tiny_bert(3, seed=1), "student_model": tiny_bert(2, seed=2)}


@pytest.mark.parametrize("positional", [True, False])
def test_a_trainer_with_an_init_of_its_own_trains_a_pair(positional, tmp_path):
    args, rows, given = tiny_args(tmp_path), tiny_rows(), models()
    teacher = given.pop("model")
    if positional:
        mine = Mine(args, teacher, "hi", rows, data_collator=collate, **given)
    else:
        mine = Mine(greeting="hi", model=teacher, train_dataset=rows, data_collator=collate, args=args, **given)
    assert (mine.greeting, mine.seen) == ("hi", "BertForSequenceClassification")
    assert mine.teacher_model is teacher
    mine.train()
    ours = tiny_trainer(tmp_path)
    ours.train()
    assert_same_weights(mine.model, ours.model)
    mine.save_model(tmp_path / "out")
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_a_trainer_may_wrap_the_teacher(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    options = {"data_collator": collate, "train_dataset": tiny_rows(), **models()}
    teacher = options.pop("model")
    mine = MineAdapting(teacher, tiny_args(tmp_path), config, **options)
    assert isinstance(mine.teacher_model, PeftModel)
    assert mine.pair.teacher is mine.teacher_model
    assert mine.pair.teacher.get_base_model() is teacher
    frozen = {name: value.clone() for name, value in teacher.state_dict().items() if "lora" not in name}
    mine.train()
    adapter = mine.teacher_model.state_dict()
    assert all(adapter[name].any() for name in adapter if "lora_B" in name)
    mine.save_model(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    changed = [n for n, value in teacher.state_dict().items() if n in frozen and not value.equal(frozen[n])]
    assert all("modules_to_save" in name for name in changed)


def test_without_a_student_it_is_their_trainer(tmp_path):
    trainers = []
    for cls in (TheirTrainer, Mine):
        args = tiny_args(tmp_path, distillation_mode="standalone")
        trainer = cls(args, tiny_bert(3, seed=1), train_dataset=tiny_rows(), data_collator=collate)
        trainer.train()
        trainers.append(trainer)
    theirs, mine = trainers
    assert mine.pair is mine.student_model is None
    assert mine.model is mine.teacher_model
    assert_same_weights(mine.model, theirs.model)
    logs = [
        [{k: v for k, v in log.items() if "runtime" not in k and "second" not in k} for log in x.state.log_history]
        for x in trainers
    ]
    assert logs[0] == logs[1]
    assert mine.evaluate(tiny_rows(8)).keys() == theirs.evaluate(tiny_rows(8)).keys()


def test_the_signature_has_the_arguments_of_the_trainer_and_of_the_mixin():
    trainers = {CoDistillationTrainer: Trainer, CoDistillationSeq2SeqTrainer: Seq2SeqTrainer, Mine: TheirTrainer}
    for ours, theirs in trainers.items():
        names = list(inspect.signature(theirs).parameters)
        rest = [name for name in names if name == "kwargs"]
        assert list(inspect.signature(ours).parameters) == [*(n for n in names if n != "kwargs"), *OWN, *rest]
    bound = inspect.signature(CoDistillationTrainer).bind("teacher", "arguments", student_model="student")
    assert bound.arguments == {"model": "teacher", "args": "arguments", "student_model": "student"}
    assert inspect.signature(Mine).bind("arguments", "teacher", data_collator="collator")
    title = pydoc.render_doc(CoDistillationTrainer, renderer=pydoc.plaintext).splitlines()[2]
    assert title.startswith("class CoDistillationTrainer(CoDistillationMixin, transformers.trainer.Trainer")
    text = pydoc.render_doc(CoDistillationTrainer, renderer=pydoc.plaintext)
    assert "student_model:" in text
    assert "CoDistillationTrainer(model:" in text.replace("\n", "")


def test_a_subclass_with_an_init_of_its_own_has_that_signature():
    class Named(CoDistillationTrainer):
        def __init__(self, name, **kwargs):
            super().__init__(**kwargs)

    class Further(Named):
        pass

    for cls in (Named, Further):
        assert list(inspect.signature(cls).parameters) == ["name", "kwargs"]


def test_too_many_arguments_are_named():
    with pytest.raises(
        TypeError, match=r"Mine takes the 4 arguments \['args', 'model', 'greeting', 'train_dataset'\]"
    ):
        Mine(1, 2, 3, 4, 5)


@pytest.mark.parametrize("own_init", [True, False])
def test_bases_in_the_wrong_order_are_refused(own_init):
    message = (
        "Wrong has no Trainer class after `CoDistillationMixin` among its bases. Write `class "
        "Wrong(CoDistillationMixin, TheirTrainer)`"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        type("Wrong", (TheirTrainer, CoDistillationMixin), {"__init__": lambda self: None} if own_init else {})
