"""Numbers of published papers that our figures are drawn beside."""

from __future__ import annotations

# PagedAttention (Kwon et al., SOSP'23), Figure 2: average share of KV memory in percent. "others" is the part that
# the paper draws together with external fragmentation: slots that no request could use. The split of vLLM's
# remaining 3.7 % is not given. Which of Pow2's and Oracle's middle segments is which follows the figure's stacking
# order: Oracle knows the length, so it has no internal fragmentation.
FIGURE_2 = {
    "Orca (Max)": {"token_states": 20.4, "reservation": 13.3, "internal": 57.3, "external": 8.9},
    "Orca (Pow2)": {"token_states": 26.8, "reservation": 17.9, "internal": 13.6, "external": 41.6},
    "Orca (Oracle)": {"token_states": 38.2, "reservation": 25.2, "internal": 0.0, "external": 36.6},
    "vLLM": {"token_states": 96.3},
}
FIGURE_2_SOURCE = "PagedAttention (Kwon et al., SOSP 2023), Figure 2"
