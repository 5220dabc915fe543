"""The one-shot all-reduce, with ranks that are buffers of one process: each publishes, then each adds up."""

from __future__ import annotations

import pytest
import torch

from kvarena.engine.kernels.all_reduce import PeerMemory, all_reduce
from kvarena.engine.kernels.norm import rms_norm


def memories(
    num_ranks: int, num_rows: int, size: int, dtype: torch.dtype
) -> tuple[list[PeerMemory], list[torch.Tensor]]:
    data, flags = PeerMemory.num_bytes(num_ranks, num_rows, size, dtype)
    pages = [torch.zeros(data + flags, dtype=torch.uint8) for _ in range(num_ranks)]
    buffers = torch.tensor([page.data_ptr() for page in pages])
    found = [
        PeerMemory(buffers, buffers + data, torch.zeros(num_rows, dtype=torch.int32), rank, num_rows, size, dtype)
        for rank in range(num_ranks)
    ]
    return found, pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sum_residual_and_norm(num_ranks, dtype):
    """Calls with other numbers of rows between them: flags and buffers are each row's own."""
    torch.manual_seed(num_ranks)
    size = 48
    found, pages = memories(num_ranks, 5, size, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    weight = torch.rand(size).to(dtype)
    for call, num_rows in enumerate((3, 5, 1, 4, 5)):
        parts = [torch.randn(num_rows, size).to(dtype) for _ in range(num_ranks)]
        total = torch.stack(parts).float().sum(0)
        start = torch.randn(num_rows, size).to(dtype)
        residuals = [start.clone() for _ in range(num_ranks)]
        adds, norms = call % 3 != 0, call % 3 == 2
        options = [
            {"residual": residuals[rank] if adds else None, "weight": weight if norms else None, "epsilon": 1e-5}
            for rank in range(num_ranks)
        ]
        for rank in range(num_ranks):
            all_reduce(parts[rank], found[rank], parts=(True, False), **options[rank])
        outs = [all_reduce(parts[rank], found[rank], parts=(False, True), **options[rank]) for rank in range(num_ranks)]
        wanted = total.to(dtype) if not adds else (start.float() + total).to(dtype)
        for rank in range(num_ranks):
            if adds:
                torch.testing.assert_close(residuals[rank].float(), wanted.float(), **tolerance)
            last = rms_norm(residuals[rank], weight, 1e-5) if norms else wanted
            torch.testing.assert_close(outs[rank].float(), last.float(), **tolerance)
            assert torch.equal(outs[rank], outs[0])
    assert [memory.calls.tolist() for memory in found] == [[5, 4, 4, 3, 2]] * num_ranks
    assert all(len(page) for page in pages)


def test_who_has_not_published_is_waited_for():
    """Flags of an earlier call do not count: the last rank's part of the second call is missing."""
    found, pages = memories(2, 1, 16, torch.float32)
    x = torch.ones(1, 16)
    for memory in found:
        all_reduce(x, memory, parts=(True, False))
    for memory in found:
        all_reduce(x, memory, parts=(False, True))
    all_reduce(x, found[0], parts=(True, False))
    data = PeerMemory.num_bytes(2, 1, 16, torch.float32)[0]
    assert [page[data:].view(torch.int32).tolist() for page in pages] == [[0, 1], [2, 0]]


def test_calls_wrap_around():
    """65 sums a token reach the last int32 within a day: a flag is compared by its distance from the call."""
    found, pages = memories(2, 1, 16, torch.float32)
    data, last = PeerMemory.num_bytes(2, 1, 16, torch.float32)[0], 2**31 - 2
    for memory, page in zip(found, pages, strict=True):
        memory.calls.fill_(last)
        page[data:].view(torch.int32).fill_(last)
    for call in range(4):
        parts = [torch.full((1, 16), float(call + rank)) for rank in range(2)]
        for part, memory in zip(parts, found, strict=True):
            all_reduce(part, memory, parts=(True, False))
        if call == 1:  # the second rank's part is there, and a look at the first one's flag finds it
            assert pages[0][data:].view(torch.int32)[1] < 0
        for part, memory in zip(parts, found, strict=True):
            assert torch.equal(all_reduce(part, memory, polls=1, parts=(False, True)), sum(parts))
    all_reduce(parts[0], found[0], parts=(True, False))
    assert all_reduce(parts[0], found[0], polls=2, parts=(False, True)).isnan().all()


def test_a_rank_that_does_not_come_is_given_up():
    """No hang, and no wrong sum: NaN, of which no token is picked."""
    found, _pages = memories(2, 1, 16, torch.float32)
    residual, weight = torch.ones(1, 16), torch.ones(16)
    normed = all_reduce(torch.ones(1, 16), found[0], residual=residual, weight=weight, epsilon=1e-5, polls=3)
    assert normed.isnan().all() and residual.isnan().all()
