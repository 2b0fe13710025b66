"""Data sets as (stable example id, uint8 image, label)."""

from core.data.dataset import Dataset, Split, as_image, image_hash
from core.data.images import Preparation, StoredImages
from core.data.loading import load_dataset
from core.data.storage import LocalStorage, Storage

__all__ = [
    "Dataset",
    "LocalStorage",
    "Preparation",
    "Split",
    "Storage",
    "StoredImages",
    "as_image",
    "image_hash",
    "load_dataset",
]
