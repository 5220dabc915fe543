"""The labels of `vllm:cache_config_info`: those of vLLM's cache configuration, so that boards and rules read them."""

from __future__ import annotations

from collections.abc import Mapping

# Fields of vLLM's CacheConfig, with what stands for a thing that this engine does not have.
_ABSENT = {
    "user_specified_block_size": "True",
    "user_specified_mamba_block_size": "False",
    "kv_cache_layout": "None",
    "prefix_match_unit": "None",
    "is_attention_free": "False",
    "num_gpu_blocks_override": "None",
    "prefix_caching_hash_algo": "sha256",
    "attn_group_size": "None",
    "prefix_cache_retention_interval": "None",
    "kv_cache_dtype_skip_layers": "[]",
    "mamba_page_size_padded": "None",
    "skip_page_size_padded": "None",
    "mamba_block_size": "None",
    "mamba_cache_dtype": "auto",
    "mamba_ssm_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "enable_mamba_fine_grained_prefix_cache": "False",
    "replayssm_buffer_len": "None",
    "use_replayssm": "False",
    "use_kda_recoverssm": "False",
    "kv_sharing_fast_prefill": "False",
    "kv_cache_memory_bytes": "None",
    "kv_offloading_size": "None",
    "kv_offloading_backend": "None",
    "swap_space": "None",
    "cpu_offload_gb": "0",
    "calculate_kv_scales": "False",
    "cpu_kvcache_space_bytes": "None",
}


def cache_info(num_blocks: int, block_size: int, max_model_len: int, facts: Mapping[str, str]) -> dict[str, str]:
    """The labels and their values.

    Args:
        num_blocks: of the pool.
        block_size: tokens of a block.
        max_model_len: longest prompt + output, in tokens.
        facts: what the engine says of itself; goes before everything else.
    """
    num_tokens = num_blocks * block_size
    return {
        **_ABSENT,
        "block_size": str(block_size),
        "num_gpu_blocks": str(num_blocks),
        "effective_attention_block_size": str(block_size),
        "kv_cache_size_tokens": str(num_tokens),
        "kv_cache_max_concurrency": f"{num_tokens / max_model_len:.4g}",
        **facts,
    }
