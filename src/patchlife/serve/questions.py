"""What is asked about a photo, and what a service can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Ask", "Description", "Task"]

Task = Literal["predict", "embed"]


@dataclass(frozen=True)
class Ask:
    """What is asked about a photo.

    Attributes:
        task: classes or the embedding.
        budget: that answers.
        top: number of classes.
        lives: whether the lives of the patches are told.
    """

    task: Task
    budget: float
    top: int = 5
    lives: bool = False


@dataclass(frozen=True)
class Description:
    """What a service can be asked.

    Attributes:
        name: of the model.
        tasks: classes, embeddings or both.
        classes: number of classes.
        budget: that answers by default.
        budgets: the only ones that can be asked for, the largest first; None for any of two digits.
        mode: fixed or adaptive.
    """

    name: str
    tasks: tuple[Task, ...]
    classes: int
    budget: float
    budgets: tuple[float, ...] | None
    mode: str
