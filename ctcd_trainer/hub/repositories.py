"""The learners on the Hugging Face Hub: all in one repository, and each but the primary one alone in another."""

from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .upload_queue import PULL_REQUEST, Repository, Upload, UploadQueue, without_token

logger = logging.get_logger(__name__)

#: Files of a checkpoint that only resuming needs.
TRAINING_STATE = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "global_step*"),
    "feature_projections_of_*",
)
#: Weights of an earlier push that the new push does not have are deleted: `from_pretrained` would prefer one old file
#: to several new ones, and an old adapter to a new model.
_WEIGHTS = ("model*.safetensors*", "adapter_*")
#: The longest wait for uploads at the end of a training, in seconds.
_LONGEST_WAIT = 3600.0


class PairUploads:
    """Uploads of learners that train together. A failed upload is tried again and never stops a training.

    The repository `hub_model_id` receives whole folders: the primary learner at the root, the others in their folders.
    `<name>_hub_model_id` (default: `<hub_model_id>-<name>`) receives each other learner alone, at the root.

    Args:
        args: The training arguments.
        folders: Folder of each learner, relative to an output folder or a checkpoint; the primary learner (".") first.
        is_main_process: Whether this is the process that uploads. In the others, nothing happens.
    """

    def __init__(self, args: TrainingArguments, folders: Mapping[str, str], is_main_process: bool = True) -> None:
        self.args = args
        self.folders = dict(folders)
        self.is_main_process = is_main_process
        self.primary = next(iter(folders))
        self.queue = UploadQueue(args.output_dir)
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        self._repositories = {
            learner: Repository(
                name if learner == self.primary else getattr(args, _argument(learner), None) or f"{name}-{learner}"
            )
            for learner in folders
        }

    @property
    def repositories(self) -> dict[str, str]:
        """Repository of each learner, by its full name as soon as the Hub has been reached."""
        return {learner: repository.name for learner, repository in self._repositories.items()}

    @property
    def missing(self) -> list[str]:
        """The uploads that are not on the Hub, each with the reason."""
        return [f"{upload} ({upload.error})" for upload in self.queue.pending]

    def make_repositories(self, token: str | None = None, private: bool | None = None) -> str | None:
        """Make the repositories and check the right to write. If the Hub cannot be reached, this is done later.

        Args:
            token: Token of the Hub; by default `hub_token`, or else the one of `hf auth login`.
            private: Whether new repositories are private; by default `hub_private_repo`.

        Returns:
            The name of the primary learner's repository; `None` in other processes than the main one.

        Raises:
            ValueError: The Hub refuses the token or a name, or two learners have the same repository.
        """
        if not self.is_main_process:
            return None
        self._set(token, private)
        api = HfApi(token=self.queue.token)
        for learner, repository in self._repositories.items():
            argument = "hub_model_id" if learner == self.primary else _argument(learner)
            try:
                repository.make(api)
                if not (self.args.hub_revision or "").startswith(PULL_REQUEST):  # anybody may open one
                    api.auth_check(repository.name, write=True)  # to make one that exists needs no right
            except HFValidationError as error:
                raise ValueError(
                    f"`{argument}={repository.name!r}` is not a valid name of a repository: {error} Change it."
                ) from error
            except Exception as error:  # the client's HTTP library, and so the errors, vary with its version
                text = without_token(error, self.queue.token)
                if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                    raise ValueError(
                        f"The Hub does not let you write to `{argument}={repository.name!r}`: {text}. Log in with "
                        "`hf auth login` or pass a `hub_token` with the right to write, or set `push_to_hub=False`."
                    ) from None  # the error may tell the token
                logger.warning("The repository %r cannot be made now. It is tried later: %s", repository.name, text)
        names = list(self.repositories.values())
        if len(set(names)) < len(names):
            raise ValueError(f"Each model needs another repository, but these are given: {self.repositories}.")
        return names[0]

    def push(
        self,
        folder: str,
        message: str,
        blocking: bool = True,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the models in an output folder; they may be overwritten meanwhile.

        Returns:
            The commit to the primary learner's repository, or without `blocking` its future; `None` in other processes
            than the main one.

        Raises:
            ConnectionError: Something is not on the Hub; without `blocking`, the future raises it.
            OSError: There is no room for the copy that is uploaded.
        """
        if not self.is_main_process:
            return None
        self._set(token, private)
        uploads = self.uploads_of_models(message, revision=revision or self.args.hub_revision)
        place = uploads[0].place
        self.queue.add(folder, uploads, live=True)

        def push() -> CommitInfo | None:
            self.queue.upload_pending()
            if self.missing:
                raise ConnectionError(self._remedy)
            return self.queue.commits.get(place)

        future = self.queue.in_background(push)
        return future.result() if blocking else future

    def push_checkpoint(self, folder: str, step: int) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` says. If that fails, a warning is logged."""
        if not self.is_main_process or self.args.hub_strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {step}"
        options = {"revision": self.args.hub_revision, "always": self.args.hub_always_push}
        uploads = self.uploads_of_models(message, ignore=TRAINING_STATE, keep_card=True, **options)
        uploads += self.uploads_of_checkpoint(Path(folder).name, f"{message}, checkpoint", **options)
        try:
            self.queue.add(folder, uploads)
        except OSError as error:  # also `shutil.Error`
            logger.warning("The checkpoint %s is not pushed: %s", folder, error)
        else:
            self.queue.start()

    def finish(self) -> None:
        """Wait for the uploads at the end of a training, and warn of those that are not on the Hub.

        The other processes wait in their next collective call meanwhile, which fails after `ddp_timeout` seconds.
        """
        if self.is_main_process and self.queue.pending:
            several = self.args.world_size > 1
            wait([self.queue.start()], min(_LONGEST_WAIT, self.args.ddp_timeout / 2) if several else _LONGEST_WAIT)
            if self.missing:
                logger.warning(self._remedy)

    def uploads_of_models(self, message: str, folder: str = "", **options: Any) -> list[Upload]:
        """One upload for each repository, of a folder that holds all learners; `options` are those of `Upload`."""
        uploads = []
        for learner, repository in self._repositories.items():
            places = self.folders.values() if learner == self.primary else (".",)
            weights = tuple(str(PurePosixPath(place, name)) for place in places for name in _WEIGHTS)
            bases = self._bases if learner == self.primary else {".": repository}
            place = Path(folder, self.folders[learner])
            uploads.append(Upload(repository, place, message, delete=weights, bases=bases, **options))
        return uploads

    def uploads_of_checkpoint(self, name: str, message: str, folder: str = "", **options: Any) -> list[Upload]:
        """The upload of a whole checkpoint, if `hub_strategy` asks for it; `options` are those of `Upload`."""
        paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: name}
        path = paths.get(HubStrategy(self.args.hub_strategy))
        if path is None:
            return []
        repository = self._repositories[self.primary]
        return [Upload(repository, folder, message, path, delete=("*",), bases=self._bases, **options)]

    @property
    def _bases(self) -> dict[str, Repository]:
        """The repository of each learner, by its folder."""
        return {folder: self._repositories[learner] for learner, folder in self.folders.items()}

    @property
    def _remedy(self) -> str:
        return (
            f"Not on the Hub: {'; '.join(self.missing)}. Upload what is in the output folder with `python -m "
            f"ctcd_trainer.push {self.args.output_dir}`."
        )

    def _set(self, token: str | None, private: bool | None) -> None:
        self.queue.token = token or self.args.hub_token
        for repository in self._repositories.values():
            repository.private = self.args.hub_private_repo if private is None else private


def _argument(learner: str) -> str:
    """The training argument that names the repository of a learner other than the primary one."""
    return f"{learner}_hub_model_id"
