"""Both models on the Hub: the pair in one repository, the student alone at the root of its own."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..cards.card import CardOptions, write_model_cards
from ..graph import STUDENT
from ..pair.model import CoDistillationModel
from .errors import is_refusal, without_token
from .upload import PULL_REQUEST, Upload
from .upload_queue import UploadQueue, in_background

logger = logging.get_logger(__name__)

#: Files of a checkpoint that are for resuming alone.
_TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "global_step*")
#: Seconds that the end of a training waits for uploads at most.
_LONGEST_END = 3600.0


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

    def create_model_card(self, *args: Any, baseline: Any = None, revision: str | None = None, **kwargs: Any) -> None:
        """Write a model card for each model beside it; see `Trainer` and, for the other arguments, `CardOptions`."""
        if self.pair is None:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            options = CardOptions(*args, baseline=baseline, revision=revision, **kwargs)
            write_model_cards(self._card_facts(), self.args.output_dir, options, complete=not self.is_in_train)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None, **kwargs: Any) -> None:
        """Make both repositories; see `Trainer`. If the Hub cannot be reached, that is done later.

        Raises:
            ValueError: The Hub does not accept the token or the name of a repository, or one may not write there.
        """
        if not self._paired:
            kwargs |= {"private": private} if private is not None else {}  # not every version of Trainer has it
            return super().init_hf_repo(token, **kwargs)
        if not self.is_world_process_zero():
            return
        self._uploads = UploadQueue(self.args.output_dir, token or self.args.hub_token)
        self.push_in_progress = None
        private = self.args.hub_private_repo if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.hub_model_id = self._make_repository("hub_model_id", name, private)
        self._make_repository("student_hub_model_id", self._student_repository, private)

    def _make_repository(self, argument: str, name: str, private: bool | None) -> str:
        """Make a repository and see whether it may be written to, if the Hub can be reached; returns its full name."""
        api = HfApi(token=self._uploads.token)
        try:
            full_name = api.create_repo(name, private=private, exist_ok=True).repo_id
            self._uploads.name_in_full(name, full_name)
            name = full_name
            if not (self.args.hub_revision or "").startswith(PULL_REQUEST):  # which may be to a repository of others
                api.auth_check(name, write=True)  # making one that is there needs no right
        except HFValidationError as error:
            raise ValueError(f"`{argument}={name!r}` is no name of a repository: {error} Give another one.") from error
        except (TypeError, AttributeError):
            raise
        except Exception as error:  # of the client's HTTP library, which is not always the same
            text = without_token(error, self._uploads.token)
            if is_refusal(error):
                raise ValueError(
                    f"The Hub does not let you write to `{argument}={name!r}`: {text}. Log in with `hf auth login` or "
                    "pass a `hub_token` with the right to write, or set `push_to_hub=False`."
                ) from None  # the error may tell the token
            logger.warning("The repository %r cannot be made or tried now, and will be later: %s", name, text)
        return name

    @property
    def _student_repository(self) -> str:
        return getattr(self.args, "student_hub_model_id", None) or f"{self.hub_model_id}-student"

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the pair to `hub_model_id` and the student to its own repository; see `Trainer.push_to_hub`.

        Returns:
            What Trainer returns, for the repository of the pair: the commit, or without `blocking` its future.

        Raises:
            ConnectionError: Something could not be uploaded; without `blocking`, the future raises it. It is
                remembered: `python -m ctcd_trainer.push OUTPUT_DIR` completes it.
            OSError: The models could not be saved, or there is no room for the copy of them that is uploaded.
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
        self._write_full_cards(**kwargs, revision=revision)
        self._uploads.token = token or self.args.hub_token
        uploads = self._uploads_of(commit_message or "End of training", revision, private)
        uploads = self._uploads.add_folder(self.args.output_dir, uploads, live=True)

        def push() -> CommitInfo | None:
            self._uploads.finish()
            self._report_missing(error=True)
            return self._uploads.commit_of(uploads[0])

        return push() if blocking else in_background(push)

    def _write_full_cards(self, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write the cards of the models that are about to be pushed. If that fails, they have those of the last save.

        Raises:
            TypeError, ValueError: The arguments of the caller are not those of `create_model_card`.
        """
        all_tags = [tags] if isinstance(tags, str) else list(tags or [])
        all_tags += [tag for tag in getattr(self.teacher_model, "model_tags", None) or [] if tag not in all_tags]
        try:
            self.create_model_card(tags=all_tags or None, **{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        except Exception as error:
            if kwargs.keys() - {"revision"} and isinstance(error, (TypeError, ValueError)):
                raise
            logger.warning("The model cards could not be written, so the last ones are pushed: %r", error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save both models; see `Trainer.save_model`. A push that fails is reported, and loses nothing."""
        super().save_model(output_dir, _internal_call or self.pair is not None)
        if self.pair is None or _internal_call or not self.args.push_to_hub:
            return
        try:
            self.push_to_hub("Model save", revision=self.args.hub_revision)
        except OSError as error:
            logger.warning("The models are saved, but not all is pushed: %s", error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push both models of a checkpoint while training goes on, as `hub_strategy` says."""
        if self.pair is None:
            return super()._push_from_checkpoint(checkpoint_folder)
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        options = {"always": self.args.hub_always_push}
        uploads = self._uploads_of(message, ignore=_TRAINING_STATE, spare_card=True, **options)
        places = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        if self.args.hub_strategy in places:
            uploads.append(
                Upload(
                    self.hub_model_id,
                    ".",
                    f"{message}, checkpoint",
                    places[self.args.hub_strategy],
                    replace=True,
                    revision=self.args.hub_revision,
                    private=self.args.hub_private_repo,
                    **options,
                )
            )
        try:
            self._uploads.add_folder(checkpoint_folder, uploads)
        except OSError as error:  # `shutil.Error` among them
            logger.warning("The checkpoint %s is not pushed: %s", checkpoint_folder, error)
            return
        self._uploads.start(patiently=True)

    def _uploads_of(
        self, message: str, revision: str | None = None, private: bool | None = None, **options: Any
    ) -> list[Upload]:
        """The uploads of the pair and of the student alone, from a folder of both."""
        options |= {
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo if private is None else private,
        }
        return [
            Upload(self.hub_model_id, ".", message, **options),
            Upload(self._student_repository, self.pair.folder_of(STUDENT, "."), message, **options),
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
