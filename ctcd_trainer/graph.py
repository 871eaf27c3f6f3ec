"""Who learns from whom: the modes of co-distillation as settings of one small graph.

Learners are nodes, and an edge `source -> learner` carries the weight of a soft loss. All other code reads the graph,
and asks for the mode only to check arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

TEACHER = "teacher"
STUDENT = "student"
#: The models that can be trained, the primary one first.
LEARNERS = (TEACHER, STUDENT)
#: A frozen model that only gives soft targets (Community KD); it is no learner.
PRETRAINED = "pretrained"
#: The mean of the predictions of several models (KDCL); it is no learner.
ENSEMBLE = "ensemble"
#: Ends of the names of frozen copies of a learner, such as `teacher_average`: the average of its weights over the
#: steps, and its weights at the end of the last epoch.
AVERAGE, SNAPSHOT = "average", "snapshot"


def copied_learner(source: str) -> str | None:
    """Name of the learner of which a source is a copy; `None` if it is no copy."""
    learner, _, kind = source.rpartition("_")
    return learner if kind in (AVERAGE, SNAPSHOT) else None


@dataclass(frozen=True)
class Edge:
    """A soft loss, which pulls `learner` towards the detached predictions of `source`.

    Attributes:
        source: Name of the model whose predictions are the target.
        learner: Name of the model that this edge trains.
        weight: Weight of the soft loss in the total loss; of an `auto` edge, the hard weight of the learner.
        auto: Whether `weight` is multiplied by what held-out rows say of the source (`training/held_out.py`).
        schedule: The factor of the weight over the steps, a text that `find_schedule` reads.
        gate: The factor of each compared item, a key of `GATES`.
        rows: The rows on which the edge holds, one of `ROWS`.
        temperature: Temperature of both predictions; `None` for that of all edges.
        soft_loss: A key of `SOFT_LOSSES`; `None` for that of all edges.
    """

    source: str
    learner: str
    weight: float = 1.0
    auto: bool = False
    schedule: str = "constant"
    gate: str = "none"
    rows: str = "all"
    temperature: float | None = None
    soft_loss: str | None = None

    @property
    def name(self) -> str:
        """Name of the edge in arguments and logs, e.g. `student_from_teacher`."""
        return f"{self.learner}_from_{self.source}"

    @property
    def arrow(self) -> str:
        """Name of the edge in the argument `edges`, e.g. `teacher->student`."""
        return f"{self.source}->{self.learner}"

    @property
    def loss_name(self) -> str:
        """Name under which the loss of this edge is logged, e.g. `student_from_teacher_loss`."""
        return f"{self.name}_loss"

    @property
    def gate_name(self) -> str:
        """Name under which the mean of the gate is logged, e.g. `student_from_teacher_gate`."""
        return f"{self.name}_gate"

    @property
    def weight_name(self) -> str:
        """Name of the training argument that sets the weight, e.g. `student_from_teacher_weight`."""
        return f"{self.name}_weight"


class FeatureEdge(Edge):
    """A loss that pulls layers of `learner` towards the detached layers of `source`."""

    @property
    def loss_name(self) -> str:
        """Name under which the loss is logged, e.g. `student_feature_loss`."""
        return f"{self.learner}_feature_loss"

    @property
    def weight_name(self) -> str:
        """Name of the training argument that sets the weight, e.g. `student_feature_weight`."""
        return f"{self.learner}_feature_weight"


#: All edges between a pair of models and a frozen teacher; each has a training argument.
EDGES = (
    Edge(TEACHER, STUDENT),
    Edge(STUDENT, TEACHER),
    Edge(PRETRAINED, STUDENT),
    Edge(PRETRAINED, TEACHER),
)
#: The edges from sources that are made of the learners. No mode has them: the argument `edges` sets them.
MADE_EDGES = tuple(
    Edge(source, learner)
    for source in (ENSEMBLE, *(f"{learner}_{kind}" for learner in LEARNERS for kind in (AVERAGE, SNAPSHOT)))
    for learner in LEARNERS
)


@dataclass(frozen=True)
class Mode:
    """A row of the table of modes.

    Attributes:
        trained: The learners that this mode trains; the others are frozen.
        edges: The edges of the mode with their default weights; every other edge has weight 0.
        summary: Who learns from whom, for the help text of the argument `distillation_mode`.
    """

    trained: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    summary: str = ""

    def default_weight(self, source: str, learner: str) -> float:
        """Default weight of the edge `source -> learner` in this mode."""
        return sum(edge.weight for edge in self.edges if (edge.source, edge.learner) == (source, learner))


#: The table of modes, arXiv 2311.02849 section 3 (CTCD, Community KD) with its baselines.
MODES: Mapping[str, Mode] = {
    "ctcd": Mode(LEARNERS, EDGES[:2], "teacher and student from each other"),
    "community": Mode(LEARNERS, EDGES, "both from each other and from a frozen pre-trained teacher"),
    "kd": Mode((STUDENT,), EDGES[:1], "the student from the frozen teacher"),
    "reversed": Mode((TEACHER,), EDGES[1:2], "the teacher from the frozen student"),
    "standalone": Mode(LEARNERS, (), "no model from another"),
}


@dataclass(frozen=True)
class Graph:
    """The learners with the weights of their hard losses, and the edges between them.

    Attributes:
        hard_weights: Weight of each learner's task loss; 0 for a learner that the mode freezes.
        edges: The soft losses, only those with a weight other than 0.
        features: The feature losses, only those with a weight other than 0.
        members: Weights of the members of the ensemble by name, with the sum 1; none without an edge from it.
        fits_members: Whether the weights of the members follow from held-out rows.
    """

    hard_weights: Mapping[str, float]
    edges: tuple[Edge, ...] = field(default=())
    features: tuple[FeatureEdge, ...] = field(default=())
    members: Mapping[str, float] = field(default_factory=dict)
    fits_members: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """The learners that some loss trains, in the order of `hard_weights`."""
        reached = {edge.learner for edge in (*self.edges, *self.features)}
        return tuple(name for name, weight in self.hard_weights.items() if weight > 0 or name in reached)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The learners that no loss trains. They do not change and have no optimizer state."""
        return tuple(name for name in self.hard_weights if name not in self.trained)

    @property
    def uses_pretrained(self) -> bool:
        """Tell whether a learner learns from the frozen pre-trained teacher."""
        sources = {edge.source for edge in (*self.edges, *self.features)}
        return PRETRAINED in sources.union(self.members)

    @property
    def features_alone(self) -> bool:
        """Tell whether nothing is learnt from labels or predictions, so that neither is needed."""
        return not self.edges and not any(self.hard_weights.values())
