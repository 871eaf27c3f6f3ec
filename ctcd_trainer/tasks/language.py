"""Heads of language models: masked, causal, sequence-to-sequence."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from .base import TaskWithoutClasses, model_names_of
from .labels import IGNORE_INDEX


class LanguageModel(TaskWithoutClasses):
    """A token of the vocabulary at each position. The scored positions are compared, on the common ids."""

    language_model = True
    per_token = True

    def trainable_labels(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the labels; token 0 at every position if nothing is scored."""
        nothing = self.counted(inputs).eq(IGNORE_INDEX).all()
        return {"labels": inputs["labels"].masked_fill(nothing, 0)}

    def compared(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits at the scored positions, `(scored, vocabulary)`."""
        logits = outputs["logits"]
        if logits.ndim == 2:  # the model has selected them (ModernBERT with `sparse_prediction`)
            return logits
        targets = self.targets(inputs)
        return logits[:, -targets.shape[1] :][targets.ne(IGNORE_INDEX)]  # prompt tuning has put tokens in front

    def labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the labels of the scored positions, `(scored,)`."""
        return self.targets(inputs)[self.scored(inputs)]

    def _check_positions(self, logits: Tensor, values: Tensor, inputs: Mapping[str, Any]) -> None:
        """No check: `compared` has taken the scored positions."""

    def mean_compared(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean of the values `(scored,)`, 0 if there are none."""
        return values.sum() / max(len(values), 1)

    def agreement(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Count how often two models predict the same token; `None` without labels."""
        if "labels" not in inputs:
            return None
        scored = self.scored(inputs)
        same = self.family(inputs).same(*self._comparable(first, second, inputs))
        same = torch.zeros_like(scored).masked_scatter_(scored, same)
        return same.sum(-1).float(), scored.sum(-1).float()

    def _comparable(self, first: Any, second: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the compared logits of two models on the ids that both have."""
        logits = [self.compared_logits(outputs, inputs) for outputs in (first, second)]
        common = min(z.shape[-1] for z in logits)
        return [z[:, :common] for z in logits]


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder that is trained by teacher forcing (`T5...`, `Bart...ForConditionalGeneration`)."""

    name = "seq2seq-lm"
    pipeline_tag = "text2text-generation"
    auto_model = AutoModelForSeq2SeqLM
    model_names = model_names_of("SEQ_TO_SEQ_CAUSAL_LM")

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """Tell whether the model has an encoder: some of the classes have only a decoder."""
        return config.is_encoder_decoder

    def needs_labels(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Tell whether the model makes its decoder inputs only together with its loss (M2M100, NLLB, Blenderbot)."""
        return _lacks_decoder_inputs(inputs) and not hasattr(model, "prepare_decoder_input_ids_from_labels")

    def unlabelled(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs with decoder inputs for the labels; raise `ValueError` if the model cannot make them."""
        result = super().unlabelled(model, inputs)
        if self.needs_labels(model, inputs):
            raise ValueError(
                f"{type(model).__name__} has no `prepare_decoder_input_ids_from_labels`, so it needs "
                "`decoder_input_ids` in the batch. Add them in the `data_collator`: the labels, shifted to the right."
            )
        if _lacks_decoder_inputs(inputs):
            result["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        return result


def _lacks_decoder_inputs(inputs: Mapping[str, Any]) -> bool:
    """Tell whether the decoder inputs have to be made from the labels."""
    given = inputs.get("decoder_input_ids") is not None or "decoder_inputs_embeds" in inputs
    return "labels" in inputs and not given


class MaskedLM(LanguageModel):
    """The tokens that were masked (`...ForMaskedLM`)."""

    name = "masked-lm"
    pipeline_tag = "fill-mask"
    auto_model = AutoModelForMaskedLM
    model_names = model_names_of("MASKED_LM")


class CausalLM(LanguageModel):
    """The next token at each position (`...ForCausalLM`): labels are shifted, as the models do it."""

    name = "causal-lm"
    pipeline_tag = "text-generation"
    auto_model = AutoModelForCausalLM
    model_names = model_names_of("CAUSAL_LM")
    shifts_labels = True

    def targets(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the label of the next position; `IGNORE_INDEX` at the last position."""
        labels = super().targets(inputs)
        return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
