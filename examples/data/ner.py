"""Token classification data: labels of words and of their sub-words, and the scores of entities."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedTokenizerBase

from ctcd_trainer.tasks.labels import IGNORE_INDEX as IGNORED
from ctcd_trainer.tasks.labels import own_labels

#: Column with the position of each word's first token; `CUT_OFF` for a word that got none.
FIRST_TOKENS = "first_tokens"
CUT_OFF = -1
OUTSIDE = "O"


def words_of(row: Sequence[Any] | str | None) -> list[Any]:
    """The words or labels of a row: a list, or a text (as in CSV files) split at white space."""
    return row.split() if isinstance(row, str) else list(row or ())


# ---- Columns and labels ----


def find_column(dataset: Dataset, given: str | None, argument: str, usual: Sequence[str]) -> str:
    """The column that an argument names, or else the first of the usual columns that exists.

    Args:
        dataset: The data.
        given: The name that the user gave.
        argument: Name of the argument.
        usual: Names to look for.

    Raises:
        ValueError: There is no such column.
    """
    for name in usual if given is None else (given,):
        if name in dataset.column_names:
            return name
    looked_for = f"`--{argument} {given}` is not" if given is not None else f"None of {', '.join(usual)} is"
    raise ValueError(f"{looked_for} a column of the data: give `--{argument}`, one of {dataset.column_names}.")


@dataclass(frozen=True)
class WordLabels:
    """The meaning of the labels of words, and their place in the models' outputs.

    Attributes:
        names: Names of the labels in the order of the models' outputs.
        data_names: Names by the indices that the data holds (a `ClassLabel`); `None` if it holds the names.
    """

    names: tuple[str, ...]
    data_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, datasets: Iterable[Dataset], column: str, config: PreTrainedConfig) -> "WordLabels":
        """The labels of some data sets: the names of a `ClassLabel`, or all that occur, sorted.

        If the model knows them all (and maybe more), or if no data set has labels, they are the model's labels in its
        order.

        Args:
            datasets: Data sets with the same labels, such as the splits of one. Those without the column are skipped.
            column: Name of the column.
            config: Config of the model.

        Raises:
            ValueError: Fewer than two labels occur, or there are none in the data nor in the config.
        """
        own = own_labels(config)
        labelled = [dataset for dataset in datasets if column in dataset.column_names]
        if not labelled:
            if own is None:
                raise ValueError(
                    f"No split of the data has a column {column!r} of labels, and the model names none: give "
                    "`--label_column_name`, or a model that was trained for this task."
                )
            return cls(tuple(own))
        item = getattr(labelled[0].features[column], "feature", None)
        data_names = tuple(item.names) if isinstance(item, ClassLabel) else None
        names = data_names
        if names is None:
            values = {value for dataset in labelled for row in dataset[column] for value in words_of(row)}
            names = tuple(str(value) for value in sorted(value for value in values if not _is_missing(value)))
        if len(names) < 2:
            raise ValueError(f"The column {column!r} has only the labels {list(names)}: two or more are needed.")
        return cls(tuple(own) if own is not None and set(names) <= set(own) else names, data_names)

    @property
    def for_config(self) -> dict[str, Any]:
        """The settings of a model's config that describe these labels."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }

    def same_order(self, config: PreTrainedConfig) -> bool:
        """Tell whether the outputs of a model mean these labels in this order; true if its config names none."""
        own = own_labels(config)
        return own is None or own == list(self.names)

    def index(self, value: Any) -> int:
        """Index of a label of the data in the models' outputs; `IGNORED` for a missing one.

        Raises:
            ValueError: The label is unknown.
        """
        if _is_missing(value):
            return IGNORED
        name = str(value) if self.data_names is None else self.data_names[value]
        if name not in self.names:
            raise ValueError(f"The label {name!r} is not one of the models' labels {list(self.names)}.")
        return self.names.index(name)

    def inside(self, index: int) -> int:
        """Label of the later sub-words of a word: after the beginning of an entity (`B-X`), its inside (`I-X`)."""
        name = self.names[index]
        return self.names.index(f"I-{name[2:]}") if name[:2] == "B-" and f"I-{name[2:]}" in self.names else index


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value < 0)


# ---- Tokens ----


@dataclass(frozen=True)
class WordTokenizer:
    """Turns a batch of rows of words into tokens and their labels, for `Dataset.map(..., batched=True)`.

    Attributes:
        tokenizer: A fast tokenizer: others do not tell which word a token belongs to.
        labels: The labels.
        text_column: Name of the column of words.
        label_column: Name of the column of labels; a test set may lack it.
        max_length: Number of tokens at which rows are cut.
        pad: Whether to fill every row up to `max_length`.
        label_all_tokens: Whether all sub-words of a word are labelled and scored, instead of the first one.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: WordLabels
    text_column: str
    label_column: str
    max_length: int
    pad: bool
    label_all_tokens: bool

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokens of the rows, the position of the first token of each word, and `labels` if the rows have labels.

        Raises:
            ValueError: A row has another number of labels than of words, or an unknown label.
        """
        texts = [[str(word) for word in words_of(row)] for row in rows[self.text_column]]
        # For the tokenizers of RoBERTa and GPT-2, a word after a space differs from the first word of a text.
        spaced = self.tokenizer.tokenize("a") != self.tokenizer.tokenize(" a")
        encoded = self.tokenizer(
            [[*words[:1], *(f" {word}" for word in words[1:])] for words in texts] if spaced else texts,
            is_split_into_words=True,
            padding="max_length" if self.pad else False,
            max_length=self.max_length,
            truncation=True,
        )
        word_ids = [encoded.word_ids(row) for row in range(len(texts))]
        result = dict(encoded)
        result[FIRST_TOKENS] = [
            [ids.index(word) if word in ids else CUT_OFF for word in range(len(words))]
            for ids, words in zip(word_ids, texts, strict=True)
        ]
        if self.label_column in rows:
            labels = [words_of(row) for row in rows[self.label_column]]
            for words, own in zip(texts, labels, strict=True):
                if len(words) != len(own):
                    raise ValueError(
                        f"A row has {len(words)} words in the column {self.text_column!r} and {len(own)} labels in "
                        f"{self.label_column!r}: each word needs one. The row begins with {words[:8]}."
                    )
            result["labels"] = [self._labels(ids, own) for ids, own in zip(word_ids, labels, strict=True)]
        return result

    def _labels(self, word_ids: Sequence[int | None], labels: Sequence[Any]) -> list[int]:
        """The label of each token of a row."""
        indices = [self.labels.index(label) for label in labels]
        result = []
        for previous, word in zip([None, *word_ids], word_ids, strict=False):
            if word is None:
                result.append(IGNORED)
            elif word != previous:
                result.append(indices[word])
            else:
                later = self.label_all_tokens and indices[word] != IGNORED
                result.append(self.labels.inside(indices[word]) if later else IGNORED)
        return result


# ---- Scores ----


def entities(labels: Sequence[str], chunked: bool = True) -> set[tuple[str, int, int]]:
    """The entities in the labels of a sentence, as the CoNLL shared tasks count them.

    An entity begins at `B-X`, and at `I-X` if no `X` precedes it. In schemes with more prefixes, `E` and `L` end an
    entity, and `S` and `U` mark an entity of one word.

    Args:
        labels: The labels of the words.
        chunked: Whether the labels have such prefixes. If not (parts of speech), every word is an entity.

    Returns:
        Type, first and last word of each entity.
    """
    found: list[tuple[str, int, int]] = []
    goes_on = False
    for position, label in enumerate(labels):
        if not chunked:
            found += [(label, position, position)] if label != OUTSIDE else []
            continue
        prefix, dash, kind = label.partition("-")
        if not dash or prefix not in "BIELSU":
            goes_on = False
            continue
        if goes_on and prefix in "IEL" and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], position)
        else:
            found.append((kind, position, position))
        goes_on = prefix in "BI"
    return set(found)


def entity_scores(
    predicted: Iterable[Sequence[str]], expected: Iterable[Sequence[str]], chunked: bool = True
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of the entities of each type, and of all entities under the type `""`.

    An entity is right if its type and both its ends are right. Undefined scores are 0.0.

    Args:
        predicted: Predicted labels of each sentence.
        expected: True labels of each sentence.
        chunked: As in `entities`.
    """
    right, found, wanted = Counter(), Counter(), Counter()
    for predicted_labels, labels in zip(predicted, expected, strict=True):
        own, true = entities(predicted_labels, chunked), entities(labels, chunked)
        for counter, group in ((right, own & true), (found, own), (wanted, true)):
            counter.update(kind for kind, *_ in group)
            counter[""] += len(group)
    return {
        kind: {
            "precision": right[kind] / max(found[kind], 1),
            "recall": right[kind] / max(wanted[kind], 1),
            "f1": 2 * right[kind] / max(found[kind] + wanted[kind], 1),
            "number": wanted[kind],
        }
        for kind in sorted({"", *found, *wanted})
    }


def predicted_labels(logits: Tensor | tuple, labels: Tensor | None) -> Tensor:
    """Indices of the predicted labels `(rows, tokens)`, which replace the logits: the metrics need no more."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def metrics_for(labels: WordLabels, by_entity: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metrics of predicted label indices `(rows, tokens)`: accuracy, and the scores of the entities.

    Args:
        labels: The labels.
        by_entity: Whether to add the scores of each type of entity, e.g. `PER_f1`.
    """
    names = np.array(labels.names)
    chunked = any(name[:2] in ("B-", "I-") for name in labels.names)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        scored = prediction.label_ids != IGNORED
        rows = list(zip(prediction.predictions, prediction.label_ids, scored, strict=True))
        predicted = [names[own[mask]].tolist() for own, _, mask in rows]
        expected = [names[true[mask]].tolist() for _, true, mask in rows]
        scores = entity_scores(predicted, expected, chunked)
        overall = scores.pop("")
        overall["accuracy"] = float(
            (prediction.predictions == prediction.label_ids)[scored].sum() / max(scored.sum(), 1)
        )
        del overall["number"]
        if by_entity:
            overall |= {f"{kind}_{key}": value for kind, own in scores.items() for key, value in own.items()}
        return overall

    return compute_metrics
