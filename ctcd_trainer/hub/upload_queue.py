"""Uploads to the Hub that neither stop nor slow a training: in the background, tried again, remembered on disk."""

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo
from transformers.utils import logging

from .errors import limit_silence, needs_mending, seconds_asked_for, without_token
from .snapshots import oldest_alone, snapshot
from .upload import Upload

logger = logging.get_logger(__name__)

#: Folder in the output folder for what is still to be uploaded.
PUSH_FOLDER = "_push"
_PENDING = "pending.json"
#: Seconds to wait after a first failure, and at most; each further failure doubles the time.
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 600.0
#: Seconds that `finish` waits in all because the Hub asks for it.
_PATIENCE = 3600.0
#: Checkpoints that are kept for uploads alone.
_MOST_ALONE = 3
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Pause:
    """Until when (of `time.monotonic`) a repository is left alone, after how many failures, and at whose wish."""

    until: float
    failures: int
    asked: bool


class UploadQueue:
    """What is to be uploaded from an output folder, in order. A newer upload to a place takes the place of an older.

    What could not be uploaded is kept in a file (without any token), so that a later process can go on.

    Args:
        output_dir: The output folder.
        token: Token of the Hub; `None` for the one that the machine is logged in with. It is never written or logged.
    """

    def __init__(self, output_dir: str | os.PathLike, token: str | None = None) -> None:
        limit_silence()
        self.output_dir = Path(output_dir)
        self.token = token
        self.folder = self.output_dir / PUSH_FOLDER
        self._lock = threading.RLock()
        self._running: Future[None] | None = None
        self._patient = False
        self._current: Upload | None = None
        self._pauses: dict[str, _Pause] = {}
        self._to_mend: set[str | Upload] = set()
        self._errors: dict[Upload, str] = {}
        self._commits: dict[tuple[str, str, str], CommitInfo] = {}
        self._pending: list[Upload] = []
        path = self.folder / _PENDING
        if path.exists():
            try:
                found = json.loads(path.read_text())
                self._pending = [Upload(**{**each, "ignore": tuple(each["ignore"])}) for each in found]
            except (ValueError, TypeError, KeyError) as error:
                kept = self.folder.with_name(f"{PUSH_FOLDER}-unreadable-{time.time_ns()}")
                self.folder.rename(kept)
                logger.warning(
                    "%s cannot be read, so what it names is not pushed and kept in %s: %s", path, kept, error
                )

    @property
    def missing(self) -> dict[Upload, str]:
        """What is not yet on the Hub, and why."""
        with self._lock:
            return {upload: self._errors.get(upload, "not tried yet") for upload in self._pending}

    def commit_of(self, upload: Upload) -> CommitInfo | None:
        """The last commit of this process to the place of an upload."""
        with self._lock:
            return self._commits.get(upload.place)

    def name_in_full(self, name: str, full_name: str) -> None:
        """Have all uploads to a repository name it alike, with its owner."""
        with self._lock:
            if any(upload.repo_id == name != full_name for upload in self._pending):
                self._pending = [
                    dataclasses.replace(upload, repo_id=full_name) if upload.repo_id == name else upload
                    for upload in self._pending
                ]
                self._write()

    def add_folder(self, folder: str | os.PathLike, uploads: Iterable[Upload], live: bool = False) -> list[Upload]:
        """Note what is to be uploaded of a folder as it is now; that begins with `start`.

        Args:
            folder: A checkpoint, whose files never change; or with `live` the output folder, for the models in it.
            uploads: The uploads, whose folders are relative to this one.
            live: Whether the files may change later; see `snapshots.snapshot`.

        Returns:
            The uploads, of the snapshot.

        Raises:
            OSError: There is no room for the snapshot, say. Nothing is noted.
        """
        with self._lock:
            try:
                kept = snapshot(folder, self.folder, live).relative_to(self.output_dir)
            except OSError:
                self._write()  # or else an empty folder may be left
                raise
            added = [dataclasses.replace(upload, folder=os.path.normpath(kept / upload.folder)) for upload in uploads]
            places = {upload.place for upload in added}
            self._pending = [each for each in self._pending if each.always or each.place not in places] + added
            self._drop_oldest()
            self._write()
        return added

    def start(self, patiently: bool = False) -> Future[None]:
        """Upload in the background, unless that is being done.

        Args:
            patiently: Whether to leave alone for a while what has failed, and what must be mended first for good.

        Returns:
            Which is done when nothing more is uploaded.
        """
        with self._lock:
            running = self._running is not None and not self._running.done()
            self._patient = patiently and (self._patient or not running)
            if not running:
                self._running = in_background(self._upload_all)
            return self._running

    def finish(self, timeout: float | None = None) -> None:
        """Wait until everything that can be uploaded is; what has failed is tried once more. See `missing` then.

        Args:
            timeout: Seconds after which to go on without waiting any longer; `None` for no limit.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        patience, patiently = _PATIENCE, False
        running = self._running
        if running is not None:
            _join(running, end)
        while self._pending:
            _join(self.start(patiently), end)
            now = time.monotonic()
            with self._lock:
                waiting = {each.repo_id for each in self._pending if not self._to_mend & {each, each.repo_id}}
                asked = [pause.until for name, pause in self._pauses.items() if pause.asked and name in waiting]
            seconds = max(0.0, max(asked, default=float("inf")) - now)
            if seconds > patience or now + seconds > end:
                break
            logger.warning("The Hub asks to wait: the next try is in %.0f seconds.", seconds)
            time.sleep(seconds)
            patience -= seconds
            patiently = True  # the other repositories have had their last try

    def _upload_all(self) -> None:
        """Upload until nothing is left that is due and has not been tried in this round."""
        tried: set[Upload] = set()
        while True:
            with self._lock:
                self._current = upload = next((each for each in self._pending if self._is_due(each, tried)), None)
                self._remove_unused()
                if upload is None:
                    self._running = None  # what is added from now on needs another round
                    return
            tried.add(upload)
            try:
                commit = upload.make(self.output_dir, self.token)
            except Exception as error:  # whatever goes wrong, the training goes on
                with self._lock:
                    self._note_failure(upload, error)
            else:
                with self._lock:
                    self._note_success(upload, commit)

    def _is_due(self, upload: Upload, tried: set[Upload]) -> bool:
        if upload in tried:
            return False
        pause = self._pauses.get(upload.repo_id)
        waits = pause is not None and time.monotonic() < pause.until
        return not self._patient or not (waits or self._to_mend & {upload, upload.repo_id})

    def _note_success(self, upload: Upload, commit: CommitInfo) -> None:
        if upload in self._pending:
            # An older one to this place would now undo it.
            older = self._pending[: self._pending.index(upload)]
            done = {upload, *(each for each in older if each.place == upload.place)}
            self._pending = [each for each in self._pending if each not in done]
        self._commits[upload.place] = commit
        self._pauses.pop(upload.repo_id, None)
        self._to_mend.discard(upload.repo_id)
        self._current = None
        self._write()

    def _note_failure(self, upload: Upload, error: Exception) -> None:
        self._errors[upload] = without_token(error, self.token)
        then = "will be tried again at a later save"
        if needs_mending(error):
            what = upload if isinstance(error, NotADirectoryError) else upload.repo_id
            self._pauses.pop(upload.repo_id, None)  # what the Hub has asked for before does not matter any more
            if what in self._to_mend:
                return
            self._to_mend.add(what)
            then = "will be tried again at the end only, since waiting does not mend it"
        else:
            self._to_mend.discard(upload.repo_id)
            failures = self._pauses[upload.repo_id].failures if upload.repo_id in self._pauses else 0
            asked = seconds_asked_for(error)
            pause = max(asked, min(_FIRST_WAIT * 2 ** min(failures, 10), _LONGEST_WAIT))
            self._pauses[upload.repo_id] = _Pause(time.monotonic() + pause, failures + 1, asked > 0)
        logger.warning("Uploading %s has failed and %s: %s", upload, then, self._errors[upload])

    def _drop_oldest(self) -> None:
        """Forget the oldest checkpoints, where too many take space only because the Hub does not take them."""
        snapshots = {path for upload in self._pending if (path := self._snapshot_of(upload)) is not None}
        snapshots -= {self._snapshot_of(self._current)} if self._current is not None else set()
        for path in oldest_alone(snapshots, _MOST_ALONE):
            dropped = [upload for upload in self._pending if self._snapshot_of(upload) == path]
            self._pending = [upload for upload in self._pending if upload not in dropped]
            logger.warning(
                "Not pushed any more, because the Hub has not taken the %d newer checkpoints either that have been "
                "removed from the output folder: %s",
                _MOST_ALONE,
                "; ".join(map(str, dropped)),
            )

    def _snapshot_of(self, upload: Upload) -> Path | None:
        parts = Path(upload.folder).parts
        return self.folder / parts[1] if parts[:1] == (PUSH_FOLDER,) else None

    def _write(self) -> None:
        """Write down what is to be uploaded, or remove the folder if nothing is."""
        if not self._pending and self._current is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        try:
            temporary = self.folder / f"{_PENDING}.tmp"
            with temporary.open("w") as file:
                json.dump([dataclasses.asdict(upload) for upload in self._pending], file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / _PENDING)
        except OSError as error:  # a full disk, say: it is only needed if this process ends too early
            logger.warning("What is still to be pushed could not be written down in %s: %s", self.folder, error)

    def _remove_unused(self) -> None:
        """Remove the snapshots in which nothing is that is to be uploaded."""
        uploads = [*self._pending, *([] if self._current is None else [self._current])]
        needed = {self._snapshot_of(upload) for upload in uploads}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir() and path not in needed:
                shutil.rmtree(path, ignore_errors=True)


def in_background(work: Callable[[], _Result]) -> Future[_Result]:
    """Call a function in a thread that keeps no process from ending although the Hub does not answer."""
    future: Future[_Result] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # nobody may be left waiting
            future.set_exception(error)

    threading.Thread(target=call, name="ctcd-uploads", daemon=True).start()
    return future


def _join(future: Future[None], end: float) -> None:
    """Wait until it is done, but not beyond a time of `time.monotonic`."""
    wait([future], None if end == float("inf") else max(0.0, end - time.monotonic()))
    if future.done() and future.exception() is not None:  # a mistake of ours must not end a training
        logger.warning("The uploads have come to a halt: %r", future.exception())
