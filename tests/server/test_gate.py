"""Keys, open and protected paths, CORS and log fields, at the gate of one server and in the settings."""

from __future__ import annotations

import httpx
import pytest
from server_harness import RunningServer

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.shared.config import ServerConfig

ORIGIN = {"Origin": "http://page.example"}
AUTH = {"Authorization": "Bearer from-the-file"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("from-the-file\n\nanother\n")
    running = RunningServer(
        "--api-key-file", str(keys), "--protect", "/metrics", "/docs", "--allowed-origins", '["http://page.example"]',
        "--set", "server.max_body_mib=0.001", "--root-path", "/shown", "--enable-per-request-metrics",
        "--return-tokens-as-token-ids",
        "--max-requests-per-key", "2", "--least-priority-by-key", "0", "1", "--clients-by", "key",
        key=None, module="kvarena",
    )  # fmt: skip
    yield running
    assert running.stop() == 0


def test_25_protected_paths_ask_for_the_key(guarded):
    for path in ("/metrics", "/docs", "/openapi.json", "/v1/models"):
        assert httpx.get(guarded.url + path).status_code == 401, path
        assert httpx.get(guarded.url + path, headers=AUTH).status_code == 200, path
    for path in ("/health", "/version", "/"):
        assert httpx.get(guarded.url + path).status_code == 200, path
    assert "from-the-file" not in guarded.log


def test_an_answer_tells_how_long_its_parts_took(guarded):
    url, body = guarded.url + "/v1/completions", {"prompt": "The", "max_tokens": 4, "ignore_eos": True}
    made = httpx.post(url, json=body, headers=AUTH).json()["metrics"]
    assert min(made.values()) >= 0 and made["tokens_per_second"] > 0
    assert made["mean_itl_ms"] == pytest.approx(made["generation_time_ms"] / 3)
    assert "metrics" not in httpx.post(url, json=body | {"n": 2}, headers=AUTH).json()
    one = httpx.post(url, json=body | {"max_tokens": 1}, headers=AUTH).json()["metrics"]
    assert "mean_itl_ms" not in one and None not in one.values()  # what there is not is left out
    streamed = httpx.post(url, json=body | {"stream": True, "stream_options": {"include_usage": True}}, headers=AUTH)
    assert ['"metrics"' in line for line in streamed.text.splitlines() if line][-2:] == [True, False]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    assert set(httpx.post(guarded.url + "/v1/chat/completions", json=chat, headers=AUTH).json()["metrics"]) == set(made)


def test_tokens_are_named_by_their_ids_unless_a_request_says_otherwise(guarded):
    url, body = guarded.url + "/v1/completions", {"prompt": "The", "max_tokens": 2, "logprobs": 1}
    for more, are_ids in (({}, True), ({"return_tokens_as_token_ids": False}, False)):
        made = httpx.post(url, json=body | more, headers=AUTH).json()["choices"][0]["logprobs"]["tokens"]
        assert [name.startswith("token_id:") for name in made] == [are_ids] * 2
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "logprobs": True}
    made = httpx.post(guarded.url + "/v1/chat/completions", json=chat, headers=AUTH).json()
    assert made["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")


def test_a_key_has_no_more_than_it_may_have(guarded):
    url, body = guarded.url + "/v1/completions", {"prompt": "The", "max_tokens": 2}
    refused = httpx.post(url, json=body | {"n": 3}, headers=AUTH)
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert httpx.post(url, json=body | {"n": 2}, headers=AUTH).status_code == 200
    assert httpx.post(url, json=body, headers=AUTH).status_code == 200


def test_a_key_asks_for_no_more_urgency_than_it_may(guarded):
    url, body = guarded.url + "/v1/completions", {"prompt": "The", "max_tokens": 2}
    other = {"Authorization": "Bearer another"}
    refused = httpx.post(url, json=body | {"priority": 0}, headers=other)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "priority_not_allowed"
    assert httpx.post(url, json=body, headers=other).status_code == 200
    assert httpx.post(url, json=body | {"priority": 0}, headers=AUTH).status_code == 200


def test_a_proxy_s_path_may_be_left_on(guarded):
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(f"{guarded.url}/shown{path}").status_code == 401, path
        assert httpx.get(f"{guarded.url}/shown{path}", headers=AUTH).status_code == 200, path
    assert httpx.get(f"{guarded.url}/shown/health").status_code == 200
    assert httpx.get(f"{guarded.url}/other/health", headers=AUTH).status_code == 404
    models = httpx.get(f"{guarded.url}/v1/models", headers=AUTH).json()["data"]
    assert [model["id"] for model in models] == ["demo"]
    assert httpx.get(f"{guarded.url}/v1/models/models/demo", headers=AUTH).status_code == 200  # the path as given
    document = httpx.get(f"{guarded.url}/openapi.json", headers=AUTH).json()
    assert document["servers"] == [{"url": "/shown"}]


def test_refusals_of_the_gate_can_be_read_from_another_site(guarded):
    url = guarded.url + "/v1/completions"
    many = {f"x-{i}": "a" for i in range(300)}
    answers = {
        401: httpx.post(url, json={}, headers=ORIGIN),
        413: httpx.post(url, content=b"x" * 4000, headers=ORIGIN | AUTH | {"Content-Type": "application/json"}),
        431: httpx.post(url, json={}, headers=ORIGIN | AUTH | many),
        200: httpx.post(url, json={"prompt": "a", "max_tokens": 2, "stream": True}, headers=ORIGIN | AUTH),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "http://page.example"
        assert len(answer.headers.get_list("x-request-id")) == 1
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert httpx.options(url, headers=ORIGIN | asked).status_code == 200
    assert "access-control-allow-origin" not in httpx.post(url, json={}, headers={"Origin": "http://x"}).headers


def test_no_client_writes_the_log_s_fields(guarded):
    forged = {"X-Forwarded-For": "6.6.6.6 status=200", "X-Forwarded-Proto": "https", "Forwarded": "for=6.6.6.6"}
    assert httpx.get(guarded.url + "/version", headers=forged).status_code == 200
    assert "6.6.6.6" not in guarded.log


def test_keys_come_from_arguments_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("b\n c \n")
    config = ServerConfig(api_keys=("a",), api_key_file=str(file))
    assert config.with_keys({"KVARENA_API_KEY": "d", "VLLM_API_KEY": "e"}).api_keys == ("a", "b", "c", "d", "e")
    assert ServerConfig().with_keys({}).api_keys == ()


@pytest.mark.parametrize(
    ("text", "environment", "settings", "words"),
    [
        ("\n \n", {}, {}, "holds no key"),
        ("k\u00e9y", {}, {}, "printable ASCII"),
        (None, {"KVARENA_API_KEY": ""}, {}, "set and empty"),
        (None, {"VLLM_API_KEY": " "}, {}, "VLLM_API_KEY is set and empty"),
        (None, {}, {"protected_paths": ("/metrics",)}, "there is none"),
        (None, {}, {"protected_paths": ("/v1/models",), "api_keys": ("k",)}, "asks for a key anyhow"),
        (None, {}, {"api_key_file": "/nowhere"}, "a file that exists"),
    ],
)
def test_keys_that_cannot_be_are_one_line(tmp_path, text, environment, settings, words):
    if text is not None:
        (tmp_path / "keys").write_text(text)
        settings = settings | {"api_key_file": str(tmp_path / "keys")}
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**settings).with_keys(environment)
