"""The dashboard against the metrics that there are."""

import importlib
import importlib.metadata
import json
import re
from pathlib import Path

from tests.project.test_deploy import text

KNOWN_METRICS = {
    "ray_dualrs_examples_total",
    "ray_dualrs_draws_total",
    "ray_dualrs_errors_total",
    "ray_dualrs_retries_total",
    "ray_dualrs_shard_seconds_bucket",
    "ray_dualrs_planned_examples",
    "ray_dualrs_committed_examples",
    "ray_dualrs_eta_seconds",
    "ray_dualrs_replicas",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
}


def test_grafana_mentions_every_metric_and_no_other() -> None:
    dashboard = json.loads(text("deploy/grafana.json"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"\bray_\w+", " ".join(expressions))) == KNOWN_METRICS
    for expression in expressions:
        assert expression.count("(") == expression.count(")"), expression
        for counter in re.findall(r"(\w+)\(ray_\w+_total", expression):
            assert counter in ("rate", "increase"), expression
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(re.findall(r"ray_\w+", variables["store"]["query"]["query"])) <= KNOWN_METRICS


def test_grafana_panels_have_their_own_ids_and_places() -> None:
    panels = json.loads(text("deploy/grafana.json"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_grafana_uses_metrics_that_the_installed_ray_exports() -> None:
    ray = importlib.import_module("ray")
    reporter = Path(str(ray.__file__)).parent / "dashboard/modules/reporter/reporter_agent.py"
    exported = reporter.read_text(encoding="utf-8")
    for metric in KNOWN_METRICS:
        if metric.startswith("ray_node_"):
            assert f'"{metric.removeprefix("ray_")}"' in exported
