"""Language models are compared token by token: one tokenizer for both, whatever the sizes of the embeddings."""

import pytest
from tiny_tokenizer import bert_tokenizer, gpt2_tokenizer
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel

from ctcd_trainer import CoDistillationTrainer, CoDistillationTrainingArguments


def make(tokenizer, vocab_size=None, layers=1):
    settings = {"vocab_size": vocab_size or len(tokenizer), "num_hidden_layers": layers, "num_attention_heads": 2}
    if "GPT2" in type(tokenizer).__name__:
        return GPT2LMHeadModel(GPT2Config(**settings, n_embd=16, n_positions=32))
    return BertForMaskedLM(BertConfig(**settings, hidden_size=16, intermediate_size=16, max_position_embeddings=32))


def saved(model, tokenizer, folder):
    """The model as it comes back from a folder that has its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def make_trainer(folder, teacher, student, tokenizer=None, collator=None):
    args = CoDistillationTrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no"
    )
    rows = [bert_tokenizer()(["the small cat sees the dog ."])] * 4
    rows = [{"input_ids": row["input_ids"][0]} for row in rows]
    collator = collator or (DataCollatorForLanguageModeling(tokenizer, seed=0) if tokenizer else None)
    return CoDistillationTrainer(
        teacher, args, collator, rows, rows, processing_class=tokenizer, student_model=student
    )


@pytest.mark.parametrize("sizes", [(8, 16), (16, 8), (0, 64)])
def test_embeddings_padded_to_two_sizes_train_and_evaluate(sizes, tmp_path):
    tokenizer = bert_tokenizer()
    rounded = -(-len(tokenizer) // 8) * 8
    teacher, student = (make(tokenizer, rounded + extra if extra else None) for extra in sizes)
    trainer = make_trainer(tmp_path, teacher, student, tokenizer)
    trainer.train()
    assert trainer.pair.fused_heads.used
    assert 0 <= trainer.evaluate()["eval_agreement"] <= 1


def test_sizes_that_no_padding_explains_are_refused(tmp_path):
    tokenizer = bert_tokenizer()
    with pytest.raises(ValueError, match=r"`model` has `vocab_size=\d+` and `student_model` has `vocab_size=5000`"):
        make_trainer(tmp_path, make(tokenizer), make(tokenizer, 5000), tokenizer)


class TestTokenizersThatDiffer:
    """Both have the same number of ids, so nothing else would notice."""

    @pytest.fixture
    def models(self, tmp_path):
        bert, gpt2 = bert_tokenizer(), gpt2_tokenizer()
        size = max(len(bert), len(gpt2))
        teacher = saved(make(bert, size), bert, tmp_path / "teacher")
        student = saved(make(bert, size), gpt2, tmp_path / "student")
        return teacher, student

    message = r"`student_model` was trained with another tokenizer than {}.*id 0 is .*; id 1 is .*for the other"

    def test_are_refused_with_both_names_and_the_first_ids(self, models, tmp_path):
        with pytest.raises(ValueError, match=self.message.format("`processing_class`")) as error:
            make_trainer(tmp_path, *models, bert_tokenizer())
        assert "student" in str(error.value)
        assert "'[PAD]'" in str(error.value)

    def test_are_refused_when_only_the_collator_has_one(self, models, tmp_path):
        collator = DataCollatorForLanguageModeling(bert_tokenizer())
        with pytest.raises(ValueError, match=self.message.format("`processing_class`")):
            make_trainer(tmp_path, *models, collator=collator)

    def test_are_refused_when_nobody_has_one_but_the_folders_of_the_models(self, models, tmp_path):
        with pytest.raises(ValueError, match=self.message.format("`model`")) as error:
            make_trainer(tmp_path, *models)
        assert str(tmp_path / "teacher") in str(error.value)
        assert str(tmp_path / "student") in str(error.value)
