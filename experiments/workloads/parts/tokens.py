"""Token ids from numbered streams.

Stream `s` of a source is an endless row of token ids, a function of (seed, purpose, s, epoch) alone: any prefix of it
can be made at any time, and equal streams give equal tokens. A prompt is a prefix of a stream, or several in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvarena.engine.checks import check_int
from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH
from kvarena.experiments.workloads.parts.seeds import Purpose, seed_sequence


class TokenSource:
    """Numbered streams of uniformly drawn token ids.

    A stream is a Philox counter sequence keyed by (seed and purpose, stream): independent streams by construction, at
    no cost for those that are not used.

    Args:
        seed: the workload's seed.
        purpose: separates the streams of prompts from those of shared prefixes.
        vocab_size: ids are drawn from [0, vocab_size).
        reserved_token_ids: ids that are never drawn (end of sequence, padding and the like).

    Raises:
        ConfigError: no id is left to draw.
    """

    def __init__(self, seed: int, purpose: Purpose, vocab_size: int, reserved_token_ids: Sequence[int] = ()) -> None:
        check_int("vocab_size", vocab_size, 1)
        allowed = np.setdiff1d(np.arange(vocab_size), np.asarray(list(reserved_token_ids), dtype=np.int64))
        if allowed.size == 0:
            raise ConfigError(f"all {vocab_size} token ids of the vocabulary are reserved; nothing is left for prompts")
        # Python's own integers, made once and shared by all prompts: a token costs 8 bytes instead of 36.
        self._ids = allowed.astype(object)
        self._key = int(seed_sequence(seed, purpose).generate_state(1, np.uint64)[0])

    def take(self, stream: int, length: int, *, epoch: int = 0) -> list[int]:
        """The first `length` token ids of a stream.

        Args:
            stream: in [0, 2**64).
            length: tokens wanted, at least 0.
            epoch: another row of the same stream number (a trace that is replayed again).
        """
        if not 0 <= length <= MAX_LENGTH:
            raise ConfigError(f"a prompt of {length} tokens cannot be made; at most {MAX_LENGTH}")
        bits = np.random.Philox(key=[self._key, stream], counter=[0, 0, 0, epoch])
        picks = np.random.Generator(bits).integers(0, self._ids.size, size=length, dtype=np.int64)
        return list(self._ids[picks].tolist())
