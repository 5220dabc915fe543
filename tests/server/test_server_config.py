"""Server settings are refused in one line."""

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared import config


def test_a_missing_tracing_package_is_one_line(monkeypatch):
    # Asking for a module whose parent package is absent raises instead of answering None.
    monkeypatch.setattr(config, "find_spec", lambda name: __import__("importlib.util").util.find_spec("absent.child"))
    with pytest.raises(ConfigError, match="tracing extra"):
        config.ServerConfig.from_dict({"otlp_endpoint": "http://127.0.0.1:4318"})
