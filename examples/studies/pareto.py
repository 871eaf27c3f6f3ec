"""The choices of the student that are worth their cost: no other is better at this cost, or as good for less."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Costs that differ by a smaller share count as equal: two measurements of one latency differ by that.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Point:
    """A choice.

    Attributes:
        quality: Score of its student; more is better.
        cost: Cost in milliseconds, parameters, ...; less is better.
    """

    quality: float
    cost: float

    def beats(self, other: "Point", tolerance: float = TOLERANCE) -> bool:
        """Tell whether this choice is better and no more expensive than the other, or as good and cheaper."""
        if self.quality > other.quality:
            return self.cost <= other.cost * (1 + tolerance)
        return self.quality == other.quality and self.cost * (1 + tolerance) < other.cost


def front(points: Mapping[str, Point]) -> list[str]:
    """Names of the points that no other beats, by rising cost."""
    best = [name for name, own in points.items() if not any(other.beats(own) for other in points.values())]
    return sorted(best, key=lambda name: points[name].cost)
