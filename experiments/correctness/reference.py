"""transformers' own generation on a list of requests: the reference for tokens, and the baseline for speed.

Three ways: `generate` in left-padded static batches, `generate` one by one (the reference for tokens: no padding,
no batch), and `generate_batch`, its continuous batching over a paged cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch

from kvarena.engine.checkpoints.directory import read_config, resolve_directory
from kvarena.engine.checkpoints.images import has_class, reads_images
from kvarena.engine.contract import cdiv
from kvarena.engine.errors import EngineError, ModelError
from kvarena.engine.request import Request

PAD = 0


def load_reference(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint at `path` as an unmodified transformers model with its own attention, in evaluation mode.

    Raises:
        ModelError: transformers has no class for its format.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_config(resolve_directory(path))
    if reads_images(config) and not has_class(config):
        raise ModelError(
            f"{path} is an InternVL checkpoint in its makers' format, for which transformers has no class to judge by; "
            "give the same model in transformers' format"
        )
    kind: Any = AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=dtype, local_files_only=True, attn_implementation="sdpa").eval()


def greedy_reference(
    directory: Path | str, prompts: Sequence[Sequence[int]], num_tokens: int, dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """`generate` of one prompt at a time with transformers' eager attention; every output has `num_tokens` tokens."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        done = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
        outputs.append(done[0, len(prompt) :].tolist())
    return outputs


def generate_static(module: Any, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Greedy tokens by `generate` in left-padded batches; a batch runs until its longest output is done.

    Returns:
        For each request its `max_tokens` tokens; what a shorter request computes beyond that is thrown away.
    """
    outputs: list[list[int]] = []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        width = max(req.num_prompt_tokens for req in batch)
        ids = torch.full((len(batch), width), PAD)
        mask = torch.zeros_like(ids)
        for row, req in enumerate(batch):
            ids[row, width - req.num_prompt_tokens :] = torch.tensor(req.prompt_token_ids)
            mask[row, width - req.num_prompt_tokens :] = 1
        longest = max(req.sampling.max_tokens for req in batch)
        with torch.inference_mode():
            done = module.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=PAD,
                eos_token_id=None,
            )
        outputs += [row[width : width + req.sampling.max_tokens].tolist() for row, req in zip(done, batch, strict=True)]
    return outputs


def generate_continuous(
    module: Any, requests: Sequence[Request], num_slots: int, max_batch_tokens: int
) -> list[list[int]]:
    """Greedy tokens by transformers' continuous batching, the engine under `generate_batch`.

    `generate_batch` gives every request the same output length, so its manager is driven directly, with each
    request's own: the fairest form of it.

    Args:
        module: a reference model; its attention is switched to the paged one.
        requests: prompts and `max_tokens`.
        num_slots: tokens of its KV cache.
        max_batch_tokens: tokens of one step.

    Raises:
        EngineError: it ended without answering every request.
    """
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    block_size = 16
    config = ContinuousBatchingConfig(
        num_blocks=cdiv(num_slots, block_size), block_size=block_size, max_batch_tokens=max_batch_tokens
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=PAD, max_new_tokens=1)
    outputs: dict[str, list[int]] = {}
    with (
        torch.no_grad(),
        module.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, block=True, timeout=5
        ) as manager,
    ):
        for req in requests:
            manager.add_request(req.prompt_token_ids, request_id=req.request_id, max_new_tokens=req.sampling.max_tokens)
        while len(outputs) < len(requests):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise EngineError("transformers' continuous batching ended before all requests were answered")
            elif result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
    return [outputs[req.request_id] for req in requests]


def beam_texts(module: Any, req: Request, sampling: Mapping[str, Any]) -> list[list[int]]:
    """`generate` with `num_beams`, of one prompt: the output tokens of all texts, best first.

    Args:
        module: from `load_reference`.
        req: its prompt and `max_tokens`.
        sampling: section `sampling` of the run's config.
    """
    ends = module.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    stops = [] if sampling["ignore_eos"] else ends
    config = copy(module.generation_config)
    config.eos_token_id, config.pad_token_id = stops or None, PAD
    config.max_new_tokens, config.do_sample = req.sampling.max_tokens, False
    config.num_beams = config.num_return_sequences = sampling["beams"]
    config.length_penalty, config.early_stopping = sampling["length_penalty"], sampling["early_stopping"]
    ids = torch.tensor([req.prompt_token_ids])
    done = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    texts = []
    for row in done[:, ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        texts.append(row[:end])
    return texts
