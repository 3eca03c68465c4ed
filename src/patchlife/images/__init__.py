"""From a path to a tensor: find photos, read them safely, prepare them as the backbone expects."""

from .listing import PHOTO_SUFFIXES, Labelled, list_labelled, list_photos
from .loading import Batch, load_batches
from .preprocess import Preprocess
from .reading import MAX_BYTES, MAX_PIXELS, as_rgb, read_photo

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "PHOTO_SUFFIXES",
    "Batch",
    "Labelled",
    "Preprocess",
    "as_rgb",
    "list_labelled",
    "list_photos",
    "load_batches",
    "read_photo",
]
