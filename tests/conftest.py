import os
from logging import NOTSET
from pathlib import Path

# Nothing in the tests may reach the network; set before transformers and datasets read it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Programs that tests start find the helpers, and the package of this checkout.
os.environ["PYTHONPATH"] = os.pathsep.join(
    str(Path(__file__).parent / folder) for folder in ("..", "helpers", "programs")
)

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)


VERBOSITY = logging.get_verbosity()


@pytest.fixture(autouse=True)
def _same_verbosity() -> None:
    """A script that makes transformers silent must not silence the warnings that another test looks for."""
    logging.set_verbosity(VERBOSITY)
    logging.get_logger("ctcd_trainer").setLevel(NOTSET)
