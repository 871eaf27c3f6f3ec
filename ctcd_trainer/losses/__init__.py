"""The losses of a step: whole logits, the fused pass, and the predictions of a frozen teacher."""
