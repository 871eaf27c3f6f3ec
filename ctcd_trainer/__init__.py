"""Co-training and co-distillation of two Hugging Face models (CTCD, arXiv 2311.02849).

Change the class name of your `Trainer`, add a `student_model`, and get two models that taught each other.
"""

from .augmentation import Mixup, TokenMasking, WordDropout
from .estimating import Estimate, estimate
from .evaluation import CoDistillationPredictionOutput
from .memory import estimate_memory
from .seq2seq import CoDistillationSeq2SeqTrainer, CoDistillationSeq2SeqTrainingArguments
from .student import create_student
from .trainer import CoDistillationTrainer
from .training_args import CoDistillationTrainingArguments
from .two_tokenizers import PairDataCollator
from .version import __version__

__all__ = [
    "CoDistillationPredictionOutput",
    "CoDistillationSeq2SeqTrainer",
    "CoDistillationSeq2SeqTrainingArguments",
    "CoDistillationTrainer",
    "CoDistillationTrainingArguments",
    "Estimate",
    "Mixup",
    "PairDataCollator",
    "TokenMasking",
    "WordDropout",
    "__version__",
    "create_student",
    "estimate",
    "estimate_memory",
]
