"""Both models on the Hub: the pair in one repository, the student alone at the root of its own."""

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from .graph import STUDENT
from .model_card import write_model_cards
from .modeling import CoDistillationModel
from .uploads import Upload, UploadQueue

logger = logging.get_logger(__name__)

#: Files of a checkpoint that are for resuming alone.
_TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "global_step*")
#: Seconds that the end of a training waits for uploads at most.
_LONGEST_END = 3600.0
#: What does not belong to the models in an output folder.
_NOT_MODELS = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")


class PairHubTrainer(Trainer):
    """What Trainer does for the Hub, for two models.

    `hub_model_id` receives the output folder, with the teacher at the root and the student in `student/`;
    `student_hub_model_id` (by default `<hub_model_id>-student`) receives the student alone, so that
    `pipeline(task, model=<student repo>)` works. An upload that fails is tried again and never stops a training; see
    `uploads.py`.
    """

    pair: CoDistillationModel | None
    #: Whether there is, or will be, a pair.
    _paired: bool = False
    _uploads: UploadQueue | None = None

    def create_model_card(self, *args: Any, baseline: Any = None, **kwargs: Any) -> None:
        """A model card for each model, beside it; see `Trainer` and, for the `baseline`, `write_model_cards`."""
        if self.pair is None:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            bound = inspect.signature(super().create_model_card).bind(*args, **kwargs)
            write_model_cards(self, baseline, **bound.arguments)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None, **kwargs: Any) -> None:
        """Make the repository of the pair; see `Trainer`. If the Hub cannot be reached, that is done later.

        Raises:
            ValueError: The Hub does not accept the token, or it may not write there.
        """
        if not self._paired:
            kwargs |= {"private": private} if private is not None else {}  # not every version of Trainer has it
            return super().init_hf_repo(token, **kwargs)
        if not self.is_world_process_zero():
            return
        self._uploads = UploadQueue(self.args.output_dir, token or self.args.hub_token)
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.push_in_progress = None
        private = self.args.hub_private_repo if private is None else private
        try:
            repo = HfApi(token=self._uploads.token).create_repo(self.hub_model_id, private=private, exist_ok=True)
            self.hub_model_id = repo.repo_id
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                raise ValueError(
                    f"The Hub does not let you write to `hub_model_id={self.hub_model_id!r}`: {error}. Log in with "
                    "`hf auth login` or pass a `hub_token` with the right to write, or set `push_to_hub=False`."
                ) from error
            logger.warning("The repository %r cannot be made now, and will be later: %s", self.hub_model_id, error)
        except (HFValidationError, TypeError, AttributeError):
            raise
        except Exception as error:  # of the client's HTTP library, which is not always the same
            logger.warning("The Hub cannot be reached, and will be tried again at each save: %s", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Any:
        """Upload the pair to `hub_model_id` and the student to its own repository; see `Trainer.push_to_hub`.

        Returns:
            What Trainer returns, for the repository of the pair.

        Raises:
            ConnectionError: Something could not be uploaded (only if `blocking`). It is remembered:
                `python -m ctcd_trainer.push OUTPUT_DIR` completes it.
        """
        if self.pair is None:
            kwargs |= {"private": private} if private is not None else {}
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.teacher_model, "model_tags", None) or [] if tag not in tags]
        kwargs.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(tags=tags or None, **kwargs)
        self._uploads.token = token or self.args.hub_token
        uploads = self._uploads_of(".", commit_message or "End of training", _NOT_MODELS, revision, private)
        self._uploads.add(uploads)
        if not blocking:
            return self._uploads.start()
        commits = self._uploads.finish()
        self._report_missing(error=True)
        return commits.get(uploads[0])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save both models; see `Trainer.save_model`. A push that fails is reported, and loses nothing."""
        try:
            super().save_model(output_dir, _internal_call)
        except ConnectionError as error:
            if self.pair is None:
                raise
            logger.warning("The models are saved. %s", error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push both models of a checkpoint while training goes on, as `hub_strategy` says."""
        if self.pair is None:
            return super()._push_from_checkpoint(checkpoint_folder)
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            # The checkpoint may be removed before it is uploaded.
            snapshot = self._uploads.snapshot(checkpoint_folder)
        except OSError as error:  # `shutil.Error` among them
            logger.warning("The checkpoint %s is not pushed: %s", checkpoint_folder, error)
            return
        message = f"Training in progress, step {self.state.global_step}"
        uploads = self._uploads_of(snapshot, message, _TRAINING_STATE, self.args.hub_revision)
        places = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        if self.args.hub_strategy in places:
            uploads.append(
                Upload(
                    self.hub_model_id,
                    snapshot,
                    f"{message}, checkpoint",
                    places[self.args.hub_strategy],
                    replace=True,
                    revision=self.args.hub_revision,
                    private=self.args.hub_private_repo,
                )
            )
        self._uploads.add(uploads)
        self._uploads.start(patiently=True)

    def _uploads_of(
        self,
        folder: str,
        message: str,
        ignore: tuple[str, ...],
        revision: str | None = None,
        private: bool | None = None,
    ) -> list[Upload]:
        """The uploads of the pair and of the student alone, from a folder of both."""
        options = {
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo if private is None else private,
        }
        student = getattr(self.args, "student_hub_model_id", None) or f"{self.hub_model_id}-student"
        return [
            Upload(self.hub_model_id, folder, message, ignore=ignore, **options),
            Upload(student, self.pair.folder_of(STUDENT, folder), message, **options),
        ]

    def _finish_current_push(self) -> None:
        """Wait for the uploads, and say what is missing on the Hub."""
        if self.pair is None or self._uploads is None:
            return super()._finish_current_push()
        self._uploads.finish(timeout=_LONGEST_END)
        self._report_missing()

    def _report_missing(self, error: bool = False) -> None:
        missing = [f"{upload} ({why})" for upload, why in self._uploads.missing.items()]
        if not missing:
            return
        text = (
            f"Not on the Hub: {'; '.join(missing)}. Nothing is lost: `python -m ctcd_trainer.push "
            f"{self.args.output_dir}` uploads it later."
        )
        if error:
            raise ConnectionError(text)
        logger.warning(text)
