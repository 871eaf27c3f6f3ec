"""Folders of the project, for tests that start programs or read files."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
HELPERS = TESTS / "helpers"
PROGRAMS = TESTS / "programs"
