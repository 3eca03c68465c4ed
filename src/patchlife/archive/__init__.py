"""Many photos on a Ray cluster: the list is cut into parts, workers turn parts into records, each part is a file."""

from .folder import PartFolder, Run
from .worker import Done, Part, Work

__all__ = ["Done", "Part", "PartFolder", "Run", "Work"]
