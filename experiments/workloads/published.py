"""Built-in length distributions of published workloads, for when the data themselves are not at hand.

Prompt and output lengths are drawn independently (in the Azure traces their rank correlation is -0.02 and 0.07).
Use `sharegpt_json` or `azure_trace` for the data themselves.
"""

from __future__ import annotations

from kvarena.experiments.workloads.parts.distributions import LognormalLength, QuantileLength
from kvarena.experiments.workloads.synthetic import PublishedWorkload

# Shares of the quantile tables below, finer in the tail.
_SHARES = (
    *(0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85),
    *(0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.9975, 0.999, 0.9995, 1),
)


class ShareGPTWorkload(PublishedWorkload):
    """Conversations as in the PagedAttention paper's ShareGPT trace: mean prompt 161.31, mean output 337.99 tokens.

    The means are those of Figure 11 of "Efficient Memory Management for Large Language Model Serving with
    PagedAttention" (SOSP 2023). The paper prints no further moment: the shape, a truncated lognormal with prompts of
    4 to 1024 tokens and outputs of 4 to 2044, is our assumption, and so are the spreads (sigma 1.3 and 0.9).

    Args:
        options: see PublishedWorkload.
    """

    name = "sharegpt"
    source = "means of PagedAttention (SOSP'23) Fig. 11, ShareGPT: 161.31 / 337.99; lognormal shape assumed"
    prompt_distribution = LognormalLength(161.31, 1.3, 4, 1024)
    output_distribution = LognormalLength(337.99, 0.9, 4, 2044)


class AlpacaWorkload(PublishedWorkload):
    """Instructions as in the PagedAttention paper's Alpaca trace: mean prompt 19.31, mean output 58.45 tokens.

    Source and caveat as for ShareGPTWorkload: the means are the paper's (Figure 11), the lognormal shape (sigma 0.6 and
    1.0, prompts of 4 to 256 tokens, outputs of 1 to 1024) is our assumption.

    Args:
        options: see PublishedWorkload.
    """

    name = "alpaca"
    source = "means of PagedAttention (SOSP'23) Fig. 11, Alpaca: 19.31 / 58.45; lognormal shape assumed"
    prompt_distribution = LognormalLength(19.31, 0.6, 4, 256)
    output_distribution = LognormalLength(58.45, 1.0, 1, 1024)


class AzureConvWorkload(PublishedWorkload):
    """Lengths of the Azure LLM inference trace 2023, conversation: mean prompt 1154.7, mean output 211.1 tokens.

    Quantiles measured on AzureLLMInferenceTrace_conv.csv (19,366 rows; github.com/Azure/AzurePublicDataset, CC-BY 4.0;
    "Splitwise", ISCA 2024), linear in between; the means come out within 1 %.

    Args:
        options: see PublishedWorkload.
    """

    name = "azure_conv"
    source = "quantiles of the Azure LLM inference trace 2023, conversation (CC-BY)"
    prompt_distribution = QuantileLength(
        _SHARES,
        (
            *(2, 29, 120, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315, 1876),
            *(2734, 4076, 4083, 4090, 4098, 4142, 4831, 5404, 6179, 6570, 14050),
        ),
    )
    output_distribution = QuantileLength(
        _SHARES,
        (
            *(7, 16, 28, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411),
            *(424, 433, 451, 509, 540, 601, 643, 719, 954, 1000, 1000),
        ),
    )


class AzureCodeWorkload(PublishedWorkload):
    """Lengths of the Azure LLM inference trace 2023, code: mean prompt 2047.8, mean output 27.9 tokens.

    Quantiles measured on AzureLLMInferenceTrace_code.csv (8,819 rows; github.com/Azure/AzurePublicDataset, CC-BY 4.0;
    "Splitwise", ISCA 2024), linear in between; the means come out within 2 %.

    Args:
        options: see PublishedWorkload.
    """

    name = "azure_code"
    source = "quantiles of the Azure LLM inference trace 2023, code (CC-BY)"
    prompt_distribution = QuantileLength(
        _SHARES,
        (
            *(3, 17, 44, 75, 147, 232, 386, 578, 770, 939, 1075, 1261, 1469, 1690, 1909, 2164, 2433, 2744, 3192, 3920),
            *(5188, 6194, 7303, 7435, 7436, 7436, 7436, 7436, 7437, 7437, 7437),
        ),
    )
    output_distribution = QuantileLength(
        _SHARES,
        (
            *(6, 6, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 29, 39),
            *(55, 72, 90, 128, 171, 251, 359, 599, 825, 885, 1899),
        ),
    )
