"""Extractive question answering in the manner of SQuAD: windows of long contexts, answers from logits, and scores."""

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

#: Columns of a window beside the inputs of the models: number of its row, begin and end of each token in the context
#: (`NOT_CONTEXT` for tokens of the question), and position of the token that means "no answer".
ROW, STARTS, ENDS, NULL = WINDOW_COLUMNS = ("row", "token_starts", "token_ends", "null_position")
NOT_CONTEXT = -1


# ---- From texts to windows ----


def unnested(articles: Dataset) -> Dataset:
    """Turn the articles of a published SQuAD file into rows, one for each question.

    Args:
        articles: Rows with `paragraphs`: lists of `context` and `qas`, which have `id`, `question` and `answers`.
    """
    rows = [
        {
            "id": question["id"],
            "title": article.get("title"),
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                key: [answer[key] for answer in question["answers"] or ()] for key in ("text", "answer_start")
            },
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return Dataset.from_list(rows)


@dataclass(frozen=True)
class WindowTokenizer:
    """Turns rows into windows of tokens, for `Dataset.map(..., batched=True, with_indices=True)`.

    A window is the question and as much of the context as fits; the next window repeats `doc_stride` tokens of it.
    Its labels are the first and the last token of the row's first answer, or the `NULL` token if the answer is not in
    the window.

    Attributes:
        tokenizer: A fast tokenizer (others do not tell where a token is in the text) that pads on the right.
        max_length: Number of tokens of a window.
        doc_stride: Number of tokens that two windows of a context share.
        pad: Whether to fill every window up to `max_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    doc_stride: int
    pad: bool

    def __call__(self, rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """The windows of some rows: the inputs of the models, `WINDOW_COLUMNS`, and labels if there are answers.

        Args:
            rows: Columns `question`, `context`, and optionally `answers`.
            indices: Numbers of the rows.

        Raises:
            ValueError: A question leaves no room for the context.
        """
        questions = [
            question.strip() for question in rows["question"]
        ]  # some questions of SQuAD begin with many blanks
        self._check_room(questions, indices)
        encoded = self.tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if self.pad else False,
        )
        sources = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        windows = dict(encoded)
        windows |= {name: [] for name in WINDOW_COLUMNS}
        if "answers" in rows:
            windows |= {"start_positions": [], "end_positions": []}
        for window, (source, pairs) in enumerate(zip(sources, offsets, strict=True)):
            of_context = [part == 1 for part in encoded.sequence_ids(window)]
            starts, ends = (
                [pair[side] if inside else NOT_CONTEXT for pair, inside in zip(pairs, of_context, strict=True)]
                for side in (0, 1)
            )
            null = self._null_position(encoded["input_ids"][window])
            for name, value in zip(WINDOW_COLUMNS, (indices[source], starts, ends, null), strict=True):
                windows[name].append(value)
            if "answers" in rows:
                first, last = _answer_tokens(rows["answers"][source], starts, ends) or (null, null)
                windows["start_positions"].append(first)
                windows["end_positions"].append(last)
        return windows

    def _check_room(self, questions: Sequence[str], indices: Sequence[int]) -> None:
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.doc_stride
        tokens = self.tokenizer(list(questions), add_special_tokens=False)["input_ids"]
        for index, ids in zip(indices, tokens, strict=True):
            if len(ids) >= room:
                raise ValueError(
                    f"The question of row {index} has {len(ids)} tokens: with `--max_seq_length {self.max_length}` "
                    f"and `--doc_stride {self.doc_stride}` it leaves no room for new tokens of the context. Raise the "
                    "former, lower the latter, or drop the row."
                )

    def _null_position(self, input_ids: Sequence[int]) -> int:
        """Position of the token that means "no answer": the token that begins texts, or else the first one."""
        for token in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id):
            if token is not None and token in input_ids:
                return input_ids.index(token)
        return 0


def _answer_tokens(
    answers: Mapping[str, Sequence[Any]] | None, starts: Sequence[int], ends: Sequence[int]
) -> tuple[int, int] | None:
    """First and last token of the first answer; `None` if there is no answer, or if the window holds only a part."""
    if not answers or not answers["text"]:
        return None
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    context = [position for position, start in enumerate(starts) if start != NOT_CONTEXT]
    if not context or starts[context[0]] > begin or ends[context[-1]] < end:
        return None
    inside = [position for position in context if ends[position] > begin and starts[position] < end]
    return (inside[0], inside[-1]) if inside else None


# ---- From logits to answers ----


@dataclass(frozen=True)
class Answer:
    """The answer to a question, with the other candidates.

    Attributes:
        text: The answer; empty for "no answer".
        best: The candidates, best first: `text`, `start_logit`, `end_logit`, and `probability` among the candidates.
        null_odds: Score of "no answer" minus that of the best candidate; `None` if only one of the two is possible.
    """

    text: str
    best: list[dict[str, Any]]
    null_odds: float | None


@dataclass(frozen=True)
class AnswerFinder:
    """Finds the answers of a data set from the logits of its windows.

    Attributes:
        rows: The data set, with a column `context`.
        windows: The windows that `WindowTokenizer` made of the data set.
        n_best_size: Number of candidates to keep for each window and for each question.
        max_answer_length: Number of tokens that an answer may have.
        with_negative: Whether questions may have no answer.
        null_threshold: "No answer" must beat the best answer by more than this score.
    """

    rows: Dataset
    windows: Dataset
    n_best_size: int = 20
    max_answer_length: int = 30
    with_negative: bool = False
    null_threshold: float = 0.0

    def __call__(self, start_logits: np.ndarray, end_logits: np.ndarray) -> list[Answer]:
        """The answer to each question.

        Args:
            start_logits: `(windows, tokens)`, in the order of the windows.
            end_logits: `(windows, tokens)`.

        Raises:
            ValueError: The number of windows differs.
        """
        if len(start_logits) != len(self.windows):
            raise ValueError(
                f"There are logits of {len(start_logits)} windows, and the data set has {len(self.windows)}: pass the "
                "`AnswerFinder` of the data set that is evaluated."
            )
        spans: list[dict[tuple[int, int], tuple[float, float]]] = [{} for _ in range(len(self.rows))]
        nulls: list[tuple[float, float]] = [(np.inf, np.inf) for _ in range(len(self.rows))]
        columns = (self.windows[name] for name in WINDOW_COLUMNS)
        for row, starts, ends, null, start, end in zip(*columns, start_logits, end_logits, strict=True):
            nulls[row] = min(nulls[row], (float(start[null]), float(end[null])), key=sum)
            for first, last in self._best_spans(starts, start, end):
                span, logits = (starts[first], ends[last]), (float(start[first]), float(end[last]))
                # Windows overlap: the same words may be found twice.
                spans[row][span] = max(spans[row].get(span, logits), logits, key=sum)
        contexts = self.rows["context"]
        return [self._answer(*found) for found in zip(contexts, spans, nulls, strict=True)]

    def _best_spans(self, starts: Sequence[int], start: np.ndarray, end: np.ndarray) -> Iterator[tuple[int, int]]:
        """First and last token of the candidates of a window: the spans with the largest sums of logits."""
        context = np.flatnonzero(np.asarray(starts) != NOT_CONTEXT)
        if not len(context):
            return
        offset, length = context[0], self.max_answer_length
        start, end = start[context], np.concatenate([end[context], np.full(length - 1, -np.inf)])
        # Row: the first token, column: how many tokens follow it.
        scores = (start[:, None] + np.lib.stride_tricks.sliding_window_view(end, length)).ravel()
        count = min(self.n_best_size, int(np.isfinite(scores).sum()))
        for index in np.argpartition(-scores, count - 1)[:count]:
            first, more = divmod(int(index), length)
            yield int(offset) + first, int(offset) + first + more

    def _answer(
        self, context: str, spans: Mapping[tuple[int, int], tuple[float, float]], null: tuple[float, float]
    ) -> Answer:
        """The answer to one question, from its candidates and the score of "no answer"."""
        candidates = [(context[first:last], logits) for (first, last), logits in spans.items()]
        candidates = sorted(candidates, key=lambda candidate: -sum(candidate[1]))[: self.n_best_size]
        text, null_odds = candidates[0][0] if candidates else "", None
        if self.with_negative and candidates:
            null_odds = sum(null) - sum(candidates[0][1])
            text = "" if null_odds > self.null_threshold else text
        if self.with_negative:
            candidates = sorted([*candidates, ("", null)], key=lambda candidate: -sum(candidate[1]))
        scores = np.array([sum(logits) for _, logits in candidates])
        weights = np.exp(scores - scores.max(initial=-np.inf))
        best = [
            {"text": words, "start_logit": start, "end_logit": end, "probability": float(weight / weights.sum())}
            for (words, (start, end)), weight in zip(candidates, weights, strict=True)
        ]
        return Answer(text, best, null_odds)


# ---- Scores ----


def normalized(text: str) -> str:
    """The text in lower case, without punctuation, articles and superfluous blanks, which SQuAD ignores."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truth: str) -> float:
    """1.0 if two answers are the same when normalized, else 0.0."""
    return float(normalized(answer) == normalized(truth))


def f1(answer: str, truth: str, with_negative: bool = False) -> float:
    """The F1 of the words that two answers share when normalized.

    Args:
        answer: One answer.
        truth: The other one.
        with_negative: Whether an answer without words is "no answer", which is right if the other is, too (SQuAD 2.0).
    """
    words, true_words = normalized(answer).split(), normalized(truth).split()
    if with_negative and not (words and true_words):
        return float(words == true_words)
    shared = (Counter(words) & Counter(true_words)).total()
    return 2 * shared / max(len(words) + len(true_words), 1)


def squad_scores(
    answers: Sequence[str], truths: Sequence[Sequence[str]], with_negative: bool = False
) -> dict[str, float]:
    """Exact match and F1 in percent, as SQuAD defines them: the nearest true answer counts.

    Args:
        answers: The answer to each question; empty for "no answer".
        truths: The true answers to each question.
        with_negative: Whether questions may have no answer (SQuAD 2.0). This adds the scores of the questions with an
            answer (`HasAns_exact`, `HasAns_f1`) and of those without (`NoAns_...`), if there are any.
    """
    rows = []
    for answer, given in zip(answers, truths, strict=True):
        accepted = given
        if with_negative:
            accepted = [truth for truth in given if normalized(truth)] or [""]
        exact = max(exact_match(answer, truth) for truth in accepted)
        rows.append((exact, max(f1(answer, truth, with_negative) for truth in accepted), bool(given)))
    exact, overlap, answerable = np.array(rows, dtype=float).reshape(-1, 3).T
    scores = {"exact_match": 100 * float(exact.mean()), "f1": 100 * float(overlap.mean())}
    if with_negative:
        for name, group in (("HasAns", answerable == 1), ("NoAns", answerable == 0)):
            if group.any():
                scores[f"{name}_exact"] = 100 * float(exact[group].mean())
                scores[f"{name}_f1"] = 100 * float(overlap[group].mean())
    return scores
