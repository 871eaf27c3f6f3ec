"""One upload to the Hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from ..cards.card import MARKER
from ..graph import STUDENT

_CARD = "README.md"
#: Weights of an earlier push are removed unless they are pushed anew: those in one file would be loaded in place of
#: newer ones in several files, and an adapter in place of a whole model.
_WEIGHTS = tuple(f"{folder}{name}" for folder in ("", f"{STUDENT}/") for name in ("model*.safetensors*", "adapter_*"))
#: Beginning of the revision of a pull request.
PULL_REQUEST = "refs/pr/"


@dataclass(frozen=True, eq=False)  # two uploads are two, also where they say the same
class Upload:
    """One commit to one repository, in which all of a folder appears at once.

    Attributes:
        repo_id: The repository; it is made if it is not there.
        folder: The folder, relative to the output folder.
        message: Commit message.
        path_in_repo: Where the folder goes.
        ignore: Patterns of files that are left out.
        replace: Whether all files that are there and are not in the folder are removed; otherwise weights alone are.
        revision: Branch, which is made if it is not there, or pull request `refs/pr/N`; `None` for the main branch.
        private: Whether a repository that is made is private; `None` for the default of its owner.
        spare_card: Whether a `README.md` stays that is there and that this package has not written.
        always: Whether it is made although a newer one to the same place is waiting.
    """

    repo_id: str
    folder: str
    message: str
    path_in_repo: str = ""
    ignore: tuple[str, ...] = ()
    replace: bool = False
    revision: str | None = None
    private: bool | None = None
    spare_card: bool = False
    always: bool = False

    @property
    def place(self) -> tuple[str, str, str]:
        """Where it goes."""
        return self.repo_id, self.path_in_repo, self.revision or "main"

    def __str__(self) -> str:
        place = "/".join(part for part in (self.repo_id, self.path_in_repo) if part)
        return f"{self.folder!r} to {place!r}" + (f" ({self.revision})" if self.revision else "")

    def make(self, output_dir: Path, token: str | None) -> CommitInfo:
        """Make the commit.

        Args:
            output_dir: The output folder.
            token: Token of the Hub; `None` for the one that the machine is logged in with.

        Raises:
            NotADirectoryError: The folder is gone.
            Exception: Whatever the client raises.
        """
        folder = output_dir / self.folder
        if not folder.is_dir():
            raise NotADirectoryError(f"{str(folder)!r} is gone: it cannot be uploaded unless you put it back")
        api = HfApi(token=token)
        repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision is not None and not self.revision.startswith(PULL_REQUEST):
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        spared = [_CARD] if self.spare_card and _has_card_of_others(repo_id, self.revision, token) else []
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=self.path_in_repo,
            commit_message=self.message,
            ignore_patterns=[*self.ignore, *spared],
            delete_patterns="*" if self.replace else list(_WEIGHTS),
            revision=self.revision,
        )


def _has_card_of_others(repo_id: str, revision: str | None, token: str | None) -> bool:
    # The client's own download would need its cache to be writable.
    url = hf_hub_url(repo_id, _CARD, revision=revision)
    response = get_session().get(url, headers=build_hf_headers(token=token))
    if response.status_code == 404:
        return False
    hf_raise_for_status(response)
    return MARKER not in response.text
