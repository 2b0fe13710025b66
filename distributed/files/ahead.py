"""Several requests to an object store at a time: while one is waited for, others are under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["AT_ONCE", "ahead"]

AT_ONCE = 32
"""Requests under way, and so the answers that are in memory: a request takes a store tens of milliseconds."""

T = TypeVar("T")
R = TypeVar("R")


def ahead(action: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item with what `action` makes of it, in order, on threads that are at most `AT_ONCE` items ahead.

    Raises:
        Whatever the action raises, at the place of its item; later items may have been begun by then.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(AT_ONCE, "ahead") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(action, item)))
                if len(waiting) >= AT_ONCE:
                    first, answer = waiting.popleft()
                    yield first, answer.result()
            while waiting:
                first, answer = waiting.popleft()
                yield first, answer.result()
        finally:
            for _, answer in waiting:
                answer.cancel()
