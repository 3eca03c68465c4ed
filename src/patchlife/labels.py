"""Names of classes: ImageNet's, a model's own, or those in a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

__all__ = ["Labels", "imagenet_labels", "numbered_labels", "read_labels"]


@dataclass(frozen=True)
class Labels:
    """What the classifier's answers are called.

    Attributes:
        names: for people, in the order of the classifier.
        ids: WordNet ids in the same order, if the classes are ImageNet's.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...] = ()

    def classes_of(self, photos: Iterable[Path]) -> list[int]:
        """The class of each photo, by the name of the folder that it lies in.

        Raises ConfigError when a folder is no class of the model.
        """
        known = self._known()
        folders = [photo.absolute().parent.name for photo in photos]
        if unknown := sorted(set(folders) - known.keys()):
            raise ConfigError(
                f"photos lie in {', '.join(unknown[:5])}, which the model knows no class of; it knows "
                f"{', '.join((self.ids or self.names)[:3])}, ...: rename the folders, or give --labels FILE"
            )
        return [known[folder] for folder in folders]

    def class_said(self, label: str | int | None, whose: object) -> int:
        """The class that a label means: a name, a WordNet id, or an index (also as text); -1 for None.

        Raises ConfigError, naming ``whose`` label it is, when it is no class of the model.
        """
        if label is None:
            return -1
        index = self._known().get(label) if isinstance(label, str) else label
        if index is None and str(label).isdecimal() and len(str(label)) < 10:
            index = int(label)
        if index is None or not 0 <= index < len(self.names):
            raise ConfigError(
                f"{whose} is labelled {label!r}, which the model knows no class of; it knows 0 to "
                f"{len(self.names) - 1}, also as {', '.join((self.ids or self.names)[:3])}, ...: correct it, or give "
                "--labels FILE"
            )
        return index

    def _known(self) -> dict[str, int]:
        return {name: index for names in (self.names, self.ids) for index, name in enumerate(names)}


def imagenet_labels() -> Labels:
    """ImageNet-1k's classes. A name that two of them share gets its WordNet id: "crane (n02012849)"."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    ids = tuple(info.label_names())
    names = [description.partition(",")[0] for description in info.label_descriptions()]
    unique = [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, ids, strict=True)]
    return Labels(tuple(unique), ids)


def numbered_labels(classes: int) -> Labels:
    """Classes that nobody named."""
    return Labels(tuple(str(index) for index in range(classes)))


def read_labels(path: Path, classes: int) -> Labels:
    """Names from a text file, one a line.

    Raises ConfigError when there is no such file, or it does not name every class once.
    """
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no text file of class names: {error}") from None
    if len(names) != classes:
        raise ConfigError(f"{path} names {len(names)} classes, the model has {classes}; give one name a line")
    return Labels(names)
