"""The dashboard, the alert rules and their containers, compared with what the service exposes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.http.problems import REASONS
from service.settings import Settings
from service.telemetry.metrics import OTHER, STAGES
from tests.artefacts import encode, two_class_photo
from tests.clients import in_process, serving
from tests.host_device import HostDevice

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
ENVIRONMENT = Path(sys.executable).parent
COMPOSE = ENVIRONMENT / "docker-compose"
PHOTO = encode(two_class_photo())

RULES = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
PROMETHEUS = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "fcn-segment.json").read_text())

ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = DASHBOARD["panels"]
QUERIES = {
    **{rule["alert"]: rule["expr"] for rule in ALERTS},
    **{
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in PANELS
        for target in panel["targets"]
    },
}

TARGET_LABELS = {"job", "instance"}
"""The labels that Prometheus itself adds to every series and to `up`."""

Exposed = dict[str, set[str]]


def labels_of(text: str) -> Exposed:
    """The labels of every metric in a text."""
    exposed: Exposed = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    return exposed


@pytest.fixture(scope="module")
def exposed(tiny_artefact: Path) -> Exposed:
    """The metrics of two processes behind one port after a few requests."""
    with serving(tiny_artefact, processes=2, device="cpu") as server:
        while True:
            assert httpx.post(f"{server.url}/segment", content=PHOTO).status_code == 200
            httpx.post(f"{server.url}/segment", content=b"no photo")
            exposed = labels_of(httpx.get(f"{server.url}/metrics").text)
            if "worker" in exposed["fcn_ready"]:
                return exposed


@pytest.fixture
async def exposed_on_gpu(make_settings: Callable[..., Settings]) -> Exposed:
    """The metrics of a process with a GPU."""
    async with in_process(make_settings()) as client:
        engine = client.service.engines.default
        engine.model = dataclasses.replace(engine.model, gpu=HostDevice())  # type: ignore[type-var]
        return labels_of((await client.http.get("/metrics")).text)


def parsed(query: str) -> promql_parser.Expr:
    """A query as Grafana would send it. Raises `ValueError` if it is not PromQL."""
    return promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$instance", "a|b"))


def nodes(query: str) -> Iterator[Any]:
    """Every node of a query's tree."""
    found: list[Any] = []
    promql_parser.walk(parsed(query), found.append)
    yield from found


def selectors(query: str) -> Iterator[Any]:
    """Every selector of series in a query, including range selectors."""
    return (node for node in nodes(query) if isinstance(node, promql_parser.VectorSelector))


@pytest.mark.anyio
@pytest.mark.parametrize("name", QUERIES)
async def test_queries_ask_for_what_there_is(
    name: str, exposed: Exposed, exposed_on_gpu: Exposed
) -> None:
    """Each query is PromQL, and the service exposes its metrics and labels."""
    known = {"up": set[str](), **exposed_on_gpu}
    for metric, labels in exposed.items():
        known[metric] = known.get(metric, set()) | labels
    found = list(selectors(QUERIES[name]))
    assert found
    for selector in found:
        assert selector.name in known, name
        labels = known[selector.name] | TARGET_LABELS
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, (name, selector.name, matcher.name)
    # Labels to group by must belong to one of the metrics.
    labels = set.union(*(known[selector.name] for selector in found)) | TARGET_LABELS
    for node in nodes(QUERIES[name]):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= labels, name


@pytest.mark.parametrize("name", QUERIES)
def test_queries_ask_for_values_that_occur(
    name: str, make_settings: Callable[..., Settings]
) -> None:
    """The reasons, routes and stages in a query exist in the code."""
    app = create_app(make_settings())
    values = {
        "reason": REASONS,
        "route": {*app.openapi()["paths"], OTHER},
        "stage": set(STAGES),
        "job": {"fcn-segment"},
    }
    for selector in selectors(QUERIES[name]):
        for matcher in selector.matchers.matchers:
            if matcher.name in values:
                assert set(matcher.value.split("|")) <= values[matcher.name], name


def test_counters_are_only_looked_at_as_rates() -> None:
    """A counter's value alone is meaningless: it starts at 0 with its process."""
    for name, query in QUERIES.items():
        alone = Counter(selector.name for selector in selectors(query))
        alone.subtract(
            node.vector_selector.name
            for node in nodes(query)
            if isinstance(node, promql_parser.MatrixSelector)
        )
        for metric in +alone:
            assert not re.search("_(total|bucket|sum|count)$", metric), name


def test_every_alert_says_what_and_how_bad() -> None:
    """Each has only keys that Prometheus knows, a severity, and its annotations."""
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))
    for rule in ALERTS:
        assert set(rule) <= {"alert", "expr", "for", "keep_firing_for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        if "for" in rule:
            assert promql_parser.parse_duration(rule["for"]).total_seconds() >= 60
        templated = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert templated <= {"instance", "worker", "gpu"}


def entries() -> dict[str, str]:
    """The runbook's entries by heading."""
    _, _, runbook = (DOCKER / "README.md").read_text().partition("\n## Runbook\n")
    runbook, _, _ = runbook.partition("\n## ")
    _, *found = re.split(r"^#### (.+)$", runbook, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    """The annotation links to it; it has a meaning, how to confirm it, and what to do."""
    assert list(entries()) == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / path) == DOCKER / "README.md"
        assert anchor == rule["alert"].lower()
        entry = entries()[rule["alert"]]
        assert re.search(r"\n\S.+\n\*Confirm:\* .+\n(?:\S.+\n)*\*Do:\* ", entry)


@pytest.mark.anyio
async def test_the_runbook_knows_the_service(exposed: Exposed, exposed_on_gpu: Exposed) -> None:
    """Its metrics are exposed; its settings and log events are in the code."""
    code = "".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    known = {"up", *exposed, *exposed_on_gpu}
    for alert, text in entries().items():
        quoted = re.findall(r"`([^`]+)`", text)
        for query in quoted:
            if re.match(r"(fcn|process)_\w+|up\{|\w+( by \(.*?\) )?\(", query):
                assert {selector.name for selector in selectors(query)} <= known, (alert, query)
        for setting in re.findall(r"\bFCN_(\w+)", text):
            assert setting.lower() in Settings.model_fields, (alert, setting)
        events = re.findall(r"\blog `([^`]+)`(?:[^;.`]*, or `([^`]+)`)?", text)
        for event in filter(None, itertools.chain(*events)):
            assert f'"{event}"' in code, (alert, event)


def test_every_alert_is_tried() -> None:
    """`test_alerts_fire_when_they_should` makes each of them fire."""
    tried = yaml.safe_load((DOCKER / "prometheus" / "rules_test.yml").read_text())["tests"]
    fired = {
        one["alertname"] for test in tried for one in test["alert_rule_test"] if one["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in ALERTS}


def test_the_dashboard_is_whole() -> None:
    """Panels have unique ids, titles and places, and use the provisioned data source."""
    source = yaml.safe_load((DOCKER / "grafana" / "datasource.yml").read_text())["datasources"][0]
    assert DASHBOARD["uid"] == "fcn-segment"
    assert DASHBOARD["editable"] is False
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert target["datasource"] == {"type": source["type"], "uid": source["uid"]}
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["query"] == "label_values(fcn_ready, instance)"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The profile's services, as Compose itself resolves them."""
    done = subprocess.run(
        [COMPOSE, "--env-file", os.devnull, "--profile", "monitoring", "config", "--format=json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    resolved: dict[str, Any] = json.loads(done.stdout)["services"]
    return resolved


def test_the_profile_adds_two(services: dict[str, Any]) -> None:
    """Prometheus and Grafana are pinned, confined, and reachable only from this host."""
    assert set(services) == {"segment", "prometheus", "grafana"}
    for name in ("prometheus", "grafana"):
        service = services[name]
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert [port["host_ip"] for port in service["ports"]] == ["127.0.0.1"]
        for mount in service["volumes"]:
            assert mount["type"] == "volume" or mount["read_only"] is True
            assert mount["type"] == "volume" or Path(mount["source"]).exists()


def test_containers_find_their_files(services: dict[str, Any]) -> None:
    """Every path that a container uses is mounted from an existing file."""

    def inside(name: str, path: str) -> Path:
        """The file on this host."""
        mounts = [mount for mount in services[name]["volumes"] if mount["type"] == "bind"]
        for mount in mounts:
            if Path(path).is_relative_to(mount["target"]):
                return Path(mount["source"]) / Path(path).relative_to(mount["target"])
        raise AssertionError(path)

    (config,) = [
        argument.partition("=")[2]
        for argument in services["prometheus"]["command"]
        if argument.startswith("--config.file=")
    ]
    assert inside("prometheus", config).is_file()
    for rules in PROMETHEUS["rule_files"]:
        assert inside("prometheus", rules).is_file()
    provisioning = "/etc/grafana/provisioning"
    assert inside("grafana", f"{provisioning}/datasources/fcn-segment.yml").is_file()
    provider = inside("grafana", f"{provisioning}/dashboards/fcn-segment.yml")
    (found,) = yaml.safe_load(provider.read_text())["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert found["options"]["path"] == str(Path(home).parent)
    assert json.loads(inside("grafana", home).read_text()) == DASHBOARD


def test_prometheus_knows_the_services(services: dict[str, Any]) -> None:
    """It scrapes the image's port under the names in the compose file."""
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["job_name"] == "fcn-segment"
    (names,) = job["dns_sd_configs"]
    assert names["port"] == services["segment"]["ports"][0]["target"]
    assert set(names["names"]) == {"segment", "segment-cpu"}
    source = yaml.safe_load((DOCKER / "grafana" / "datasource.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


def test_alerts_fire_when_they_should() -> None:
    """Prometheus's own tool runs the rules on made-up series."""
    promtool = shutil.which("promtool", path=f"{ENVIRONMENT}:{os.environ['PATH']}")
    assert promtool, "no promtool: `make test` gets it"
    done = subprocess.run(
        [promtool, "test", "rules", DOCKER / "prometheus" / "rules_test.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
