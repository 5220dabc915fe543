"""examples/operating against the schemas and parsers of those who read it; what none of these knows is in
tests/test_operating_files.py.

    python -m venv /tmp/files && /tmp/files/bin/pip install -r tests/operating/requirements.txt
    /tmp/files/bin/pip download --no-deps --dest /tmp/files docker-compose==1.29.2      # it holds Compose's own schema
    /tmp/files/bin/python tests/operating/check_files.py --compose /tmp/files/docker_compose-1.29.2-*.whl

Each line is a check; the exit code is 1 when one fails. systemd-analyze verifies the unit where it is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import yaml

FILES = Path(__file__).resolve().parents[2] / "examples" / "operating"
# Of the boards: Grafana puts values in their places.
VARIABLES = {"$__rate_interval": "5m", "$__interval": "15s", "$__range": "1h"}


def checks(compose_wheel: Path) -> Iterator[tuple[str, str]]:
    """What is checked, and what is wrong with it; empty: nothing."""
    with zipfile.ZipFile(compose_wheel) as wheel:
        schema = json.loads(wheel.read("compose/config/compose_spec.json"))
    for path in sorted(FILES.glob("compose*.yaml")):
        yield path.name, compose_error(path, schema)
    for path in sorted(FILES.glob("kubernetes/*.yaml")):
        for one in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield f"{path.name}: {one['kind']}", kubernetes_error(one)
    for path in sorted(FILES.glob("grafana/boards/*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.name}: {panel['title']}", promql_error(target["expr"])
    for group in yaml.safe_load((FILES / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alerts.yml: {rule['alert']}", promql_error(rule["expr"])
    if shutil.which("systemd-analyze"):
        yield "kvarena.service", unit_error(FILES / "systemd" / "kvarena.service")


def compose_error(path: Path, schema: dict[str, Any]) -> str:
    """What Compose's schema says."""
    errors = jsonschema.Draft7Validator(schema).iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))
    return "; ".join(f"{'.'.join(map(str, error.absolute_path))}: {error.message}"[:300] for error in errors)


def kubernetes_error(manifest: dict[str, Any]) -> str:
    """What Kubernetes' schema says, of the newest version that is known; unknown keys are errors."""
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)[:300]
    return ""


def promql_error(expression: str) -> str:
    """What Prometheus' parser says."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    try:
        promql_parser.parse(re.sub(r"\$(\w+)", r"\1", expression))
    except ValueError as error:
        return f"{error}: {expression}"
    return ""


def unit_error(path: Path) -> str:
    """What systemd says, but for the program that is installed elsewhere, and files of this machine."""
    said = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False).stderr
    own = [line for line in said.splitlines() if path.name in line and "is not executable" not in line]
    return "; ".join(own)


def main() -> int:
    """Print every check; 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compose", type=Path, required=True, help="the wheel of docker-compose 1.29.2")
    failed = 0
    for name, error in checks(parser.parse_args().compose):
        print(f"{'wrong' if error else 'right'}  {name}{f': {error}' if error else ''}")
        failed += bool(error)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
