"""Several requests at a time: in order, not too many, and an error at its place."""

import threading

import pytest

from distributed.files.ahead import AT_ONCE, ahead


def test_ahead_keeps_the_order_and_has_many_under_way_but_no_more_than_it_says() -> None:
    lock, all_there, begun, at_work, most = threading.Lock(), threading.Barrier(AT_ONCE), [0], [0], [0]

    def square(number: int) -> int:
        with lock:
            begun[0] += 1
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        if number < AT_ONCE:
            all_there.wait(timeout=60)  # each waits for all the others: none would end one after the other
        with lock:
            at_work[0] -= 1
        return number * number

    seen = []
    for number, squared in ahead(square, range(3 * AT_ONCE)):
        assert begun[0] <= number + 1 + AT_ONCE
        seen.append((number, squared))
    assert seen == [(number, number * number) for number in range(3 * AT_ONCE)]
    assert most[0] == AT_ONCE


def test_ahead_raises_at_the_place_of_the_item_and_begins_no_more() -> None:
    begun: list[int] = []

    def invert(number: int) -> float:
        begun.append(number)
        return 1 / (number - 3)

    answers = ahead(invert, range(1000))
    assert [next(answers)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(answers)
    assert len(begun) <= 4 + AT_ONCE
    assert not list(ahead(invert, ()))
