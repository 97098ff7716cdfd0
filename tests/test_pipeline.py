"""Stages in threads: order, bounds, failures and early ends."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dpe_cli.pipeline import abreast, ahead


def test_all_items_come_in_order():
    assert list(ahead(range(100), depth=3)) == list(range(100))
    assert list(ahead([])) == []


def test_a_stage_runs_while_the_next_one_works():
    def slow() -> Iterator[int]:
        for number in range(6):
            time.sleep(0.05)
            yield number

    started = time.perf_counter()
    for _ in ahead(slow()):
        time.sleep(0.05)
    assert time.perf_counter() - started < 0.55  # one after the other takes 0.6; side by side 0.35


def test_it_is_at_most_so_many_items_ahead():
    made = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    for number in ahead(items(), depth=2):
        time.sleep(0.01)
        assert len(made) <= number + 1 + 2 + 1  # taken, waiting, and one that waits to wait


def test_nothing_runs_before_it_is_asked_for():
    asked = []

    def items() -> Iterator[int]:
        asked.append(True)
        yield 1

    stage = ahead(items())
    time.sleep(0.02)
    assert not asked
    assert list(stage) == [1] and asked


def test_a_failure_comes_after_the_items_before_it():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    got = []
    with pytest.raises(ValueError, match="broken"):
        for item in ahead(items()):
            got.append(item)
    assert got == [1]


def test_who_stops_early_leaves_no_thread_and_closes_the_items():
    closed, threads = [], threading.active_count()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    stage = ahead(items(), depth=2)
    assert next(stage) == 0
    stage.close()
    assert closed and threading.active_count() == threads


def test_lanes_take_turns_and_their_results_come_in_order():
    lanes: list[list[int]] = [[], []]

    def lane(mine: list[int]) -> Callable[[int], int]:
        def work(number: int) -> int:
            time.sleep(0.02 * (number % 3))  # some are done before those that came first
            mine.append(number)
            return -number

        return work

    assert list(abreast(range(7), [lane(mine) for mine in lanes])) == [(number, -number) for number in range(7)]
    assert lanes == [[0, 2, 4, 6], [1, 3, 5]]


def test_lanes_work_at_once():
    both = threading.Barrier(2, timeout=10)
    assert [place for _, place in abreast(range(4), [lambda _: both.wait() >= 0] * 2)] == [True] * 4


def test_one_lane_works_in_the_thread_that_asks():
    here = threading.get_ident()
    assert list(abreast("ab", [lambda _: threading.get_ident()])) == [("a", here), ("b", here)]


def test_a_lane_that_fails_is_heard_after_the_items_before():
    def fail(number: int) -> int:
        if number == 2:
            raise ValueError("broken")
        return number

    stage, got = abreast(range(9), [fail, fail]), []
    with pytest.raises(ValueError, match="broken"):
        for item, _ in stage:
            got.append(item)
    assert got == [0, 1]


def test_whoever_leaves_lanes_early_leaves_no_thread():
    before = threading.active_count()
    stage = abreast(range(100), [lambda number: number] * 3)
    assert next(stage) == (0, 0)
    stage.close()
    assert threading.active_count() == before


def test_items_that_nobody_wants_any_more_may_be_closed_by_their_own_thread():
    held, taken, closed, told = {}, threading.Event(), threading.Event(), []

    def items() -> Iterator[int]:
        yield 1
        taken.wait(5)
        try:
            held["ahead"].close()  # as the garbage collector does, in whatever thread it runs
        except RuntimeError as error:
            told.append(error)
        closed.set()
        yield 2

    held["ahead"] = ahead(items())
    assert next(held["ahead"]) == 1
    taken.set()
    assert closed.wait(5) and not told
