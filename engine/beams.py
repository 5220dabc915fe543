"""Beam search of one prompt: which of its beams go on with which token, and which texts win. Free of torch.

    beam 0   A B C | D -3.1   F -3.4           scores of all beams' best tokens together; the best `width` go on
    beam 1   A B E | G -3.2   H -9.0

    next     beam 0   A B C D      goes on in place
             beam 1   A B E G      goes on in place
    or       beam 1   A B C F      another one's heir: it gives its own KV back and forks beam 0

As transformers' `generate(num_beams=...)` (5.17, `_beam_search`), which is what the results are held against:

    score of a text = sum of its tokens' log-probabilities / number of them ** length_penalty

with the token that ended it counted in both. Only a text that ends among the best `width` candidates of its step is
kept, and of all kept ones the best `width`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

# `TokenLogprobs` of engine/model_runner.py, which knows of requests, and these of searches.
Entry = Any
EARLY_STOPPING = (True, False, "never")
_score = itemgetter(0)


class Move(NamedTuple):
    """What a beam is next: the tokens of beam `source`, and `token` behind them."""

    source: int
    token: int


class Text(NamedTuple):
    """A text that has ended.

    Attributes:
        score: what it is judged by.
        tokens: all of its output tokens, the one that ended it too.
        is_stopped: a stop token ended it, else its length.
        entries: log-probabilities of its tokens, where they are asked for.
    """

    score: float
    tokens: list[int]
    is_stopped: bool
    entries: list[Entry]


class BeamSearch:
    """One prompt's beams, by number. Each step is a round: every beam's token is drawn, then all beams move at once.

    Args:
        width: beams that run, and texts that win.
        request_ids: of the beams.
        max_tokens: most output tokens.
        stop_ids: tokens that end a text.
        length_penalty: exponent of the length in the score: above 0 long texts gain.
        early_stopping: True ends with the first `width` texts; False when no running beam would be better than the
            worst of them, were it to end now; `never` with a positive penalty: were it to end at `max_tokens`.
        min_tokens: output tokens up to which no token ends a text.
        num_logprobs: alternatives that the winners' log-probabilities show; None: they have none.

    Attributes:
        is_over: no beam moves any more.
        winners: the best texts, best first, once it is over.
        num_candidates: best tokens of each beam that a round needs: those that go on, and all that end a text.
    """

    def __init__(
        self,
        width: int,
        request_ids: Sequence[str],
        max_tokens: int,
        stop_ids: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        min_tokens: int = 0,
        num_logprobs: int | None = None,
    ) -> None:
        self.width, self.request_ids = width, request_ids
        self.num_candidates = width + max(1, len(stop_ids))
        self.num_logprobs = num_logprobs
        self.is_over = False
        self.winners: list[Text] = []
        self._max_tokens, self._min_tokens, self._stop_ids = max_tokens, min_tokens, frozenset(stop_ids)
        self._penalty, self._early = length_penalty, early_stopping
        self._scores = [0.0] * width  # sums of log-probabilities
        self._entries: list[list[Entry]] = [[] for _ in range(width)]
        self._drawn: dict[int, Entry] = {}  # of this round, by beam

    def draw(self, beam: int, entry: Entry) -> None:
        """A beam's best tokens in this round: at least `num_candidates` of them."""
        self._drawn[beam] = entry

    def forget_round(self) -> None:
        """Beams lost their KV: the round is drawn again."""
        self._drawn.clear()

    @property
    def is_drawn(self) -> bool:
        """Every beam's tokens are there."""
        return len(self._drawn) == self.width

    def move(self, outputs: Sequence[Sequence[int]]) -> list[Move]:
        """End the round.

        Args:
            outputs: each beam's output tokens so far, all of one length.

        Returns:
            What each beam is next; a beam with heirs of its own goes on as the best of them. Empty: it `is_over`.
        """
        length = len(outputs[0]) + 1
        best = heapq.nlargest(self.width + self.width * max(1, len(self._stop_ids)), self._candidates(length), _score)
        is_last = length >= self._max_tokens
        stops: Collection[int] = self._stop_ids if length > self._min_tokens else ()
        for score, beam, token in best[: self.width]:
            is_stopped = token in stops
            if is_stopped or is_last:
                self._keep(score, beam, token, outputs[beam], is_stopped)
        going = [] if is_last else [one for one in best if one[2] not in stops][: self.width]
        # Fewer than `width` are left only where nearly every token is barred: no beam can be without an heir.
        if len(going) < self.width or not self._may_improve(going[0][0], length):
            self._end(best, outputs)
            return []
        moves = self._places(going)
        entries = [self._extended(move) for move in moves]
        by_move = {(beam, token): score for score, beam, token in going}
        self._scores = [by_move[move] for move in moves]
        self._entries = entries
        self._drawn.clear()
        return moves

    def _candidates(self, length: int) -> list[tuple[float, int, int]]:
        """(score, beam, token); in the first round all beams are the same one."""
        beams = range(1 if length == 1 else self.width)
        return [(self._scores[beam] + value, beam, token) for beam in beams for token, value in self._drawn[beam].top]

    def _keep(self, score: float, beam: int, token: int, output: Sequence[int], is_stopped: bool) -> None:
        """A text has ended; only the best `width` are kept."""
        tokens = [*output, token]
        entries = self._extended(Move(beam, token))
        self.winners.append(Text(score / len(tokens) ** self._penalty, tokens, is_stopped, entries))
        self.winners.sort(key=_score, reverse=True)
        del self.winners[self.width :]

    def _may_improve(self, best: float, length: int) -> bool:
        """Whether a running beam may still become one of the winners; `best` is the largest sum of a running one."""
        if len(self.winners) < self.width:
            return True
        if self._early and self._early != "never":
            return False
        longest = self._max_tokens if self._early == "never" and self._penalty > 0 else length
        return bool(best / longest**self._penalty > self.winners[-1].score)

    def _end(self, best: list[tuple[float, int, int]], outputs: Sequence[Sequence[int]]) -> None:
        self.is_over = True
        if len(self.winners) < self.width:  # nearly every token is barred: as if all were cut here
            for score, beam, token in best:
                if token not in self._stop_ids:
                    self._keep(score, beam, token, outputs[beam], is_stopped=False)
        self._drawn.clear()

    def _places(self, going: list[tuple[float, int, int]]) -> list[Move]:
        """The beams that go on, by number: a beam's first heir in its place, all others where no heir is."""
        places: dict[int, Move] = {}
        others = []
        for _, beam, token in going:
            if beam in places:
                others.append(Move(beam, token))
            else:
                places[beam] = Move(beam, token)
        free = (beam for beam in range(self.width) if beam not in places)
        places |= dict(zip(list(free), others, strict=True))
        return [places[beam] for beam in range(self.width)]

    def _extended(self, move: Move) -> list[Entry]:
        """Log-probabilities of the tokens of a beam's heir."""
        if self.num_logprobs is None:
            return []
        drawn = self._drawn[move.source]
        rank, value = next((i, value) for i, (token, value) in enumerate(drawn.top, 1) if token == move.token)
        top = drawn.top[: self.num_logprobs]
        return [*self._entries[move.source], drawn._replace(token_id=move.token, logprob=value, rank=rank, top=top)]
