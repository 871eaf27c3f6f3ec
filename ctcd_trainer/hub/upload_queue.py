"""Uploads to the Hugging Face Hub in the background: one commit for each place, the newest state first."""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..cards.card import MARKER
from ..pair.bases import has_own_base, link_or_copy, name_base
from ..training.warm_start import FOLDER as WARM_START

logger = logging.get_logger(__name__)

#: Beginning of the revision of a pull request.
PULL_REQUEST = "refs/pr/"
#: Files and folders at the top of an output folder that do not belong to the models.
NOT_MODELS = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{WARM_START}*")
_CARD = "README.md"
#: Beginning of the names of snapshots. Pushes leave out what begins with `_`.
_SNAPSHOT = "_push"
#: Most snapshots to keep whose checkpoints are deleted.
_MOST_ALONE = 3
_Result = TypeVar("_Result")


@dataclass(eq=False)
class Repository:
    """A model repository on the Hub.

    Attributes:
        name: Name of the repository, without its owner until the Hub has told it.
        private: Whether to make it private if it does not exist; `None` for the default of its owner.
    """

    name: str
    private: bool | None = None

    def make(self, api: HfApi) -> str:
        """Make the repository if it does not exist, and return its full name."""
        self.name = api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
        return self.name


@dataclass(eq=False)
class Upload:
    """An upload of a folder, in one commit.

    Attributes:
        repository: The repository. It is made if it does not exist.
        folder: The folder.
        message: Commit message.
        path_in_repo: Path of the folder in the repository.
        ignore: Patterns of files that are not uploaded.
        delete: Patterns of files that are deleted from that path of the repository, unless the folder has them.
        revision: Branch, which is made if it does not exist, or pull request `refs/pr/N`; `None` for the main branch.
        keep_card: Whether to keep a `README.md` on the Hub that this package has not written.
        bases: By folder in `folder`, the repository whose root has the base of the adapter there, if its base is
            saved with it.
        always: Whether to make the commit even if a newer upload to the same place is pending.
        snapshot: The copy that holds the folder, if it is in one.
        error: Why it is not on the Hub.
    """

    repository: Repository
    folder: str | os.PathLike
    message: str
    path_in_repo: str = ""
    ignore: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    revision: str | None = None
    keep_card: bool = False
    bases: Mapping[str, Repository] = field(default_factory=dict)
    always: bool = False
    snapshot: TemporaryDirectory | None = None
    error: str = "not uploaded yet"

    @property
    def place(self) -> tuple[Repository, str, str]:
        """Repository, path and revision."""
        return self.repository, self.path_in_repo, self.revision or "main"

    def __str__(self) -> str:
        place = "/".join(part for part in (self.repository.name, self.path_in_repo) if part)
        return f"{self.message!r} to {place!r}" + (f" ({self.revision})" if self.revision else "")

    def make(self, token: str | None) -> CommitInfo:
        """Make the commit.

        Args:
            token: Token of the Hub; `None` for the one of `hf auth login`.

        Raises:
            Exception: Any error of the Hub's client.
        """
        api = HfApi(token=token)
        repo_id = self.repository.make(api)
        if self.revision is not None and not self.revision.startswith(PULL_REQUEST):
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        kept = [_CARD] if self.keep_card and _has_card_of_others(api, repo_id, self.revision) else []
        own = {place: each.make(api) for place, each in self.bases.items() if has_own_base(Path(self.folder, place))}
        with _naming_bases(self.folder, own) as folder:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=self.path_in_repo,
                commit_message=self.message,
                ignore_patterns=[*self.ignore, *kept],
                delete_patterns=list(self.delete),
                revision=self.revision,
            )


class UploadQueue:
    """Pending uploads of an output folder, oldest first. A newer upload replaces an older one to the same place.

    Uploads run in the background, in rounds. A round tries each pending upload once. A failed upload stays pending.

    Args:
        output_dir: The output folder, which also holds the snapshots.
    """

    def __init__(self, output_dir: str | os.PathLike) -> None:
        self.output_dir = Path(output_dir)
        #: Token of the Hub; `None` for the one of `hf auth login`. It is never written or logged.
        self.token: str | None = None
        self.pending: list[Upload] = []
        #: The last commit to each place.
        self.commits: dict[tuple[Repository, str, str], CommitInfo] = {}
        self._current: Upload | None = None
        self._snapshots: set[TemporaryDirectory] = set()
        self._next_round: Future[None] | None = None
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def add(self, folder: str | os.PathLike, uploads: Iterable[Upload], live: bool = False) -> None:
        """Take a snapshot of a folder and queue uploads of it, with folders relative to this one, for the next round.

        Args:
            folder: A checkpoint, whose files never change; with `live` the output folder, for the models in it.
            uploads: The uploads.
            live: Whether the files may be overwritten later.

        Raises:
            OSError: There is no room for the snapshot, for example. Nothing is queued.
        """
        snapshot = take_snapshot(folder, self.output_dir, live)
        uploads = list(uploads)
        for upload in uploads:
            upload.snapshot, upload.folder = snapshot, Path(snapshot.name, upload.folder)
        places = {upload.place for upload in uploads}
        with self._lock:
            self.pending = [old for old in self.pending if old.always or old.place not in places] + uploads
            self._snapshots.add(snapshot)
            self._drop_oldest()
            self._delete_unused()

    def start(self) -> Future[None]:
        """Start a round, after the running one if there is one. Returns its future."""
        with self._lock:
            waits = self._next_round is not None and not (self._next_round.running() or self._next_round.done())
            if not waits:
                self._next_round = self.in_background(self.upload_pending)
            return self._next_round

    def upload_pending(self) -> None:
        """Try each pending upload once, also those that are added meanwhile."""
        tried: set[Upload] = set()
        while True:
            with self._lock:
                self._current = upload = next((entry for entry in self.pending if entry not in tried), None)
                self._delete_unused()
            if upload is None:
                return
            tried.add(upload)
            try:
                commit = upload.make(self.token)
            except Exception as error:  # a training goes on whatever goes wrong
                upload.error = without_token(error, self.token)
                logger.warning("Uploading %s failed. It is tried again at the next save: %s", upload, upload.error)
                continue
            with self._lock:
                self.commits[upload.place] = commit
                # An older upload to this place would undo the newer one.
                last = self.pending.index(upload) if upload in self.pending else -1
                self.pending = [
                    other for i, other in enumerate(self.pending) if i > last or other.place != upload.place
                ]

    def in_background(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Call a function in another thread, one at a time.

        The thread is a daemon, unlike that of `HfApi.run_as_future`: a Hub that never answers must not keep the
        process from ending.
        """
        future: Future[_Result] = Future()

        def call() -> None:
            with self._turn:
                future.set_running_or_notify_cancel()
                try:
                    future.set_result(work())
                except BaseException as error:  # nobody may wait for ever
                    future.set_exception(error)

        threading.Thread(target=call, name="ctcd-uploads", daemon=True).start()
        return future

    def _drop_oldest(self) -> None:
        """Drop the oldest uploads if more than `_MOST_ALONE` snapshots take space only for the Hub.

        One more may take space soon: a checkpoint is deleted after the next one is queued.
        """
        current = self._current.snapshot if self._current is not None else None
        snapshots = dict.fromkeys(upload.snapshot for upload in self.pending if upload.snapshot is not current)
        alone = [snapshot for snapshot in snapshots if _takes_space(snapshot.name)]
        for snapshot in alone[: max(0, len(alone) - _MOST_ALONE + 1)]:
            dropped = [upload for upload in self.pending if upload.snapshot is snapshot]
            self.pending = [upload for upload in self.pending if upload.snapshot is not snapshot]
            logger.warning(
                "No longer pushed, to save disk space: %s. The Hub did not take %d newer states either. Raise "
                "`save_total_limit` to keep more.",
                "; ".join(map(str, dropped)),
                _MOST_ALONE - 1,
            )

    def _delete_unused(self) -> None:
        used = {upload.snapshot for upload in (*self.pending, self._current) if upload is not None}
        for snapshot in self._snapshots - used:
            snapshot.cleanup()
        self._snapshots = used


def take_snapshot(folder: str | os.PathLike, output_dir: Path, live: bool) -> TemporaryDirectory:
    """A copy of a folder in the output folder; see `UploadQueue.add`. Copies that a killed process left are deleted.

    The copy of a checkpoint consists of hard links. The process deletes it at its end at the latest.
    """
    prefix = f"{_SNAPSHOT}-{os.getpid()}-"
    for path in output_dir.glob(f"{_SNAPSHOT}-*"):
        if not path.name.startswith(prefix):
            shutil.rmtree(path, ignore_errors=True)
    snapshot = TemporaryDirectory(prefix=prefix, dir=output_dir, ignore_cleanup_errors=True)
    top, not_models = os.fspath(folder), shutil.ignore_patterns(*NOT_MODELS)
    try:
        shutil.copytree(
            folder,
            snapshot.name,
            copy_function=shutil.copy2 if live else link_or_copy,
            ignore=lambda path, names: not_models(path, names) if live and path == top else (),
            ignore_dangling_symlinks=True,
            dirs_exist_ok=True,
        )
    except OSError:
        snapshot.cleanup()
        raise
    return snapshot


def without_token(error: Exception, token: str | None) -> str:
    """An error as text, without the token (`None` for the one of `hf auth login`)."""
    text = f"{type(error).__name__}: {error}"
    token = token or get_token()
    return text.replace(token, "***") if token else text


@contextmanager
def _naming_bases(folder: str | os.PathLike, names: Mapping[str, str]) -> Iterator[str | os.PathLike]:
    """Give a folder in which the adapters name repositories as their bases: a copy by links if there are any."""
    if not names:
        yield folder
        return
    with TemporaryDirectory(prefix=f"{_SNAPSHOT}-{os.getpid()}-", dir=folder, ignore_cleanup_errors=True) as copy:
        top, others = os.fspath(folder), shutil.ignore_patterns(*NOT_MODELS)
        shutil.copytree(
            folder,
            copy,
            copy_function=link_or_copy,
            ignore=lambda path, entries: others(path, entries) if path == top else (),
            dirs_exist_ok=True,
        )
        for place, name in names.items():
            name_base(Path(copy, place), name)
        yield copy


def _takes_space(folder: str) -> bool:
    """Tell whether a snapshot holds the only copy of a file."""
    return any(path.is_file() and path.stat().st_nlink == 1 for path in Path(folder).rglob("*"))


def _has_card_of_others(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with TemporaryDirectory() as folder:  # the cache may be read-only
        try:
            path = api.hf_hub_download(repo_id, _CARD, revision=revision, local_dir=folder)
        except RemoteEntryNotFoundError:
            return False
        return MARKER not in Path(path).read_text(encoding="utf-8")
