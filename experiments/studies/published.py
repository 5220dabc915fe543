"""Numbers of published papers that studies are held against. Figure 2's are in reports/paper.py, which draws them."""

from __future__ import annotations

# PagedAttention (Kwon et al., SOSP'23), Figure 13: mean number of batched requests, OPT-13B on one A100.
FIGURE_13 = {
    ("sharegpt", 2.0): {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "vLLM": 30.42},
    ("alpaca", 30.0): {"Orca (Max)": 7.00, "Orca (Pow2)": 43.24, "Orca (Oracle)": 72.75, "vLLM": 132.44},
}
FIGURE_13_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), Figure 13: OPT-13B on one A100 with 40 GB"

# The same paper, section 6.2, ShareGPT: how much more load vLLM sustains at similar latency, as (least, most).
SUSTAINED_RATIOS = {"Orca (Oracle)": (1.7, 2.7), "Orca (Max)": (2.7, 8.0)}
FIGURE_12_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), Figure 12 and section 6.2: OPT-13B, ShareGPT"
