"""Runs of the example scripts in this process, on tiny models of a few words."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def run_script(script: ModuleType, *arguments: str, output_dir: Path, **options: object) -> Path:
    """Run a script for two steps unless told otherwise; options that are `None` are left out. Returns its folder."""
    settings = {
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    given = [text for name, value in settings.items() if value is not None for text in (f"--{name}", str(value))]
    script.main(["--use_cpu", *given, *arguments])
    return Path(settings["output_dir"])


def save_tokenizer(folder: Path, words: Sequence[str], **options: object) -> None:
    """A BERT tokenizer of these words (or pieces), for texts of 32 tokens unless told otherwise."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    settings = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    settings |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "model_max_length": 32}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**settings, **options}).save_pretrained(folder)


def save_bert(
    folder: Path,
    words: Sequence[str],
    layers: int = 3,
    seed: int = 0,
    model_class: type[PreTrainedModel] = BertModel,
    **config: object,
) -> str:
    """A model and its tokenizer, which `AutoModel...` classes load from the folder that is returned."""
    torch.manual_seed(seed)
    settings = BertConfig(
        vocab_size=len(words) + len(SPECIAL),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        **config,
    )
    model_class(settings).save_pretrained(folder)
    save_tokenizer(folder, words)
    return str(folder)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def results(folder: Path, name: str = "eval") -> dict[str, float]:
    return read(folder / f"{name}_results.json")


def printed_table(text: str) -> list[list[str]]:
    """Split the table at the end of a script's output into lines of words."""
    return [line.split() for line in text.split("\n\n")[-1].splitlines()]
