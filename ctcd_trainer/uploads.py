"""Uploads to the Hub that neither stop nor slow a training: in the background, tried again, remembered on disk."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session
from transformers.utils import logging

logger = logging.get_logger(__name__)

#: Folder in the output folder for what is still to be uploaded. Uploads of the output folder leave it out.
PUSH_FOLDER = "_push"
_PENDING = "pending.json"
#: Seconds to wait after a first failure, and at most; each further failure doubles the time.
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 600.0
#: Seconds without any data after which a connection is given up; the client itself would wait for ever.
_SILENCE = 120.0


@dataclass(frozen=True, eq=False)  # two uploads are two, also where they say the same
class Upload:
    """One commit to one repository, in which all of a folder appears at once.

    Attributes:
        repo_id: The repository; it is made if it is not there.
        folder: The folder, relative to the output folder.
        message: Commit message.
        path_in_repo: Where the folder goes.
        ignore: Patterns of files that are left out.
        replace: Whether files that are there and are not in the folder are removed.
        revision: Branch; `None` for the main one.
        private: Whether a repository that is made is private; `None` for the default of its owner.
    """

    repo_id: str
    folder: str
    message: str
    path_in_repo: str = ""
    ignore: tuple[str, ...] = ()
    replace: bool = False
    revision: str | None = None
    private: bool | None = None

    def replaces(self, other: "Upload") -> bool:
        """Whether another upload to the same place need not be made any more."""
        places = [(each.repo_id, each.path_in_repo, each.revision) for each in (self, other)]
        return places[0] == places[1]

    def __str__(self) -> str:
        place = "/".join(part for part in (self.repo_id, self.path_in_repo) if part)
        return f"{self.folder!r} to {place!r}" + (f" ({self.revision})" if self.revision else "")


class UploadQueue:
    """What is to be uploaded from an output folder, in order. A newer upload to a place takes the place of an older.

    What could not be uploaded is kept in a file (without any token), so that a later process can go on.

    Args:
        output_dir: The output folder.
        token: Token of the Hub; `None` for the one that the machine is logged in with. It is never written or logged.
    """

    def __init__(self, output_dir: str | os.PathLike, token: str | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.token = token
        self.folder = self.output_dir / PUSH_FOLDER
        self._lock = threading.Lock()
        self._running: Future | None = None
        self._current: Upload | None = None
        self._reserved: str | None = None
        self._failures, self._not_before = 0, 0.0
        self._errors: dict[Upload, str] = {}
        self._pending: list[Upload] = []
        path = self.folder / _PENDING
        if path.exists():
            try:
                found = json.loads(path.read_text())
                self._pending = [Upload(**{**each, "ignore": tuple(each["ignore"])}) for each in found]
            except (ValueError, TypeError, KeyError) as error:
                logger.warning("%s cannot be read, so what it names is not pushed: %s", path, error)

    @property
    def missing(self) -> dict[Upload, str | None]:
        """What is not yet on the Hub, with the last error if it was tried."""
        with self._lock:
            return {upload: self._errors.get(upload) for upload in self._pending}

    def snapshot(self, folder: str | os.PathLike) -> str:
        """A copy of a folder whose files never change, which takes no space while the folder is there as well.

        Returns:
            Its path relative to the output folder. It is removed when nothing that is to be uploaded is in it, but not
            before the next `add`.
        """
        target = self.folder / f"{Path(folder).name}-{time.time_ns()}"
        with self._lock:
            self._reserved = target.name
            target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, target, copy_function=_link_or_copy)
        return str(target.relative_to(self.output_dir))

    def add(self, uploads: Iterable[Upload]) -> None:
        """Note what is to be uploaded; it begins with `start`."""
        with self._lock:
            for upload in uploads:
                self._pending = [each for each in self._pending if not upload.replaces(each)] + [upload]
            self._reserved = None
            self._write()

    def start(self, patiently: bool = False) -> Future:
        """Upload in the background, unless that is being done.

        Args:
            patiently: Whether to wait for a while after a failure, until one of the next calls.

        Returns:
            Whose result is there when nothing more is uploaded: the commits, by upload.
        """
        with self._lock:
            if self._running is not None and not self._running.done():
                return self._running
            if patiently and time.monotonic() < self._not_before:
                self._running = Future()
                self._running.set_result({})
                return self._running
            self._running = future = Future()
            # A daemon, so that the process can end although the Hub does not answer.
            threading.Thread(target=self._work, args=(future,), name="ctcd-uploads", daemon=True).start()
            return future

    def finish(self, timeout: float | None = None) -> dict[Upload, Any]:
        """Wait until everything that can be uploaded is; what has failed is tried once more.

        Args:
            timeout: Seconds after which to go on without waiting any longer; `None` for no limit.

        Returns:
            The commits of this last try, by upload. See `missing` for what is not there.
        """
        end = None if timeout is None else time.monotonic() + timeout
        commits: dict[Upload, Any] = {}
        for again in (False, True):
            if again and not self._pending:
                break
            future = self.start() if again else self._running
            if future is not None:
                wait([future], None if end is None else max(0.0, end - time.monotonic()))
                commits |= future.result() if future.done() else {}
        return commits

    def _work(self, future: Future) -> None:
        try:
            future.set_result(self._upload_all())
        except BaseException as error:  # a mistake of ours must not leave anybody waiting
            future.set_exception(error)

    def _upload_all(self) -> dict[Upload, Any]:
        """Upload until nothing is left that has not been tried in this round."""
        commits: dict[Upload, Any] = {}
        tried: set[Upload] = set()
        failed = False
        while True:
            with self._lock:
                self._current = next((each for each in self._pending if each not in tried), None)
                self._remove_unused()
                if self._current is None:
                    self._running = None  # what is added from now on needs another round
                    break
                upload = self._current
            tried.add(upload)
            try:
                commits[upload] = self._upload(upload)
            except Exception as error:  # whatever goes wrong, the training goes on
                failed = True
                with self._lock:
                    self._errors[upload] = self._without_token(error)
                    self._not_before = self._time_of_retry(error)
                logger.warning(
                    "Uploading %s has failed and will be tried again at a later save: %s",
                    upload,
                    self._errors[upload],
                )
            else:
                with self._lock:
                    self._pending = [each for each in self._pending if each != upload]
                    self._errors.pop(upload, None)
                    self._write()
        self._failures = self._failures + 1 if failed else 0
        return commits

    def _upload(self, upload: Upload) -> Any:
        get_session().timeout = _SILENCE
        api = HfApi(token=self.token)
        repo_id = api.create_repo(upload.repo_id, private=upload.private, exist_ok=True).repo_id
        if upload.revision is not None:
            api.create_branch(repo_id, branch=upload.revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=self.output_dir / upload.folder,
            path_in_repo=upload.path_in_repo,
            commit_message=upload.message,
            ignore_patterns=list(upload.ignore),
            delete_patterns="*" if upload.replace else None,
            revision=upload.revision,
        )

    def _time_of_retry(self, error: Exception) -> float:
        """When to try again: later after each failure, and not before the Hub says."""
        wait = min(_FIRST_WAIT * 2 ** min(self._failures, 10), _LONGEST_WAIT)
        said = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
        return time.monotonic() + max(wait, float(said) if said.isdecimal() else 0.0)

    def _without_token(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        return text.replace(self.token, "***") if self.token else text

    def _write(self) -> None:
        """Write down what is to be uploaded, or remove the folder if nothing is."""
        if not self._pending and self._reserved is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{_PENDING}.tmp"
            with temporary.open("w") as file:
                json.dump([asdict(upload) for upload in self._pending], file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / _PENDING)
        except OSError as error:  # a full disk, say: it is only needed if this process ends too early
            logger.warning("What is still to be pushed could not be written down in %s: %s", self.folder, error)

    def _remove_unused(self) -> None:
        """Remove the snapshots in which nothing is that is to be uploaded."""
        if not self.folder.is_dir():
            return
        used = [Path(upload.folder).parts for upload in [*self._pending, self._current] if upload is not None]
        names = {self._reserved, *(parts[1] for parts in used if parts[:1] == (PUSH_FOLDER,))}
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in names:
                shutil.rmtree(path, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
