"""Loading a data set from wherever it is: `core.data` plus Parquet files and object stores."""

from core.config import DatasetConfig
from core.data import Dataset, Split
from core.data import load_dataset as load_local
from distributed.parquet_images import read_parquet
from distributed.storage import open_storage

__all__ = ["load_dataset"]


def load_dataset(config: DatasetConfig, split: Split) -> Dataset:
    """Load one split of the configured data set; arguments and errors as for `core.data.load_dataset`.

    Images that are stored encoded stay where they are until somebody asks for them.
    """
    return load_local(config, split, open_storage=open_storage, read_parquet=read_parquet)
