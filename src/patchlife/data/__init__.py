"""From paths to tensors: find photos, read them safely, preprocess and batch them; class names and labels."""

from .listing import PHOTO_SUFFIXES, by_suffix, list_photos
from .loading import Batch, load_batches, load_mixed_batches, load_pixels
from .preprocess import Preprocess
from .reading import MAX_BYTES, MAX_PIXELS, AnyPhoto, Sample, as_rgb, read_photo
from .sampling import evenly_spaced
from .sources import list_samples

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "PHOTO_SUFFIXES",
    "AnyPhoto",
    "Batch",
    "Preprocess",
    "Sample",
    "as_rgb",
    "by_suffix",
    "evenly_spaced",
    "list_photos",
    "list_samples",
    "load_batches",
    "load_mixed_batches",
    "load_pixels",
    "read_photo",
]
