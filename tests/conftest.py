import gc
import os
from collections.abc import Iterator
from functools import partial
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


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> int:
    """Verbosity at the start. torch and transformers are imported here as xdist's main process needs neither."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return logging.get_verbosity()


@pytest.fixture(autouse=True, scope="session")
def _quick_cards(_quiet: int) -> Iterator[None]:
    """Model cards without a figure, and of models that are timed once; tests/cards draws figures and times longer."""
    from ctcd_trainer.cards import card, facts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "draw_curves", lambda *args: None)
        patch.setattr(facts, "latencies_of", partial(facts.latencies_of, seconds=0.0))
        yield


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> None:
    """Trainer collects garbage in each training, which takes 0.3 s if what has been imported is looked at as well."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_verbosity(_quiet: int) -> None:
    """A script that makes transformers silent must not silence the warnings that another test looks for."""
    from transformers.utils import logging

    logging.set_verbosity(_quiet)
    logging.get_logger("ctcd_trainer").setLevel(NOTSET)
