"""examples/operating: every metric, path, flag and file that they name is there, and time is left for what takes time.

What Compose, Kubernetes, Prometheus and systemd themselves say of them: tests/operating/check_files.py.
"""

from __future__ import annotations

import json
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvarena.engine.server.processes.engine import USER_ERROR
from kvarena.engine.server.shared.config import ADMIN_PATHS, OPEN_PATHS, ServerConfig
from kvarena.engine.server.shared.exposition import render
from kvarena.engine.server.shared.metrics import METRICS, Rows, create_page
from kvarena.experiments.serving.flags import parse_flags

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "examples" / "operating"
GRACE = 5.0  # seconds that a server has beyond those of its open requests
OF_SCRAPES = {"instance", "job", "le"}  # labels that Prometheus adds


def read(name: str) -> dict:
    return yaml.safe_load((FILES / name).read_text(encoding="utf-8"))


def expressions() -> list[tuple[str, str]]:
    made = []
    for path in sorted(FILES.glob("grafana/boards/*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            made += [(f"{path.name}: {panel['title']}", one["expr"]) for one in panel.get("targets", [])]
    for group in read("prometheus/alerts.yml")["groups"]:
        made += [(rule["alert"], rule["expr"]) for rule in group["rules"]]
    return made


@pytest.fixture(scope="module")
def shown() -> dict[str, set[str]]:
    """Every sample that /metrics shows, with its labels."""
    rows = Rows(create_page(1), 1)
    for metric in METRICS:  # a histogram with labels is shown once it has a value
        if metric.kind == "histogram":
            rows.engines[0].observe(metric.name, 1.0, *(values[0] for values in metric.labels.values()))
    text = render(rows, "m", [{}]).decode()
    names: dict[str, set[str]] = {"up": {"instance", "job"}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_there_is_something_to_look_at():
    assert len(expressions()) > 50
    ours = json.loads((FILES / "grafana/boards/kvarena.json").read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in ours["panels"]}) == len(ours["panels"]) >= 15
    assert all(panel["description"] for panel in ours["panels"])


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_boards_and_alerts_query_what_the_server_shows(shown, where, expression):
    selectors = re.findall(r"(?<![\w:])([a-z][a-z0-9_:]*)(?:\{([^}]*)\}|(?=\[| [=<>])|$)", expression)
    named = {name: labels for name, labels in selectors if name not in ("by", "le", "or")}
    assert named, where
    for name, labels in named.items():
        assert name in shown, f"{where} queries {name}"
        asked = set(re.findall(r"(\w+)\s*=~?\"", labels))
        assert asked <= shown[name] | OF_SCRAPES, f"{where} asks {name} for {asked}"
    known = OF_SCRAPES.union(*(shown[name] for name in named))
    for labels in re.findall(r"\bby ?\(([^)]*)\)", expression):
        assert set(re.findall(r"\w+", labels)) <= known, where


def serve_flags(words: list[str]) -> object:
    """The flags of a command that begins with `serve`."""
    assert words[0] == "serve"
    return parse_flags(words[1:])


def seconds(text: object) -> float:
    return float(str(text).removesuffix("s"))


def test_compose_starts_what_is_there():
    both, gpu = read("compose.yaml")["services"], read("compose.gpu.yaml")["services"]
    assert gpu.keys() <= both.keys()
    for name in ("kvarena", "kvarena-2"):
        flags = serve_flags(both[name]["command"])
        assert seconds(both[name]["stop_grace_period"]) >= flags.shutdown_timeout + GRACE
        assert flags.host == "0.0.0.0" and flags.port == 8000
        assert re.findall(r"8000(/\w+)", both[name]["healthcheck"]["test"][-1]) == ["/health"]
        assert ((FILES / both[name]["build"]["context"]) / "Dockerfile").resolve() == ROOT / "Dockerfile"
        assert gpu[name]["build"]["args"] == {"DEVICE": "cuda"}
        assert both[name]["command"][1] in both[name]["volumes"][0]
    assert set(both["router"]["command"]) >= {f"http://{name}:8000" for name in both["router"]["depends_on"]}
    mounts = [mount.split(":")[0] for one in both.values() for mount in one.get("volumes", []) if mount[0] == "."]
    assert mounts and all((FILES / mount).is_dir() for mount in mounts)
    pinned = (ROOT / "constraints.txt").read_text() + (FILES / "router" / "Dockerfile").read_text()
    assert len(set(re.findall(r"vllm-router==(\S+)", pinned))) == 1


def test_prometheus_and_grafana_find_each_other():
    prometheus, both = read("prometheus/prometheus.yml"), read("compose.yaml")["services"]
    assert all((FILES / "prometheus" / name).is_file() for name in prometheus["rule_files"])
    [job] = prometheus["scrape_configs"]
    [found] = job["dns_sd_configs"]
    assert set(found["names"]) <= both.keys() and found["port"] == 8000
    [source] = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in both
    ours = json.loads((FILES / "grafana/boards/kvarena.json").read_text(encoding="utf-8"))
    used = {target["datasource"]["uid"] for panel in ours["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}
    [provider] = read("grafana/provisioning/dashboards/boards.yml")["providers"]
    assert f"./grafana/boards:{provider['options']['path']}:ro" in both["grafana"]["volumes"]
    assert "/metrics" in OPEN_PATHS  # asked for without a key


def test_the_unit_drains_and_gives_a_wrong_setting_up():
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(FILES / "systemd" / "kvarena.service")
    service = unit["Service"]
    flags = serve_flags(shlex.split(service["ExecStart"])[1:])
    assert float(service["TimeoutStopSec"]) >= flags.shutdown_timeout + GRACE
    assert service["RestartPreventExitStatus"] == str(USER_ERROR)
    assert service["KillMode"] == "mixed"  # the parts' own SIGTERM would be none: the supervisor tells them
    assert service["ExecStartPost"].endswith(f"http://127.0.0.1:{flags.port}/ready")


def test_kubernetes_probes_ask_what_they_mean():
    documents = yaml.safe_load_all((FILES / "kubernetes" / "kvarena.yaml").read_text(encoding="utf-8"))
    kinds = {one["kind"]: one for one in documents}
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    [server] = pod["containers"]
    flags, config = serve_flags(server["args"]), ServerConfig()
    assert flags.port == server["ports"][0]["containerPort"]
    paths = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert set(paths.values()) <= OPEN_PATHS and not ADMIN_PATHS & set(paths.values())
    liveness = server["livenessProbe"]
    # Who gives up first is the server, which knows why.
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > config.step_timeout
    pause = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + flags.shutdown_timeout + GRACE
    assert pause > server["readinessProbe"]["periodSeconds"] * server["readinessProbe"]["failureThreshold"]
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = kinds[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector) == labels
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == server["ports"][0]["name"]
