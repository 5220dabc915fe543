"""The ledger's classes of KV slots, by the names under which they are stored and drawn; engine/ledger.py counts them.

A leaf that imports nothing: reports may import it too.
"""

from __future__ import annotations

OWNED = ("token_states", "reservation", "internal")  # by requests
# In the order in which they are stacked in figures; they add up to the pool's slots.
CLASSES = (*OWNED, "external", "shortage", "cached", "free")
LEDGER = (*CLASSES, "total", "shared_saved", "held")  # what is recorded of each step
