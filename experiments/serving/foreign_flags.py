"""Flags of `vllm serve` that change nothing here, and those that are refused: each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """Flags that have one reason.

    Attributes:
        names: each with its short forms behind it.
        because: why; goes on from "no effect, because" or "refused, because".
        takes: `switch` (with a --no- form), `value` or `values`.
        only: values that ask for what there is anyway: these have no effect, any other is refused; empty: any has none.
        refused: whatever is given.
    """

    names: tuple[tuple[str, ...], ...]
    because: str
    takes: str = "value"
    only: tuple[str, ...] = ()
    refused: bool = False


def _named(names: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name.split("/")) for name in names.split())


def _nothing(because: str, names: str, takes: str = "value") -> Foreign:
    return Foreign(_named(names), because, takes)


def _only(because: str, names: str, *values: str) -> Foreign:
    return Foreign(_named(names), because, only=values)


def _refused(because: str, names: str, takes: str = "value") -> Foreign:
    return Foreign(_named(names), because, takes, refused=True)


NO_EFFECT = (
    _nothing("calls are read wherever a request has tools", "--enable-auto-tool-choice", "switch"),
    _nothing("tools are left out of the prompt then", "--exclude-tools-when-tool-choice-none", "switch"),
    _nothing("thoughts are read where the model's templates have them", "--enable-reasoning", "switch"),
    _nothing("no statistics are logged; /metrics has them", "--disable-log-stats --aggregate-engine-logging", "switch"),
    _nothing(
        "a line for each request is logged, without its text; --disable-access-log leaves it out",
        "--enable-log-requests --enable-log-deltas", "switch",
    ),
    _nothing("no prompt is logged", "--max-log-len"),
    _nothing(
        "it is always there",
        "--enable-prompt-tokens-details --enable-request-id-headers --enable-server-load-tracking "
        "--enable-tokenizer-info-endpoint", "switch"),
    _nothing("pages and their scripts come from this server", "--enable-offline-docs", "switch"),
    _nothing("fronts are processes of their own", "--disable-frontend-multiprocessing", "switch"),
    _nothing(
        "kernels and their launches are chosen by what was measured, and answers are the same",
        "--attention-backend --attention-config/-ac --moe-backend --linear-backend --compilation-config/-O/-cc "
        "--optimization-level --performance-mode --kernel-config --max-seq-len-to-capture --all2all-backend "
        "--gdn-prefill-backend --mm-encoder-attn-backend",
    ),
    _nothing(
        "graphs are captured for the sizes that the steps have", "--cuda-graph-sizes --cudagraph-capture-sizes "
        "--max-cudagraph-capture-size", "values",
    ),
    _nothing(
        "kernels are chosen by what was measured, and answers are the same",
        "--disable-cascade-attn --enable-dbo --disable-async-output-proc --use-v2-block-manager "
        "--disable-hybrid-kv-cache-manager --multi-step-stream-outputs --kv-sharing-fast-prefill", "switch",
    ),
    _nothing(
        "ways to sum over ranks are timed at the start; --set parallel.all_reduce=nccl insists",
        "--disable-custom-all-reduce --disable-nccl-for-dp-synchronization", "switch",
    ),
    _nothing(
        "experts are shared out as --tensor-parallel-size says, and answers are the same",
        "--enable-expert-parallel/-ep --enable-eplb --enable-ep-weight-filter", "switch",
    ),
    _nothing("there is one way to share experts out", "--expert-placement-strategy --eplb-config"),
    _nothing(
        "chunks of prompts are sized by what steps take",
        "--max-num-partial-prefills --max-long-partial-prefills --long-prefill-token-threshold --num-scheduler-steps",
    ),
    _nothing("the host plans ahead by --async-scheduling", "--num-lookahead-slots --max-parallel-loading-workers"),
    _nothing("blocks are known by their tokens", "--prefix-caching-hash-algo"),
    _nothing("keys and values are kept in --dtype, without scales", "--calculate-kv-scales", "switch"),
    _nothing("files are mapped and read once, without a bar", "--use-tqdm-on-load", "switch"),
    _nothing("files are mapped and read once", "--safetensors-load-strategy --ignore-patterns --pt-load-map-location"),
    _nothing("what is read is in the docs, and nothing else is", "--allow-deprecated-quantization", "switch"),
    _nothing(
        "tiles are kept by --set engine.image_cache_mib=MIB",
        "--mm-processor-cache-gb --mm-processor-cache-type --mm-shm-cache-max-object-size-mb",
    ),
    _nothing(
        "tiles are kept by --set engine.image_cache_mib=MIB",
        "--disable-mm-preprocessor-cache --skip-mm-profiling", "switch",
    ),
    _nothing("every rank has the whole vision tower", "--mm-encoder-tp-mode"),
    _nothing("metrics have no hidden ones", "--show-hidden-metrics-for-version"),
    _nothing("ranks of one machine find each other", "--master-port --distributed-timeout-seconds"),
    _only("keys and values are kept in --dtype", "--kv-cache-dtype", "auto"),
    _only("texts are generated, and nothing else is", "--task", "auto", "generate"),
    _only("texts are generated, and nothing else is", "--runner", "auto", "generate"),
    _only("texts are generated, and nothing else is", "--convert", "auto", "none"),
    _only("the config is the checkpoint's; write it into config.json", "--hf-overrides", "{}"),
    _only("the tokenizer is read as transformers does", "--tokenizer-mode", "auto", "hf", "slow"),
    _only("config.json is read", "--config-format", "auto", "hf"),
    _only("models are transformers' classes", "--model-impl", "auto", "transformers", "vllm"),
    _only("the template says whether it reads parts", "--chat-template-content-format", "auto"),
    _only("who answers is the assistant", "--response-role", "assistant"),
    _only(
        "structured output is llguidance's", "--guided-decoding-backend",
        "auto", "guidance", "llguidance", "xgrammar", "outlines", "lm-format-enforcer",
    ),
    _only(
        "structured output is llguidance's", "--structured-outputs-config",
        "{}", '{"backend":"auto"}', '{"backend":"guidance"}', '{"backend":"xgrammar"}', '{"backend":"outlines"}',
        "auto", "guidance", "xgrammar", "outlines",  # of --structured-outputs-config.backend
    ),
    _only(
        "a thought's tags are those of --reasoning-parser", "--reasoning-config",
        "{}", '{"reasoning_start_str":"<think>","reasoning_end_str":"</think>"}',
    ),
    _only("every token is an event as it comes", "--stream-interval", "1"),
    _only("a request is taken in as soon as there is room", "--scheduler-delay-factor", "0"),
    _only("preempted requests are recomputed; --swap-space keeps their KV", "--preemption-mode", "recompute"),
    _only("host memory is the engine's own", "--kv-offloading-backend", "native"),
    _only("weights stay on their device", "--cpu-offload-gb", "0"),
    _only("sequences are not split over devices", "--decode-context-parallel-size/-dcp", "1"),
    _only("sequences are not split over devices", "--prefill-context-parallel-size/-pcp", "1"),
    _only("the ranks are on this machine; Ray's may be elsewhere", "--nnodes/-n", "1"),
    _only("the ranks are on this machine; Ray's may be elsewhere", "--node-rank/-r", "0"),
    _only("engines are processes of this machine", "--data-parallel-backend/-dpb", "mp"),
    _only("engines begin with the first", "--data-parallel-rank/-dpn", "0"),
    _only("engines begin with the first", "--data-parallel-start-rank/-dpr", "0"),
    _only("the engine's own processes compute", "--worker-cls", "auto"),
    _only("the paths say which methods they know", "--allowed-methods", '["*"]'),
    _only("any header may be sent", "--allowed-headers", '["*"]'),
    _only("a client's certificate is asked for by --ssl-ca-certs", "--ssl-cert-reqs", "0"),
)  # fmt: skip

REFUSED = (
    _refused(
        "there is no speculative decoding",
        "--speculative-config/-sc --speculative-model --num-speculative-tokens --ngram-prompt-lookup-max "
        "--ngram-prompt-lookup-min --speculative-draft-tensor-parallel-size --spec-method --spec-model --spec-tokens",
    ),
    _refused("there are no adapters", "--enable-lora --enable-lora-bias --fully-sharded-loras", "switch"),
    _refused("there are no adapters", "--lora-modules", "values"),
    _refused(
        "there are no adapters", "--max-loras --max-lora-rank --max-cpu-loras --lora-dtype --lora-extra-vocab-size "
        "--long-lora-scaling-factors --default-mm-loras --qlora-adapter-name-or-path",
    ),
    _refused("there are no adapters", "--enable-prompt-adapter", "switch"),
    _refused(
        "the config is the checkpoint's; write it into config.json", "--hf-config-path --rope-scaling --rope-theta"
    ),
    _refused("the window is the model's", "--disable-sliding-window", "switch"),
    _refused("code comes with the model directory's revision", "--code-revision --tokenizer-revision"),
    _refused("the hub's library reads its login itself: set HF_TOKEN", "--hf-token"),
    _refused("weights are read from files of a folder", "--model-loader-extra-config --model-weights"),
    _refused("texts go in and out", "--skip-tokenizer-init --enable-prompt-embeds --tokens-only", "switch"),
    _refused("embeddings are not what this is for", "--override-pooler-config --pooler-config"),
    _refused("requests say it, or generation_config.json", "--override-generation-config"),
    _refused("requests say it: chat_template_kwargs", "--default-chat-template-kwargs"),
    _refused("a request's template would run here", "--trust-request-chat-template", "switch"),
    _refused("code of others is not loaded", "--tool-parser-plugin --reasoning-parser-plugin --middleware"),
    _refused("code of others is not loaded", "--logits-processors", "values"),
    _refused("code of others is not loaded", "--logits-processor-pattern --worker-extension-cls --io-processor-plugin"),
    _refused("tools are the client's to run", "--tool-server"),
    _refused("answers are not logged", "--enable-log-outputs --log-error-stack", "switch"),
    _refused("logs go to standard output, a line each", "--log-config-file --disable-access-log-for-endpoints"),
    _refused("--protect /docs asks for a key there", "--disable-fastapi-docs", "switch"),
    _refused("it listens on a port", "--uds"),
    _refused("cookies are not read", "--allow-credentials", "switch"),
    _refused("a certificate is read at the start", "--enable-ssl-refresh", "switch"),
    _refused("the ciphers are Python's", "--ssl-ciphers"),
    _refused("64 KiB and 256 headers are taken", "--h11-max-incomplete-event-size --h11-max-header-count"),
    _refused("a server does not sleep", "--enable-sleep-mode", "switch"),
    _refused("fronts and engines start together", "--headless", "switch"),
    _refused(
        "all engines are on this machine; give --data-parallel-size",
        "--data-parallel-size-local/-dpl --data-parallel-address/-dpa --data-parallel-rpc-port/-dpp --master-addr",
    ),
    _refused(
        "one port has all engines", "--data-parallel-hybrid-lb/-dph --data-parallel-external-lb/-dpe", "switch",
    ),
    _refused(
        "keys and values stay on their device, or in host memory: --kv-offloading-size, --swap-space",
        "--kv-transfer-config --ec-transfer-config",
    ),
    _refused("images are taken in as their model's files say", "--mm-processor-kwargs --media-io-kwargs"),
    _refused("images stand where the template puts them", "--interleave-mm-strings", "switch"),
    _refused("--limit-mm-per-prompt image=0 takes none", "--language-model-only", "switch"),
    _refused(
        "there is no profiler in a server; `kvarena benchmark engine` profiles",
        "--profiler-config --collect-detailed-traces",
    ),
    _refused(
        "there is no profiler in a server; `kvarena benchmark engine` profiles",
        "--ray-workers-use-nsight --enable-layerwise-nvtx-tracing --enable-mfu-metrics", "switch",
    ),
    _refused("it is for other platforms", "--override-neuron-config --additional-config"),
)  # fmt: skip

FOREIGN = NO_EFFECT + REFUSED
