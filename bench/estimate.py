"""What `--dry-run` predicts for a step, against what the step then takes: Dual RS and labels of the digits."""

import tempfile
import time
from pathlib import Path

from bench.budgets import trained
from bench.pairs import digits
from bench.settings import Settings
from bench.timing import Line, spread
from core.config import parse_config
from core.data import Split
from distributed.checks.estimate import count_parts
from distributed.checks.measure import measure_parts
from distributed.execution.launch import certify_store, step_of
from distributed.store.run_directory import RunDirectory

__all__ = ["estimate"]


def estimate(settings: Settings) -> list[Line]:
    """Predicted over measured device seconds of a step that has one replica in this process."""
    models, found = trained(settings), []
    digits()  # what it imports belongs to a replica's start, which is measured once and paid once in this process
    # Of the test split: what makes some ten seconds of work. Shards of a given size, so that no rate is measured first.
    sizes = {"dataset": 1200, "certificates/standard-base": 200}
    for store in list(sizes)[:1] if settings.tiny else sizes:
        changes = ["compute.executor=local", "compute.progress_interval_s=1e9", "compute.shard_examples=20"]
        changes.append(f"dataset.test_size={1700 if settings.tiny else sizes[store]}")
        ratios = []
        for _ in range(min(settings.turns, 2)):
            with tempfile.TemporaryDirectory() as folder:
                config = parse_config(models.config.model_dump(mode="json"), changes)
                run = RunDirectory(folder, config)
                (Path(folder) / "models").mkdir()
                for name in models.model_hashes(["denoiser", "classifier"]):
                    run.model(name).symlink_to(models.model(name).absolute())
                step = models.manifest["steps"]["train_base"]
                run.finish("train_base", read={}, wrote=step["wrote"], facts={})
                split: Split = "train" if store == "dataset" else "test"
                data = {split: run.data(split)}
                (part,) = count_parts(run, [step_of(store)], data, {}, 1)
                notes = measure_parts(run, [part], data, settings.device, 0.2 if settings.tiny else 3.0)
                assert not notes, notes
                start = time.perf_counter()
                certify_store(run, store)
                ratios.append((part.device_s or 0.0) / (time.perf_counter() - start))
        what = f"{step_of(store)}: device time by --dry-run / measured"
        found.append(Line("estimate", what, spread(ratios), wanted="1+- 0.15"))
    return found
