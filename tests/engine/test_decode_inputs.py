"""What the host sends for a decode step."""

import numpy as np
import pytest
import torch

from kvarena.engine.runner import decode_inputs
from kvarena.engine.runner.decode_inputs import NUM_FIELDS, DecodeSender, TableMirror
from kvarena.engine.runner.graphs import batch_buckets


def apply(mirror, device):
    indices, values = mirror.take()
    assert len(set(indices)) == len(indices)
    device.reshape(-1)[indices] = values
    return len(indices)


def test_mirror_sends_changes_only_and_follows_any_change():
    mirror, device = TableMirror(3, 8), np.zeros((3, 8), dtype=np.int64)
    table = [5, 6]
    mirror.update(1, table)
    assert apply(mirror, device) == 2
    table.append(7)
    mirror.update(1, table)
    assert apply(mirror, device) == 1
    mirror.update(1, table)
    assert apply(mirror, device) == 0
    table[0] = 9  # copy-on-write, or a block that slid out
    mirror.update(1, table)
    apply(mirror, device)
    assert device[1, :3].tolist() == [9, 6, 7]
    mirror.update(1, range(20, 24))
    apply(mirror, device)
    assert device[1, :4].tolist() == [20, 21, 22, 23]
    mirror.update(1, list(range(30, 42)))  # longer than any context needs
    assert apply(mirror, device) == 8
    assert device[0].sum() == device[2].sum() == 0


def test_sender_sends_fields_and_any_number_of_changes(monkeypatch):
    monkeypatch.setattr(decode_inputs, "_MAX_CHANGES", 8)
    tables = torch.zeros(4, 16, dtype=torch.int32)
    sender = DecodeSender(5, tables)
    fields = np.arange(NUM_FIELDS * 5, dtype=np.int32).reshape(NUM_FIELDS, 5)
    indices = np.random.default_rng(0).permutation(64)[:29].tolist()
    sender.send(fields, indices, [100 + i for i in indices])
    assert torch.equal(sender.fields[:, :5], torch.from_numpy(fields))
    expected = torch.zeros(64, dtype=torch.int32)
    expected[indices] = torch.tensor(indices, dtype=torch.int32) + 100
    assert torch.equal(tables.view(-1), expected)
    for step in range(5):  # the buffers take turns
        sender.send(fields + step, [step], [step])
        assert int(sender.fields[0, 0]) == step
        assert int(tables.view(-1)[step]) == step


@pytest.mark.parametrize("max_batch", [1, 3, 8, 100, 256, 300])
def test_buckets_hold_every_batch(max_batch):
    buckets = batch_buckets(max_batch)
    assert buckets == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == max_batch
