"""The documented path `ctcd_trainer.task.Task`; the classes are in `ctcd_trainer.tasks`."""

from .tasks.base import Task

__all__ = ["Task"]
