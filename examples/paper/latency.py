"""Time the models of a grid on the CPU, one sequence at a time, for the figure of quality against latency.

A model is a folder with a config.json; a teacher at the root of a folder or in its `teacher/`, and a student in its
`student/`, are both found. The models are timed without their task heads, taking turns, so that whatever else the
machine does slows all of them alike.

Example:
    python -m examples.paper.latency outputs/paper/nano/prepared/models --output latency.json
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ctcd_trainer.students.costs import cpu_name, measure_latencies

#: Heads and poolers change the number of parameters by less than this share.
TOLERANCE = 0.1


def find_models(folders: list[Path]) -> dict[str, Path]:
    """The models in and right under some folders, by name.

    Raises:
        FileNotFoundError: There is none; names the folder and what was expected.
    """
    models = {}
    for folder in folders:
        found = {str(path): path for path in (folder, folder / "teacher", folder / "student") if _is_model(path)}
        if not found:
            reason = "there is no such folder" if not folder.is_dir() else "neither it nor student/ has a config.json"
            raise FileNotFoundError(
                f"{str(folder)!r} holds no model: {reason}. Pass a folder that `save_pretrained` wrote."
            )
        models |= found
    return models


def time_models(models: dict[str, Path], sequence_length: int, repeats: int) -> list[dict[str, Any]]:
    """Median time of each model for one sequence, with its shape.

    Raises:
        ValueError: A sequence is longer than a model takes; names the model and both lengths.
    """
    for name, path in models.items():
        longest = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
        if longest is not None and sequence_length > longest:
            raise ValueError(
                f"--sequence_length {sequence_length} is more than the {longest} positions of {name!r}: shorten it."
            )
    # How long a model takes does not depend on its weights.
    loaded = [AutoModel.from_config(AutoConfig.from_pretrained(path)).eval() for path in models.values()]
    latencies = measure_latencies(loaded, sequence_length, repeats)
    timed = []
    for name, model, latency in zip(models, loaded, latencies, strict=True):
        config = model.config.get_text_config()
        timed.append(
            {
                "name": name,
                "layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "parameters": model.num_parameters(),
                "latency_ms": latency,
            }
        )
    return timed


def latency_of(timed: list[dict[str, Any]], layers: int | None, parameters: int) -> float | None:
    """Latency of a model of the results: of the timed one with as many layers and about as many parameters."""
    alike = [model for model in timed if model["layers"] == layers]
    closest = min(alike, key=lambda model: abs(model["parameters"] - parameters), default=None)
    if closest is None or abs(closest["parameters"] - parameters) > TOLERANCE * parameters:
        return None
    return closest["latency_ms"]


def _is_model(path: Path) -> bool:
    return (path / "config.json").exists()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main() -> None:
    """Time the models and write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR", help="folder of one or two models")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sequence_length", type=_positive, default=128, help="tokens of the sequence (default: 128)")
    parser.add_argument("--repeats", type=_positive, default=50, help="timed calls of each model (default: 50)")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of torch (default: 1)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    try:
        timed = time_models(find_models(args.models), args.sequence_length, args.repeats)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    conditions = {
        "device": cpu_name(),
        "batch_size": 1,
        "sequence_length": args.sequence_length,
        "threads": args.threads,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"conditions": conditions, "models": timed}, indent=2) + "\n")
    for model in timed:
        print(f"{model['name']}: {model['layers']} layers, {model['latency_ms']:.1f} ms")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
