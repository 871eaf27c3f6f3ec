"""Both models on the Hub: the pair in one repository, the student alone at the root of its own."""

import inspect
import shutil
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api

from .graph import STUDENT
from .model_card import write_model_cards
from .modeling import CoDistillationModel


class PairHubTrainer(Trainer):
    """What Trainer does for the Hub, for two models.

    `hub_model_id` receives the output folder, with the teacher at the root and the student in `student/`;
    `student_hub_model_id` (by default `<hub_model_id>-student`) receives the student alone, so that
    `pipeline(task, model=<student repo>)` works.
    """

    pair: CoDistillationModel | None

    def create_model_card(self, *args: Any, baseline: Any = None, **kwargs: Any) -> None:
        """A model card for each model, beside it; see `Trainer` and, for the `baseline`, `write_model_cards`."""
        if self.pair is None:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            bound = inspect.signature(super().create_model_card).bind(*args, **kwargs)
            write_model_cards(self, baseline, **bound.arguments)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload the pair to `hub_model_id` and the student to its own repository; see `Trainer.push_to_hub`.

        Returns:
            What Trainer returns, for the repository of the pair.
        """
        commit = super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        if self.pair is not None and self.is_world_process_zero():
            self._push_student(
                commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                private=kwargs.get("private"),
                run_as_future=not blocking,
            )
        return commit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push both models of a checkpoint while training goes on, as `hub_strategy` says."""
        if self.pair is None:
            return super()._push_from_checkpoint(checkpoint_folder)
        jobs = self.push_in_progress
        busy = jobs is not None and not jobs.is_done() and not self.args.hub_always_push
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or busy:
            return
        # Trainer copies the teacher's files from the checkpoint to the output folder, which it then uploads.
        source, target = (self.pair.folder_of(STUDENT, root) for root in (checkpoint_folder, self.args.output_dir))
        shutil.copytree(source, target, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)
        job = self._push_student(
            f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
        )
        self.push_in_progress.jobs.append(job)

    def _push_student(
        self, commit_message: str | None, token: str | None, private: bool | None = None, **options: Any
    ) -> Any:
        """Upload the folder of the student as a repository of its own, which is created if need be."""
        name = getattr(self.args, "student_hub_model_id", None) or f"{self.hub_model_id}-student"
        private = self.args.hub_private_repo if private is None else private
        repo_id = hf_api().create_repo(name, token=token, private=private, exist_ok=True).repo_id
        return hf_api().upload_folder(
            repo_id=repo_id,
            folder_path=self.pair.folder_of(STUDENT, self.args.output_dir),
            commit_message=commit_message,
            token=token,
            **options,
        )
