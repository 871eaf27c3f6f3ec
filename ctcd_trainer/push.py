"""Upload the models of an output folder to the Hugging Face Hub: `python -m ctcd_trainer.push OUTPUT_DIR`.

The repositories and `hub_strategy` are those of the training, from `training_args.bin`. If OUTPUT_DIR itself holds no
model, the models of its last checkpoint are uploaded. Log in with `hf auth login` or set HF_TOKEN before.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import sort_checkpoints

from .graph import STUDENT, TEACHER
from .hub.repositories import TRAINING_STATE, PairUploads
from .hub.upload_queue import NOT_MODELS, Upload, without_token

_ARGUMENT = "_hub_model_id"


def main() -> None:
    """Upload what is in the folder now."""
    parser = argparse.ArgumentParser(
        prog="python -m ctcd_trainer.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="output folder of the training")
    parser.add_argument("--revision", help="branch, or pull request refs/pr/N (default: that of the training)")
    parser.add_argument("--private", action="store_true", default=None, help="make new repositories private")
    options = parser.parse_args()
    failed = False
    try:
        for upload in _uploads_of(options.output_dir, options.revision, options.private):
            try:
                print(f"Uploaded {upload}: {upload.make(token=None).commit_url}")
            except Exception as error:  # the other uploads may succeed
                failed = True
                print(f"error: {upload} failed: {without_token(error, None)}", file=sys.stderr)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(int(failed))


def _uploads_of(output_dir: Path, revision: str | None, private: bool | None) -> list[Upload]:
    """Make the repositories; return the uploads that bring the Hub to the state of an output folder.

    Raises:
        ValueError: The folder holds no models or no arguments, or the Hub refuses the token or a name.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(output_dir))]
    models = next((path for path in (output_dir, *reversed(checkpoints)) if _holds_model(path)), None)
    if models is None:
        raise ValueError(f"There is no model in {str(output_dir)!r}. Give the `output_dir` of a training.")
    try:
        args = torch.load(models / TRAINING_ARGS_NAME, weights_only=False)
    except Exception as error:  # any, since it is a pickle
        raise ValueError(
            f"The repositories are not known, since {str(models / TRAINING_ARGS_NAME)!r} cannot be read: {error!r}. "
            f"Upload with `hf upload REPOSITORY {models}`."
        ) from error
    args.hub_revision = revision or args.hub_revision
    arguments = [field.name for field in dataclasses.fields(args) if field.name.endswith(_ARGUMENT)]
    names = {STUDENT, *(name.removesuffix(_ARGUMENT) for name in arguments)}
    folders = {TEACHER: ".", **{name: name for name in sorted(names) if (models / name).is_dir()}}
    pair = PairUploads(args, folders)
    pair.make_repositories(private=private)
    saved = models == output_dir
    uploads = pair.uploads_of_models(
        "Models of the output folder" if saved else f"Models of {models.name}",
        str(models),
        ignore=NOT_MODELS if saved else TRAINING_STATE,
        keep_card=not saved,
        revision=args.hub_revision,
    )
    for path in checkpoints:
        uploads += pair.uploads_of_checkpoint(path.name, path.name, str(path), revision=args.hub_revision)
    return list({upload.place: upload for upload in uploads}.values())  # of `last-checkpoint`, the last


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "adapter_config.json").exists()


if __name__ == "__main__":
    main()
