"""The waiting queue."""

from kvarena.engine.request import Request
from kvarena.schedulers.queue import RequestQueue


def make(name: str) -> Request:
    return Request(name, [1])


def test_smallest_key_comes_first_and_equal_keys_keep_their_order():
    queue = RequestQueue()
    a, b, c = make("a"), make("b"), make("c")
    for req, key in ((a, 2), (b, 1), (c, 1)):
        queue.push(req, key)
    assert queue.peek() is b
    queue.remove(b)
    assert queue.peek() is c
    assert len(queue) == 2


def test_removed_from_the_middle_never_comes_out_again():
    queue = RequestQueue()
    a, b = make("a"), make("b")
    queue.push(a, 1)
    queue.push(b, 2)
    queue.remove(a)
    assert queue.peek() is b
    queue.remove(b)
    assert queue.peek() is None
    assert len(queue) == 0


def test_a_request_that_returns_counts_under_its_new_key_only():
    queue = RequestQueue()
    a, b = make("a"), make("b")
    queue.push(a, 1)
    queue.push(b, 2)
    queue.remove(a)
    queue.push(a, 3)  # its old entry is still in the heap
    assert queue.peek() is b
    queue.remove(b)
    assert queue.peek() is a
