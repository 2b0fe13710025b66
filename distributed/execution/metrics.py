"""What Prometheus, and with it the Ray dashboard and Grafana, see of a run: `ray_dualrs_*`, tagged with the store."""

from core.training.loop import Record

__all__ = ["DriverMetrics", "ReplicaMetrics", "TrainingMetrics"]


class ReplicaMetrics:
    """Counted by each replica."""

    def __init__(self, store: str) -> None:
        from ray.util.metrics import Counter, Histogram

        tags = {"tag_keys": ("store",)}
        self._examples = Counter("dualrs_examples_total", "examples committed", **tags)
        self._draws = Counter("dualrs_draws_total", "noisy copies classified", **tags)
        self._errors = Counter("dualrs_errors_total", "examples that could not be run", **tags)
        self._retries = Counter("dualrs_retries_total", "shards begun again after a loss", **tags)
        self._seconds = Histogram(
            "dualrs_shard_seconds",
            "time from a shard's arrival to its commit",
            boundaries=[1, 2, 5, 10, 20, 40, 80, 160, 320, 640],
            **tags,
        )
        self._tags = {"store": store}

    def committed(self, examples: int, draws: int, errors: int, retried: bool, seconds: float) -> None:
        """Count a committed shard."""
        self._seconds.observe(seconds, self._tags)
        for metric, amount in (
            (self._examples, examples),
            (self._draws, draws),
            (self._errors, errors),
            (self._retries, int(retried)),
        ):
            if amount:
                metric.inc(amount, self._tags)


class DriverMetrics:
    """Set by the driver."""

    def __init__(self, store: str, planned: int) -> None:
        from ray.util.metrics import Gauge

        tags = {"tag_keys": ("store",)}
        self._committed = Gauge("dualrs_committed_examples", "examples committed, earlier runs included", **tags)
        self._eta = Gauge("dualrs_eta_seconds", "time left at the present rate", **tags)
        self._replicas = Gauge("dualrs_replicas", "replicas that committed in the last minutes", **tags)
        self._tags = {"store": store}
        Gauge("dualrs_planned_examples", "examples of the plan", **tags).set(planned, self._tags)

    def progress(self, committed: int, eta_s: float | None, replicas: int) -> None:
        """How far the step is."""
        self._committed.set(committed, self._tags)
        self._replicas.set(replicas, self._tags)
        if eta_s is not None:
            self._eta.set(eta_s, self._tags)


class TrainingMetrics:
    """Set by the driver while workers of Ray Train are at work."""

    def __init__(self, training: str) -> None:
        from ray.util.metrics import Gauge

        tags = {"tag_keys": ("store",)}
        self._gauges = {
            "epoch": Gauge("dualrs_training_epoch", "epochs done", **tags),
            "loss": Gauge("dualrs_training_loss", "mean loss of the last epoch", **tags),
            "lr": Gauge("dualrs_training_learning_rate", "of the last epoch", **tags),
            "samples_per_s": Gauge("dualrs_training_samples_per_second", "over the last epoch", **tags),
        }
        self._tags = {"store": training}

    def ended(self, record: Record) -> None:
        """An epoch."""
        for name, gauge in self._gauges.items():
            gauge.set(record[name], self._tags)
