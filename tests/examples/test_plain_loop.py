"""`examples/plain_loop.py`: a training without a Trainer gives the weights that the trainer gives."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from tiny import assert_same_weights, collate, tiny_bert, tiny_rows, tiny_trainer
from tiny_models import rows_of, tiny_batch, tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, default_data_collator

from ctcd_trainer import make_pair
from ctcd_trainer.arguments import DistillationArguments
from examples import plain_loop

BATCH, ACCUMULATE, EPOCHS, RATE = 4, 4, 2, 1e-2
#: Six batches an epoch: the second optimizer step has two of them, with another number of scored items.
SETUPS = {
    "classification": lambda: {
        "model": tiny_bert(3, seed=1),
        "student_model": tiny_bert(2, seed=2),
        "train_dataset": tiny_rows(24, ragged=True),
        "data_collator": collate,
    },
    "causal-lm": lambda: {
        "model": tiny_model("llama", "causal-lm", 2, seed=1),
        "student_model": tiny_model("gpt2", "causal-lm", 1, seed=2),
        "train_dataset": rows_of(tiny_batch("causal-lm", 24)),
        "data_collator": default_data_collator,
    },
}
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adamw_torch": lambda parameters, lr: torch.optim.AdamW(parameters, lr, eps=1e-4, weight_decay=0.0),
}


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
@pytest.mark.parametrize("head", list(SETUPS))
def test_the_loop_gives_the_weights_of_the_trainer(head, optim, tmp_path):
    setup = SETUPS[head]()
    trainer = tiny_trainer(
        tmp_path,
        **{name: copy.deepcopy(value) for name, value in setup.items()},
        temperature=2.0,
        max_steps=-1,
        num_train_epochs=EPOCHS,
        gradient_accumulation_steps=ACCUMULATE,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim=optim,
    )
    trainer.train()

    pair = make_pair(setup["model"], setup["student_model"], DistillationArguments(temperature=2.0))
    before = copy.deepcopy(pair.state_dict())
    optimizer = OPTIMIZERS[optim](pair.parameters(), lr=RATE)
    loader = DataLoader(setup["train_dataset"], BATCH, collate_fn=setup["data_collator"])
    for _ in range(EPOCHS):
        plain_loop.train(pair, optimizer, loader, ACCUMULATE, Accelerator(cpu=True))

    assert trainer.state.global_step == EPOCHS * 2
    assert pair.fused_heads.used == trainer.pair.fused_heads.used == (True if head == "causal-lm" else None)
    assert not torch.equal(next(iter(before.values())), next(pair.parameters()))
    assert_same_weights(pair, trainer.model)


def test_the_script_evaluates_and_saves_both_models(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 24)

    losses = plain_loop.main(["--output_dir", str(tmp_path / "out"), "--text", str(text), "--epochs", "1"])

    rows = torch.tensor(list(text.read_bytes()[: 16 * plain_loop.LENGTH])).view(16, -1)
    for name, folder in {"teacher": tmp_path / "out", "student": tmp_path / "out" / "student"}.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert losses[name] == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-5)
    assert json.loads(capsys.readouterr().out.splitlines()[-1].replace("'", '"')) == losses
    with pytest.raises(SystemExit, match="0"):
        plain_loop.main(["--help"])
