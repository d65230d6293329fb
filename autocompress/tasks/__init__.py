"""Tasks: what is compressed and how it is judged. Built-in ones by name, the user's own by a factory."""

from __future__ import annotations

from autocompress.tasks.base import Split, Task
from autocompress.tasks.check import check
from autocompress.tasks.load import known_tasks, load_task

__all__ = ["Split", "Task", "check", "known_tasks", "load_task"]
