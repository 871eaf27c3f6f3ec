"""How far a source of soft targets can be trusted: the best weight of its soft loss, from errors on held-out rows."""


def trusted_weight(
    source_error: float,
    learner_error: float,
    error_product: float,
    chance_error: float,
    hard_weight: float = 1.0,
    limit: float = 1.0,
) -> float:
    """Return the weight of a soft loss at which hard and soft target together are nearest to the truth.

    With weights `h` and `w` the learner is trained on `(h y + w q) / (h + w)`, the mixture of label `y` and prediction
    `q`. If `s2` is the noise of the labels and `b2` the error of the source beyond it, independent of that noise, the
    squared error of the mixture is least at `w = h s2 / b2`. Held-out labels show the sum `s2 + b2` as the source's
    error, and only an upper bound of `s2`: the least of the first three arguments. A bound trusts a poor source too
    much. So the weight is multiplied by the source's share of the way from chance to the bound: it is 0 for a source
    that knows no more than the frequencies of the labels, and the limit for one that is as good as the bound. If no
    model is far from chance, the bound says nothing: the way counts as a tenth of the chance error at least.

    Args:
        source_error: Mean of `Family.squared_error` of the source on held-out rows.
        learner_error: That of the learner on the same rows.
        error_product: Mean of `Family.error_product` of both: the noise, and what their errors have in common.
        chance_error: `Family.chance_error` of the labels of these rows.
        hard_weight: Weight of the learner's hard loss. Without one, the formula has no scale, and the limit takes its
            place.
        limit: Largest weight.
    """
    noise = max(min(source_error, learner_error, error_product), 0.0)
    if chance_error <= max(source_error, noise):
        return 0.0
    bias = source_error - noise
    weight = hard_weight * noise / bias if bias > 0 and hard_weight > 0 else limit
    return min(weight, limit) * ((chance_error - source_error) / max(chance_error - noise, 0.1 * chance_error))
