"""What is measured while learning: JSON lines, and the same for TensorBoard where it is wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import MissingExtraError
from ..files import write_atomic

__all__ = ["Line", "Log", "require_tensorboard"]

Line = dict[str, Any]


class Log:
    """Metrics of one stage. A resumed run first drops the lines of steps that it is about to repeat.

    A line is of a step, or of what was watched after so many steps (it has a "watch" then).

    Attributes:
        active: whether this process writes; of several, the first one does.
        seconds: of learning up to now, earlier stages and runs included, measuring and collecting not.
    """

    def __init__(
        self, path: Path, stage: str, first: int, active: bool, photos_per_step: int = 1, tensorboard: bool = False
    ) -> None:
        self.path, self.stage, self.active, self.seconds = path, stage, active, 0.0
        self._photos, self._board = photos_per_step, None
        self._watched: set[tuple[int, str, float]] = set()
        if not active:
            return
        behind = _kept(path, stage, first)
        if path.is_file():
            write_atomic(path, "".join(line + "\n" for line, _ in behind))
        own = [index for index, (_, values) in enumerate(behind) if values["stage"] == stage]
        for _, values in behind[: own[-1] + 1 if own else None]:  # what comes after our last line was learned later
            self._note(values)
        if tensorboard:  # written anew, so that it always says what the lines say
            self._board = _board(path.with_name("tensorboard") / stage)
            for index in own:
                self._draw(behind[index][1])

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

    def has(self, step: int, watched: str, budget: float) -> bool:
        """Whether it was written already what ``watched`` came to after ``step`` steps."""
        return (step, watched, budget) in self._watched

    def _note(self, line: Line) -> None:
        self.seconds += self._photos / line["photos_per_s"] if "photos_per_s" in line else 0
        if "watch" in line and line["stage"] == self.stage:
            self._watched.add((line["step"], line["watch"], line["budget"]))

    def _draw(self, line: Line) -> None:
        if self._board is None:
            return
        among = f"{line['watch']} at {line['budget']:g}/" if "watch" in line else ""
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


def _kept(path: Path, stage: str, first: int) -> list[tuple[str, Line]]:
    """Lines of other stages and of what is already behind us (a line cut off by a crash is not), with their values."""
    kept = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            continue
        # what was watched after `first` steps is behind us, the step of that number is yet to come
        if values["stage"] != stage or values["step"] < first + ("watch" in values):
            kept.append((text, values))
    return kept


def _rounded(values: Mapping[str, Any]) -> Line:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
