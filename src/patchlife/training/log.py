"""What is measured while learning: JSON lines, and the same for TensorBoard where it is wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import MissingExtraError
from ..io.files import write_atomic

__all__ = ["Line", "Log", "lines_of", "require_tensorboard"]

Line = dict[str, Any]


class Log:
    """Metrics of one stage. A resumed run first drops the lines of steps that it is about to repeat.

    A line is of a step, or of what was validated after so many steps (it has a "validation" then). Lines of other stages stay
    as they are: each stage goes on from a checkpoint of its own, be it of this run or of an earlier one.

    Attributes:
        active: whether this process writes; of several, the first one does.
        seconds: of learning up to now, the run's earlier stages included, measuring and collecting not.

    Args:
        path: the file. stage: whose lines are written. active: see above. photos_per_step: in a global batch.
        first: the step that the stage goes on from. after: names of the run's earlier stages.
        tensorboard: write for it, too.
        validated: what the photos of each validated set are, as in the lines' "photos": lines of others are dropped.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        first: int,
        active: bool,
        photos_per_step: int = 1,
        tensorboard: bool = False,
        after: Sequence[str] = (),
        validated: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.stage, self.active, self.seconds = path, stage, active, 0.0
        self._photos, self._board = photos_per_step, None
        self._validated: set[tuple[int, str, float]] = set()
        if not active:
            return
        behind = _kept(path, stage, first, validated or {})
        if path.is_file():
            write_atomic(path, "".join(line + "\n" for line, _ in behind))
        for _, values in behind:
            if values["stage"] in (stage, *after):
                self._note(values)
        if tensorboard:  # written anew, so that it always says what the lines say
            self._board = _board(path.with_name("tensorboard") / stage)
            for _, values in behind:
                if values["stage"] == stage:
                    self._draw(values)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        if self.active:
            line = {"stage": self.stage, **_rounded(values)}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._note(line)
            self._draw(line)

    def has(self, step: int, validated: str, budget: float) -> bool:
        """Whether it was written already what ``validated`` came to after ``step`` steps."""
        return (step, validated, budget) in self._validated

    def _note(self, line: Line) -> None:
        self.seconds += self._photos / line["photos_per_s"] if "photos_per_s" in line else 0
        if "validation" in line and line["stage"] == self.stage:
            self._validated.add((line["step"], line["validation"], line["budget"]))

    def _draw(self, line: Line) -> None:
        if self._board is None:
            return
        among = f"{line['validation']} at {line['budget']:g}/" if "validation" in line else ""
        for name, value in line.items():
            if isinstance(value, float) and not (among and name == "budget"):
                self._board.add_scalar(among + name, value, line["step"])


def require_tensorboard() -> None:
    """Raises MissingExtraError where there is no TensorBoard, before anything is done."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise MissingExtraError("tensorboard", "tensorboard", "--tensorboard") from None


def _board(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))


def lines_of(path: Path) -> list[tuple[str, Line]]:
    """The lines of a metrics file with their values, without one that was cut off by a crash."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            lines.append((text, json.loads(text)))
    return lines


def _kept(path: Path, stage: str, first: int, validated: Mapping[str, str]) -> list[tuple[str, Line]]:
    """Lines of other stages and of what is already behind us, without those of other photos by a validated set's name."""
    kept = []
    for text, values in lines_of(path):
        # what was validated after `first` steps is behind us, the step of that number is yet to come
        behind = values["stage"] != stage or values["step"] < first + ("validation" in values)
        if behind and values.get("photos") == validated.get(values.get("validation", ""), values.get("photos")):
            kept.append((text, values))
    return kept


def _rounded(values: Mapping[str, Any]) -> Line:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
