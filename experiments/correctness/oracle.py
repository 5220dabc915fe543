"""A runner without a model: tokens depend on every slot that attention would read.

The KV of position p is a hash of the request's tokens up to p, chained through the pool: writing position p reads
position p - 1 back through the block table. The next token is derived from all hashes within the attention window,
read back the same way. So a fault of an allocator or a scheduler (a block handed out twice, a stale cache hit, a lost
swap, a wrong start) changes what is read, and the runner says where. What decodes would read once for several of
them is judged too (`oracle_reads.py`). Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvarena.engine.contract import NULL_BLOCK, BlockCopy, CopyKind, KVAllocator, StepPlan
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.errors import EngineError
from kvarena.engine.model_runner import ReadyTokens, StepResult, TokenLogprobs
from kvarena.engine.request import Request, expand
from kvarena.experiments.correctness.oracle_link import SlowLink
from kvarena.experiments.correctness.oracle_reads import ReadJudge


class OracleFault(EngineError):
    """Attention would have read or written a wrong slot."""


class _Entry(NamedTuple):
    """One request of a step, as launched."""

    req: Request
    start: int
    end: int
    table: Sequence[int]


def mix(state: int, token: int) -> int:
    """The hash of a prefix that is one token longer."""
    return hash((state, token))


def next_token(req: Request, context: list[int] | list[int | None], vocab_size: int) -> int:
    """The token after the positions whose hashes are `context`."""
    return hash((req.sampling.seed or 0, tuple(context))) % vocab_size


def best_tokens(req: Request, context: list[int] | list[int | None], vocab_size: int) -> TokenLogprobs:
    """What a beam draws from after the positions whose hashes are `context`."""
    mixed = hash(tuple(context))
    scores = sorted(((-(hash((mixed, token)) % 100_003) / 30_000, token) for token in range(vocab_size)), reverse=True)
    top = tuple((token, score) for score, token in scores[: req.sampling.logprobs])
    return TokenLogprobs(top[0][0], top[0][1], 1, top)


def expected_beams(req: Request, vocab_size: int = 97, window: int | None = None) -> list[list[int]]:
    """The texts that a beam search gives under every correct strategy, best first, computed without a pool."""
    beams = expand(req)
    search = beams[0].search
    assert search is not None
    while not search.is_over:
        for beam in beams:
            prefix: list[int] = []
            for token in beam.identities(0, beam.num_tokens):
                prefix.append(mix(prefix[-1] if prefix else 0, token))
            search.draw(beam.beam, best_tokens(beam, prefix[-(window or len(prefix)) :], vocab_size))
        before = [list(beam.output_token_ids) for beam in beams]
        for beam, move in zip(beams, search.move(before), strict=False):
            beam.output_token_ids[:] = [*before[move.source], move.token]
    return [text.tokens for text in search.winners]


def expected_output(req: Request, vocab_size: int = 97, window: int | None = None) -> list[int]:
    """The tokens that an `OracleRunner` gives `req` under every correct strategy, computed without a pool."""
    probe = Request(
        req.request_id, req.prompt_token_ids, req.sampling, eos_token_ids=req.eos_token_ids, images=req.images
    )
    prefix: list[int] = []
    while not probe.output_token_ids or probe.stop_reason() is None:
        for token in probe.identities(len(prefix), probe.num_tokens):
            prefix.append(mix(prefix[-1] if prefix else 0, token))
        probe.output_token_ids.append(next_token(probe, prefix[-(window or len(prefix)) :], vocab_size))
    return probe.output_token_ids


class OracleRunner:
    """Executes plans on hashes and checks each access.

    Tokens reach the host only through `result()`. A step that computes a token which the host has not seen takes it
    from the runner's own memory, as a GPU does under overlap.

    Args:
        vocab_size: tokens are in [0, vocab_size).
        window: positions that a query attends to, its own included, at least 2; None attends to all before it.

    Attributes:
        link: on which transfers take their time; None: they are made at once.
        num_copies: blocks copied so far, by kind.
        num_moved: of these, blocks of transfers.
        judge: of shared reads; None before the first step.
    """

    def __init__(self, vocab_size: int = 97, window: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.window = window
        self.link: SlowLink | None = None
        self.num_copies = dict.fromkeys(CopyKind, 0)
        self.num_moved = dict.fromkeys(CopyKind, 0)
        self.judge: ReadJudge | None = None
        self._device: dict[int, int] = {}  # slot -> hash
        self._host: dict[tuple[int, int], int | None] = {}  # (host block, offset) -> hash
        self._prefix: dict[str, list[int]] = {}  # request -> the true hash at each position
        self._last: dict[str, tuple[int, int]] = {}  # request -> (position, token) sampled last

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> ReadyTokens:
        """Run one step at once.

        Raises:
            OracleFault: an access that breaks the contract, or reads anything but the request's own prefix.
            ReadFault: a shared read would be of another's block.
        """
        self.release([req.request_id for req in plan.forked])
        self._land(allocator.block_size)
        self._copy(plan.copies, allocator.block_size)
        if self.link is None:
            arrive_in_order(plan.copies)
        else:
            self.link.launch(plan.copies)
            self._land(allocator.block_size)
        entries = [
            _Entry(req, start, start + num_new, allocator.block_table(req)) for req, start, num_new in plan.scheduled
        ]
        written: set[int] = set()
        for entry in entries:
            self._check_table(entry, allocator)
            self._write(entry, allocator.block_size, written)
        if self.judge is None:
            self.judge = ReadJudge(allocator.block_size)
        decodes = [entry for entry in entries if entry.end - entry.start == 1]
        self.judge.check(
            [entry.req.request_id for entry in decodes],
            [entry.table for entry in decodes],
            [entry.end for entry in decodes],
        )
        token_ids: list[int | None] = []
        logprobs: list[TokenLogprobs | None] = []
        for entry, samples in zip(entries, plan.samples, strict=True):
            context = self._attend(entry, allocator.block_size, written)
            drawn = best_tokens(entry.req, context, self.vocab_size) if entry.req.search is not None else None
            token = next_token(entry.req, context, self.vocab_size) if drawn is None else drawn.token_id
            token_ids.append(token if samples else None)
            logprobs.append(drawn if samples else None)
            if samples:
                self._last[entry.req.request_id] = (entry.end, token)
        return ReadyTokens(StepResult(token_ids, logprobs if any(logprobs) else None))

    def release(self, request_ids: list[str]) -> None:
        """Forget requests that ended."""
        for request_id in request_ids:
            self._prefix.pop(request_id, None)
            self._last.pop(request_id, None)
        if self.judge is not None:
            self.judge.release(request_ids)

    def _copy(self, copies: Iterable[BlockCopy], block_size: int) -> None:
        for copy in copies:
            kind, src, dst, transfer = copy
            self.num_copies[kind] += 1
            self.num_moved[kind] += transfer is not None
            if kind is not CopyKind.SWAP_OUT and dst == NULL_BLOCK:
                raise OracleFault(f"{kind.value} copy of block {src} into the null block")
            values = self._host_block(src, block_size) if kind is CopyKind.SWAP_IN else self._block(src, block_size)
            if transfer is not None and self.link is not None:
                self.link.begin(copy, transfer, values)
                values = [None] * block_size  # until it arrives
            self._put(copy, values)

    def _land(self, block_size: int) -> None:
        """Make the copies whose transfers have arrived; one that goes up reads the host now."""
        for copy, _, staged in self.link.due() if self.link is not None else ():
            self._put(copy, self._host_block(copy.src, block_size) if copy.kind is CopyKind.SWAP_IN else staged)

    def _block(self, block: int, block_size: int) -> list[int | None]:
        return [self._device.get(block * block_size + i) for i in range(block_size)]

    def _host_block(self, block: int, block_size: int) -> list[int | None]:
        return [self._host.get((block, i)) for i in range(block_size)]

    def _put(self, copy: BlockCopy, values: list[int | None]) -> None:
        for i, value in enumerate(values):
            slot = copy.dst * len(values) + i
            if copy.kind is CopyKind.SWAP_OUT:
                self._host[copy.dst, i] = value
            elif value is None:
                self._device.pop(slot, None)
            else:
                self._device[slot] = value

    def _check_table(self, entry: _Entry, allocator: KVAllocator) -> None:
        req, start, end, table = entry
        block_size, name = allocator.block_size, entry.req.request_id
        if not 0 <= start < end:
            raise OracleFault(f"request {name!r} is scheduled for positions [{start}, {end})")
        last = (end - 1) // block_size
        if last >= len(table) or end > req.num_slots:
            raise OracleFault(
                f"request {name!r} writes up to position {end} and owns {req.num_slots} slots, {len(table)} blocks"
            )
        if NULL_BLOCK in table[start // block_size : last + 1]:
            raise OracleFault(f"request {name!r} writes positions [{start}, {end}) to the null block")
        if allocator.contiguous and any(table[i + 1] != table[i] + 1 for i in range(last)):
            raise OracleFault(f"request {name!r} owns blocks {list(table[: last + 1])}, which are not contiguous")

    def _token(self, req: Request, pos: int) -> int:
        """The token or image at `pos`: from the host, or from this runner's memory while it is pending."""
        if pos < req.num_tokens:
            return req.identities(pos, pos + 1)[0]
        last = self._last.get(req.request_id)
        if last is None or last[0] != pos:
            raise OracleFault(f"request {req.request_id!r} computes position {pos} before its token was sampled")
        return last[1]

    def _write(self, entry: _Entry, block_size: int, written: set[int]) -> None:
        req, start, end, table = entry
        name = req.request_id
        prefix = self._prefix.setdefault(name, [])
        while len(prefix) < end:
            prefix.append(mix(prefix[-1] if prefix else 0, self._token(req, len(prefix))))
        state = 0 if start == 0 else self._read(entry, start - 1, block_size)
        for pos in range(start, end):
            slot = table[pos // block_size] * block_size + pos % block_size
            if slot in written:
                raise OracleFault(f"slot {slot} (position {pos} of request {name!r}) is written twice in one step")
            written.add(slot)
            state = mix(state, self._token(req, pos))
            self._device[slot] = state

    def _attend(self, entry: _Entry, block_size: int, written: set[int]) -> list[int | None]:
        """Read all that the queries of [start, end) attend to, and check it; what decides the next token.

        A kernel for one query may fetch its context before this step's keys and values are there, but for its own.
        """
        req, start, end, table = entry
        window = self.window or end
        first = max(0, start - window + 1)  # what the first query sees
        slots = [table[pos // block_size] * block_size + pos % block_size for pos in range(first, end)]
        if end - start == 1 and not written.isdisjoint(slots[:-1]):
            pos = next(pos for pos, slot in enumerate(slots, first) if slot in written)
            raise OracleFault(
                f"request {req.request_id!r} computes position {start} alone and reads position {pos}, which another "
                "request writes in the same step"
            )
        got = list(map(self._device.get, slots))
        want = self._prefix[req.request_id][first:end]
        if got != want:
            pos = first + next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
            self._read(entry, pos, block_size)
        return got[max(0, end - window) - first :]

    def _read(self, entry: _Entry, pos: int, block_size: int) -> int:
        """The hash at `pos` through the block table. Raises OracleFault unless it is the request's own."""
        req, _, end, table = entry
        block = table[pos // block_size]
        got = self._device.get(block * block_size + pos % block_size)
        if got is None or got != self._prefix[req.request_id][pos]:
            found = "nothing" if got is None else "the KV of other tokens"
            raise OracleFault(
                f"request {req.request_id!r}, {end} positions computed: position {pos} (block {block}, offset "
                f"{pos % block_size}) holds {found}"
            )
        return got
