"""Read the certificates of a run: `python examples/read_shards.py RUN` (without RUN: the labels in models/digits).

Rows are Parquet and hold the raw votes, so any question can be asked later without a forward pass.
"""

import sys
from pathlib import Path

import numpy as np

from core.procedures.confidence import certified_radius, clopper_pearson_lower
from distributed.store.shards import ShardStore

run = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent.parent / "models" / "digits")
table = ShardStore(run, "dataset").read().to_pandas()  # or certificates/standard, certificates/dual
print(f"{len(table):,} rows of {table['example_id'].nunique():,} examples")
print(table.groupby("sigma")[["correct", "abstained", "radius"]].mean().round(3).to_string())

# The radii at another alpha, from the votes.
votes = np.stack(table["counts_estimation"].to_numpy())
top = np.stack(table["counts_selection"].to_numpy()).argmax(axis=1)
p_lower = clopper_pearson_lower(votes[np.arange(len(votes)), top], table["num_estimation"].to_numpy(), 0.01)
table["radius_at_0.01"] = np.where(top == table["label"], certified_radius(p_lower, table["sigma"].to_numpy()), 0.0)
print(table.groupby("sigma")[["radius_at_0.01"]].mean().round(3).to_string())
