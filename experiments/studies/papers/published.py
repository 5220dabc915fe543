"""Numbers of published papers that studies are held against. Figure 2's are where it is drawn (reports/drawing)."""

from __future__ import annotations

# PagedAttention (Kwon et al., SOSP'23), Figure 13: mean number of batched requests, OPT-13B on one A100.
FIGURE_13 = {
    ("sharegpt", 2.0): {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "vLLM": 30.42},
    ("alpaca", 30.0): {"Orca (Max)": 7.00, "Orca (Pow2)": 43.24, "Orca (Oracle)": 72.75, "vLLM": 132.44},
}
# The same paper, Figure 11: mean output tokens a request.
MEAN_OUTPUTS = {"sharegpt": 337.99, "alpaca": 58.45}
FIGURE_13_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), Figure 13: OPT-13B on one A100 with 40 GB"

# The same paper, section 6.2, ShareGPT: how much more load vLLM sustains at similar latency, as (least, most).
# FasterTransformer's is "up to 22x": no least.
SUSTAINED_RATIOS: dict[str, tuple[float | None, float]] = {
    "Orca (Oracle)": (1.7, 2.7), "Orca (Max)": (2.7, 8.0), "FasterTransformer": (None, 22.0),
}  # fmt: skip
# The same figure (a), OPT-13B: requests per second at which the curves turn up, read by eye.
FIGURE_12_KNEES = {
    "Orca (Max)": 0.5, "Orca (Pow2)": 0.75, "Orca (Oracle)": 1.1, "vLLM": 1.9, "FasterTransformer": 0.3,
}  # fmt: skip
FIGURE_12_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), Figure 12 and section 6.2: OPT-13B, ShareGPT"

# The same paper, sections 7.1 and 7.2 and Figure 18: (a) percent by which its attention kernel is slower than
# FasterTransformer's, as (least, most); (b) block sizes (least, most) with the best end-to-end latency.
TABLE_COST = (20.0, 26.0)
GOOD_BLOCK_SIZES = {"sharegpt": (16, 128), "alpaca": (16, 32)}
FIGURE_18_AXIS = 17.5  # seconds per token: where the axis of (b) ends
FIGURE_18_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), sections 7.1 and 7.2, Figure 18"

# The same paper, section 7.3 and Figure 19: recomputation costs the same for all block sizes and never takes more than
# so many times a swap; for small blocks recomputation costs less than swapping, for large ones more; end to end the two
# are comparable for these block sizes (least, most).
RECOMPUTE_OVER_SWAP = 1.2
COMPARABLE_BLOCK_SIZES = (16, 64)
FIGURE_19_AXIS = 2.5  # seconds per token: where the axis of (b) ends
FIGURE_19_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), section 7.3 and Figure 19"

# The same paper, section 6.3 and Figure 15: share of memory saved in percent, by number of parallel samples or beam
# width. ShareGPT's are given as ranges over 2 to 6: read as the values at the two ends.
SAMPLING_SAVED = {"alpaca": {2: 6.09, 4: 8.53, 6: 9.79}, "sharegpt": {2: 16.2, 6: 30.5}}
BEAM_SAVED = {"alpaca": {2: 37.56, 4: 53.13, 6: 55.16}, "sharegpt": {2: 44.3, 6: 66.3}}
FIGURE_15_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), section 6.3 and Figure 15: OPT-13B, Alpaca and ShareGPT"

# Sarathi-Serve (Agrawal et al., OSDI'24), abstract: capacity against vLLM, Mistral-7B on one A100. (Its "up to" is of
# Yi-34B on two, 3.7 times.)
SARATHI_CAPACITY = 2.6
SARATHI_SOURCE = "Sarathi-Serve (Agrawal et al., OSDI 2024): 2.6 times vLLM's capacity, Mistral-7B on one A100"

# Mooncake's traces (FAST'25): percent of blocks that a cache without end finds, counted from the files' hash ids by an
# independent script; the paper itself does not state them for these files.
ENDLESS_HITS = {"mooncake_conversation_trace.jsonl": 36.6, "mooncake_synthetic_trace.jsonl": 64.0}
ENDLESS_SOURCE = "Mooncake traces (Qin et al., FAST 2025); RadixAttention (Zheng et al., SGLang)"

VTC_SOURCE = "Fairness in Serving Large Language Models (Sheng et al., OSDI 2024), theorem 4.4"

# vAttention (Prabhu et al., ASPLOS'25), abstract: throughput over paged kernels, "up to".
VATTENTION_SPEEDUP = 1.23
VATTENTION_SOURCE = "vAttention (Prabhu et al., ASPLOS 2025): pages of 64 KiB to 2 MiB"
