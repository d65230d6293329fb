"""The exception tree. Every message is one sentence: the law, the value, the way out.

AutoCompressError            exit 2   something about the request or the environment
├── UsageError               exit 2   a name, option, budget or file that cannot be used as given
│   └── UnknownName          exit 2   not one of the known names (carries the nearest spelling)
├── TaskError                exit 2   the task's model or data is unusable (NaN weights, empty split, raises)
├── UnsupportedModel         exit 2   the graph has something that cannot be followed; names the layer
├── InfeasibleBudget         exit 3   no plan can meet the budgets; carries the lower bound
├── BudgetUnmet              exit 3   a plan was made, but what was measured misses a budget
├── VerificationError        exit 4   an exported file does not compute what was searched
├── MeasurementError         exit 2   a device cannot be measured, or only with too much noise
├── StoreError               exit 2   the job store or the disk refuses
├── WorkerError              exit 2   worker processes cannot be used, or end again and again
└── Cancelled                exit 130 stopped by the user; everything so far is kept
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoCompressError(Exception):
    """Base of all errors that are meant for a person to read."""

    exit_code = 2


class UsageError(AutoCompressError):
    """A name, option, budget or file that cannot be used as given."""


class UnknownName(UsageError):
    """``value`` is not one of ``known``; the message holds the nearest spelling."""

    def __init__(self, what: str, value: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        tail = f" {hint}" if hint else ""
        super().__init__(f"Unknown {what} {value!r}; known: {', '.join(names) or 'none'}.{guess}{tail}")
        self.value, self.known, self.nearest = value, names, near[0] if near else None


class TaskError(AutoCompressError):
    """The task's model or data is unusable."""


class UnsupportedModel(AutoCompressError):
    """The model's graph has something that cannot be followed; the message names the layer."""


class InfeasibleBudget(AutoCompressError):
    """No plan can meet the budgets: the message holds the lower bound and what holds it."""

    exit_code = 3


class BudgetUnmet(AutoCompressError):
    """A plan was made, but a budget does not hold when measured."""

    exit_code = 3


class VerificationError(AutoCompressError):
    """An exported file does not compute what was searched."""

    exit_code = 4


class MeasurementError(AutoCompressError):
    """A device cannot be measured, or only with too much noise."""


class StoreError(AutoCompressError):
    """The job store or the disk refuses."""


class WorkerError(AutoCompressError):
    """Worker processes cannot be used as they are, or end again and again."""


class Cancelled(AutoCompressError):
    """Stopped by the user; everything so far is kept."""

    exit_code = 130
