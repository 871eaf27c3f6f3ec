"""Co-training and co-distillation of two Hugging Face models (CTCD, arXiv 2311.02849).

Change the class name of your `Trainer`, add a `student_model`, and get two models that taught each other.
"""

from .aligning import align_student
from .arguments import CoDistillationTrainingArguments, DistillationArguments
from .cross_fitting import cross_fit
from .diagnose import Diagnosis, diagnose
from .generations import Generation, Generations, train_generations
from .pair.assembly import make_pair
from .pair.model import CoDistillationModel
from .pair.output import CoDistillationOutput
from .seq2seq import CoDistillationSeq2SeqTrainer, CoDistillationSeq2SeqTrainingArguments
from .students.costs import Estimate, estimate, estimate_memory
from .students.cutting import create_student
from .tasks.two_tokenizers import PairDataCollator
from .trainer import CoDistillationMixin, CoDistillationTrainer
from .training.augmentation import Mixup, TokenMasking, WordDropout
from .training.evaluation import CoDistillationPredictionOutput
from .version import __version__

__all__ = [
    "CoDistillationMixin",
    "CoDistillationModel",
    "CoDistillationOutput",
    "CoDistillationPredictionOutput",
    "CoDistillationSeq2SeqTrainer",
    "CoDistillationSeq2SeqTrainingArguments",
    "CoDistillationTrainer",
    "CoDistillationTrainingArguments",
    "Diagnosis",
    "DistillationArguments",
    "Estimate",
    "Generation",
    "Generations",
    "Mixup",
    "PairDataCollator",
    "TokenMasking",
    "WordDropout",
    "__version__",
    "align_student",
    "create_student",
    "cross_fit",
    "diagnose",
    "estimate",
    "estimate_memory",
    "make_pair",
    "train_generations",
]
