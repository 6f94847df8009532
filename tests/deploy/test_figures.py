"""Dashboard and alert rules ask for what the service really has: each query is parsed and held against /metrics."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.files import COMPOSE, DEPLOY
from tests.service.inference_helpers import BASE, InferenceServer

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "loraplex.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
SCRAPE = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
PROMETHEUS_OWN = {"up"}
TARGET_LABELS = {"instance", "job"}


def queries() -> Iterator[tuple[str, str]]:
    """(where, query) of every panel and rule; Grafana's own variables replaced by values."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            yield f"panel {panel['title']!r}", query
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None and not isinstance(child, str):
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


def grouped(query: str) -> set[str]:
    """The labels that a query groups by."""
    return {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}


@pytest.fixture(scope="module")
def exposed(base_model_dir: Path) -> dict[str, set[str]]:
    """Labels by name of every series of a server that has answered a request."""
    server = InferenceServer(base_model_dir, metrics_top_adapters=1, metrics_top_tenants=1)
    try:
        server.start()
        server.openai.completions.create(model=BASE, prompt="Hello there", max_tokens=2)
        series = server.metrics()
    finally:
        server.stop()
    labels: dict[str, set[str]] = defaultdict(set)
    for key in series:
        name, _, rest = key.partition("{")
        labels[name] |= set(re.findall(r'(\w+)="', rest))
    return labels


def test_every_query_asks_for_what_is_there(exposed: dict[str, set[str]]) -> None:
    wrong, asked = [], set()
    for where, query in queries():
        known = set(TARGET_LABELS)
        for selector in selectors(promql_parser.parse(query)):
            if selector.name in PROMETHEUS_OWN:
                continue
            asked.add(selector.name)
            if selector.name not in exposed:
                wrong.append(f"{where}: there is no {selector.name}")
                continue
            known |= exposed[selector.name]
            missing = {m.name for m in selector.matchers.matchers} - exposed[selector.name] - TARGET_LABELS
            wrong += [f"{where}: {selector.name} has no label {label}" for label in missing]
        wrong += [f"{where}: nothing there has the label {label}" for label in grouped(query) - known]
    assert wrong == []
    assert len(asked) > 40
    # Nothing that matches the pattern escaped the walk through the parsed queries.
    assert asked == {name for _, query in queries() for name in re.findall(r"\bloraplex_\w+", query)}


def test_the_check_finds_a_wrong_name() -> None:
    (selector,) = selectors(promql_parser.parse('sum by (x) (rate(loraplex_nothing{status="1"}[5m])) > 2'))
    assert selector.name == "loraplex_nothing"
    assert [matcher.name for matcher in selector.matchers.matchers] == ["status"]


def test_alerts_say_what_to_do() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]


def test_every_figure_of_the_engine_has_a_panel(exposed: dict[str, set[str]]) -> None:
    """Or is named here: what only alarms or tells that a check ran."""
    shown = {name for where, query in queries() for name in re.findall(r"\bloraplex_\w+", query)}
    engine = {name for name in exposed if name.startswith("loraplex_engine_")}
    assert len(engine) > 30
    assert engine - shown <= {"loraplex_engine_integrity_checks_total"}
    assert {"loraplex_merges"} <= set(exposed) & shown


def test_the_parts_of_the_full_profile_know_each_other() -> None:
    """Prometheus scrapes the server's name and port with the secret that Compose mounts; Grafana asks Prometheus."""
    (job,) = SCRAPE["scrape_configs"]
    ((target,),) = [each["targets"] for each in job["static_configs"]]
    host, port = target.split(":")
    for server in ("loraplex", "cpu"):
        assert host in COMPOSE["services"][server]["networks"]["default"]["aliases"]
        assert COMPOSE["services"][server]["ports"][0].endswith(f":{port}")
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in COMPOSE["services"]["prometheus"]["secrets"]
    assert COMPOSE["secrets"][secret.name] == {"environment": "LORAPLEX_ADMIN_KEY"}
    assert all((DEPLOY / "prometheus" / file).is_file() for file in SCRAPE["rule_files"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    used = {t["datasource"]["uid"] for p in DASHBOARD["panels"] for t in p.get("targets", [])}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "loraplex.yml").read_text())["providers"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in COMPOSE["services"]["grafana"]["volumes"]
    assert [panel["id"] for panel in DASHBOARD["panels"]] == list(range(1, len(DASHBOARD["panels"]) + 1))
