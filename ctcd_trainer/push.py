"""Uploads what a training could not: `python -m ctcd_trainer.push OUTPUT_DIR`.

The token is the one of `hf auth login` or of the environment variable HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

from .hub.upload_queue import UploadQueue


def main() -> None:
    """Upload what is left of an output folder, and say what is still missing."""
    parser = argparse.ArgumentParser(
        prog="python -m ctcd_trainer.push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="output folder of the training")
    args = parser.parse_args()
    if not args.output_dir.is_dir():
        sys.exit(f"error: there is no folder {str(args.output_dir)!r}. Give the `output_dir` of a training.")
    queue = UploadQueue(args.output_dir)
    missing = queue.missing
    if not missing:
        queue.start().result()  # removes what a killed process has left
        print(f"Nothing is left to upload of {str(args.output_dir)!r}.")
        return
    queue.finish()
    errors = queue.missing
    for upload in missing:
        if upload in errors:
            print(f"still missing: {upload}: {errors[upload]}", file=sys.stderr)
        else:
            print(f"uploaded {upload}")
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
