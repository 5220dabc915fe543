"""Messages of `kvarena serve` in the words of its command line: flags where the config has keys."""

from __future__ import annotations

import re

_SECTIONS = (
    "engine", "parallel", "kv_cache", "allocator", "scheduler", "server", "router", "runner", "sampling", "driver",
    "workload",
)  # fmt: skip
_MODEL = "path|shape|name|load_format|trust_remote_code|quantization"  # not its files: model.safetensors
# Keys whose flag is called otherwise than its attribute of the parsed command line.
FLAGS = {
    "model.path": "MODEL",
    "engine.overlap": "--async-scheduling",
    "kv_cache.num_blocks": "--num-gpu-blocks-override",
    "kv_cache.memory_gib": "--kv-cache-memory-gib",
    "kv_cache.host_gib": "--kv-offloading-size",
    "allocator.swap_gib": "--swap-space",
    "server.api_keys": "--api-key",
    "server.served_model_names": "--served-model-name",
    "server.num_fronts": "--api-server-count",
    "server.protected_paths": "--protect",
    "server.admin_keys": "--admin-key",
    "server.enable_admin": "--enable-admin",
    "server.cors_origins": "--allowed-origins",
    "server.strict_tools": "--strict-tools",
    "server.force_include_usage": "--enable-force-include-usage",
    "server.per_request_metrics": "--enable-per-request-metrics",
    "server.otlp_endpoint": "--otlp-traces-endpoint",
    "server.log_requests": "--disable-access-log",
    "server.max_images": "--limit-mm-per-prompt",
    "server.kv_events": "--kv-events-config",
    "parallel.executor": "--distributed-executor-backend",
    "router.num_replicas": "--data-parallel-size",
}
SAME_NAME = (
    "model.trust_remote_code", "model.load_format", "model.quantization", "engine.dtype", "engine.device",
    "engine.gpu_memory_utilization",
    "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size",
    "engine.seed", "engine.max_model_len", "scheduler.max_num_seqs", "scheduler.max_num_batched_tokens",
    "allocator.block_size", "server.host", "server.port", "server.max_num_queued_requests", "server.shutdown_timeout",
    "server.api_key_file", "server.allowed_media_domains", "server.allowed_local_media_path", "server.chat_template",
    "server.tool_call_parser", "server.reasoning_parser", "server.response_store_size", "server.generation_config",
    "server.max_logprobs", "server.root_path", "server.return_tokens_as_token_ids",
    "server.record", "server.record_mib", "server.record_minutes", "server.record_content",
    "server.max_requests_per_key", "server.tokens_per_minute_per_key", "server.least_priority_by_key",
    "server.clients_by",
    "server.ssl_certfile", "server.ssl_keyfile", "server.ssl_keyfile_password", "server.ssl_ca_certs",
)  # fmt: skip
FLAGS |= {key: "--" + key.partition(".")[2].replace("_", "-") for key in SAME_NAME}
# What a setting says where its flag takes no value.
SWITCHES = {
    "model.trust_remote_code=true": "--trust-remote-code",
    "engine.overlap=true": "--async-scheduling",
    "engine.overlap=false": "--no-async-scheduling",
    "runner.graphs=false": "--enforce-eager",
    "server.log_requests=false": "--disable-access-log",
    "server.force_include_usage=true": "--enable-force-include-usage",
    "server.force_include_usage=false": "--no-enable-force-include-usage",
    "server.return_tokens_as_token_ids=true": "--return-tokens-as-token-ids",
    "server.return_tokens_as_token_ids=false": "--no-return-tokens-as-token-ids",
    "server.per_request_metrics=true": "--enable-per-request-metrics",
    "server.per_request_metrics=false": "--no-enable-per-request-metrics",
    "server.enable_admin=true": "--enable-admin",
    "server.enable_admin=false": "--no-enable-admin",
    "server.strict_tools=true": "--strict-tools",
    "server.strict_tools=false": "--no-strict-tools",
}
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^\s,;:)\]]+"
# A key in quotes, and one behind --set, is one that a person gave with --set.
_KEY = re.compile(
    rf"(?<!--set )(?<![\w.'/])"
    rf"((?:{'|'.join(_SECTIONS)})\.(?!py\b|json\b|log\b)\w+(?:\.\w+)*|model\.(?:{_MODEL})\b)(?:=({_VALUE}))?"
)
_GROUP = re.compile(r"(?<![\w.'/-])(allocator|scheduler|router)=(\w+)")


def in_flags(text: str) -> str:
    """`text`, with flags in place of config keys; a key without a flag becomes `--set key=value`."""
    return _GROUP.sub(r"--\1 \2", _KEY.sub(_spoken, text))


def _spoken(found: re.Match[str]) -> str:
    key, value = found.groups()
    if value is None:
        return FLAGS.get(key, f"--set {key}")
    plain = value.rstrip(".")
    end = value[len(plain) :]
    switch = SWITCHES.get(f"{key}={plain.lower()}")
    if switch is not None:
        return switch + end
    # A switch takes no value: another one came by --set.
    if key not in FLAGS or any(one.startswith(f"{key}=") for one in SWITCHES):
        return f"--set {key}={plain}{end}"
    return f"{FLAGS[key]} {plain}{end}"
