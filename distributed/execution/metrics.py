"""What Prometheus, and with it the Ray dashboard and Grafana, see of a run: `ray_dualrs_*`, tagged with the store."""

from typing import Any

__all__ = ["Gauges", "ReplicaMetrics"]


def _metrics(kind: str, described: dict[str, str], **options: Any) -> dict[str, Any]:
    """Of Ray, by name: what each of them is."""
    import ray.util.metrics

    make = getattr(ray.util.metrics, kind)
    return {name: make(f"dualrs_{name}", text, tag_keys=("store",), **options) for name, text in described.items()}


class ReplicaMetrics:
    """Counted by each replica."""

    def __init__(self, store: str) -> None:
        self._tags = {"store": store}
        self._counters = _metrics(
            "Counter",
            {
                "examples_total": "examples committed",
                "draws_total": "noisy copies classified",
                "errors_total": "examples that could not be run",
                "retries_total": "shards begun again after a loss",
            },
        )
        took = {"shard_seconds": "time from a shard's arrival to its commit"}
        (self._seconds,) = _metrics("Histogram", took, boundaries=[1, 2, 5, *(10 * 2**n for n in range(7))]).values()

    def committed(self, seconds: float, **amounts: int) -> None:
        """Count a committed shard; `amounts` by the counters' names without `_total`."""
        self._seconds.observe(seconds, self._tags)
        for name, amount in amounts.items():
            if amount:
                self._counters[f"{name}_total"].inc(amount, self._tags)


class Gauges:
    """Set by the driver."""

    def __init__(self, store: str, **described: str) -> None:
        self._tags, self._gauges = {"store": store}, _metrics("Gauge", described)

    def set(self, **values: float) -> None:
        """New values, by name."""
        for name, value in values.items():
            self._gauges[name].set(value, self._tags)
