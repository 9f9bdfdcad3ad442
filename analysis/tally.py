"""How a diagnostic is run: measured visit by visit on any process, taken up in the visits' order on one.

    record = tally.measure(visit)                          # needs the model; the process that makes the visit
    tally.take(visit.clips, visit.condition, record)       # needs none; every record, in global order
    rows = tally.rows()

A record is plain data, so that it can be written to disk (a killed diagnosis goes on where it was) and sent between processes: what was
measured on one process, on several, or in two halves is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from analysis.visits import Visit
from data.clips import Clip

Record = dict[str, Any]  # str -> numpy array, or a JSON value


class Tally(ABC):
    """One diagnostic over all visits."""

    @abstractmethod
    def measure(self, visit: Visit) -> Record:
        """What the model does on this visit's clips; changes nothing here."""

    def depends(self, clips: Sequence[Clip], start: int) -> Any:
        """What else than the clips, the model and the settings `measure` depends on, for a visit of these clips of which `start` come before it: as
        JSON can hold it. A record is measured anew where this is another."""
        return None

    @abstractmethod
    def take(self, clips: Sequence[Clip], condition: str, record: Record) -> None:
        """Take up what was measured on a visit."""

    def add(self, visit: Visit) -> None:
        """Both, on one process."""
        self.take(visit.clips, visit.condition, self.measure(visit))
