"""Targets of fresh views of photos: at each step the dense model runs on what the student sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import Preprocess
from .photo_cache import PhotoCache
from .targets import Targets
from .views import Draws, draw_views, views_of, whole_photos

__all__ = ["ViewTargets"]


class ViewTargets:
    """Photos whose targets are computed anew, on a random view, each time they are used.

    The blocks before the start block are the same in student and dense model. They run once for both: the student
    begins at the tokens among the targets.

    Attributes:
        photos: their pixels.
        content: a short checksum of the photos and their stored size.
        image_size: (height, width) of the views.

    Args:
        photos: see above.
        targets_of: the dense model: from images to their targets.
        preprocess: gives the size of the views, and the scale of their values.
        device: on which views are computed.
        mixed: half of the views are mixtures of two photos.
    """

    def __init__(
        self,
        photos: PhotoCache,
        targets_of: Callable[[Tensor], Targets],
        preprocess: Preprocess,
        device: torch.device,
        mixed: bool = True,
    ) -> None:
        self.photos, self.content = photos, photos.content
        self.image_size: tuple[int, int] | None = preprocess.size
        self._size = preprocess.size
        self._targets_of, self._device, self._mixed = targets_of, device, mixed
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std)
        )

    def __len__(self) -> int:
        return len(self.photos)

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class indices of these rows, -1 where unknown."""
        return self.photos.labels(rows)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Paths of the photos of these rows, for messages."""
        return self.photos.names(rows)

    def targets(self, rows: Sequence[int]) -> Targets:
        """The targets of the whole photos of these rows, without crops, flips and mixtures, on the CPU."""
        return self._targets(self._images(rows, whole_photos(len(rows)), range(len(rows)))).to(torch.device("cpu"))

    def step_targets(self, rows: Sequence[int], part: slice, generator: torch.Generator) -> Targets:
        """The targets of random views of a ``part`` of the ``rows`` of a step.

        The draws are those of all rows, so that they do not depend on how many processes share the step.
        """
        draws = draw_views(self.photos.aspects(rows), self._size, generator, self._mixed)
        return self._targets(self._images(rows, draws, range(len(rows))[part]))

    def _images(
        self, rows: Sequence[int], draws: Draws, places: Sequence[int]
    ) -> Float[Tensor, "places channels height width"]:
        """The model's input for the views at these places of the batch of ``rows``."""

        def pixels_of(needed: list[int]) -> Tensor:
            return self.photos.pixels([rows[place] for place in needed]).to(self._device)

        return (views_of(pixels_of, draws, places, self._size) - self._mean) / self._std

    def _targets(self, images: Float[Tensor, "batch channels height width"]) -> Targets:
        """The targets in single precision, also under autocast."""
        return Targets(*(values.float() for values in self._targets_of(images)))
