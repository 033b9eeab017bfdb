"""Values of many requests in one call: each answer to its own request, bad values alone, queues that end."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from nearfar.serving.batcher import Batcher, Busy


class Squares:
    """Squares of numbers; remembers its calls, takes its time, and cannot do negative ones."""

    def __init__(self, seconds: float = 0.0, refuse: bool = False) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.seconds, self.refuse = seconds, refuse
        self.threads: set[str] = set()

    def __call__(self, key: str, values: Sequence[int]) -> list[Any]:
        self.calls.append((key, list(values)))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.refuse and min(values) < 0:
            raise ValueError(f"{key}: a negative number among {len(values)}")
        return [value**2 for value in values]


def test_requests_of_a_moment_share_a_call_and_later_ones_do_not() -> None:
    work = Squares()

    async def run() -> list[list[int]]:
        batcher = Batcher(work, wait=0.05)
        first = await asyncio.gather(*(batcher.submit("a", [n, n + 1]) for n in range(5)))
        first.append(await batcher.submit("a", [100]))
        await batcher.close()
        return first

    answers = asyncio.run(run())
    assert answers == [[n**2, (n + 1) ** 2] for n in range(5)] + [[10000]]
    assert [len(values) for _, values in work.calls] == [10, 1]
    assert len(work.threads) == 1


def test_every_answer_goes_to_its_own_request_among_many_keys() -> None:
    work = Squares(seconds=0.001)
    rng = random.Random(0)
    wanted = [
        (rng.choice("abc"), [rng.randrange(10**6) for _ in range(rng.randrange(1, 9))]) for _ in range(300)
    ]

    async def ask(batcher: Batcher, key: str, values: list[int]) -> list[int]:
        await asyncio.sleep(rng.random() * 0.05)
        return await batcher.submit(key, values)

    async def run() -> list[list[int]]:
        batcher = Batcher(work, wait=0.002, most=16)
        answers = await asyncio.gather(*(ask(batcher, key, values) for key, values in wanted))
        await batcher.close()
        return answers

    answers = asyncio.run(run())
    assert answers == [[value**2 for value in values] for _, values in wanted]
    assert max(len(values) for _, values in work.calls) <= 16
    assert len(work.calls) < 300
    sent = sorted((key, value) for key, values in wanted for value in values)
    assert sorted((key, value) for key, values in work.calls for value in values) == sent  # each once


def test_a_value_that_cannot_be_done_fails_alone() -> None:
    work = Squares(refuse=True)

    async def run() -> list[Any]:
        batcher = Batcher(work, wait=0.02)
        answers = await asyncio.gather(*(batcher.submit("a", [n, 50 + n]) for n in (1, 2, -3, 4)))
        await batcher.close()
        return answers

    one, two, bad, four = asyncio.run(run())
    assert (one, two, four) == ([1, 51**2], [4, 52**2], [16, 54**2])
    assert isinstance(bad[0], ValueError)
    assert bad[1] == 47**2


def test_an_exception_among_the_results_is_the_result_of_its_value() -> None:
    def work(key: str, values: Sequence[int]) -> list[Any]:
        return [KeyError("no") if value == 2 else value for value in values]

    async def run() -> list[list[Any]]:
        batcher = Batcher(work)
        answers = await asyncio.gather(*(batcher.submit("a", [n]) for n in (1, 2, 3)))
        await batcher.close()
        return answers

    one, two, three = asyncio.run(run())
    assert (one, three) == ([1], [3])
    assert isinstance(two[0], KeyError)


def test_too_few_results_are_an_error_and_no_shift() -> None:
    async def run() -> list[Any]:
        batcher = Batcher(lambda key, values: values[1:])
        answer = await batcher.submit("a", [1, 2, 3])
        await batcher.close()
        return answer

    assert all(isinstance(each, RuntimeError) for each in asyncio.run(run()))


def test_beyond_its_limit_it_is_busy_and_says_for_how_long() -> None:
    work = Squares(seconds=0.05)

    async def run() -> tuple[int, int, int]:
        batcher = Batcher(work, wait=0.0, most=4, waiting=10)
        await batcher.submit("a", [1])
        answered = refused = waited = 0
        tasks = [asyncio.create_task(batcher.submit("a", [n, n])) for n in range(50)]
        for task in tasks:
            try:
                assert len(await task) == 2
                answered += 1
            except Busy as busy:
                refused += 1
                waited = busy.retry_after
        assert len(batcher) == 0
        await batcher.close()
        return answered, refused, waited

    answered, refused, waited = asyncio.run(run())
    assert answered + refused == 50
    assert answered == 5
    assert waited >= 1


def test_who_gives_up_is_taken_out_of_the_queue() -> None:
    work = Squares(seconds=0.1)

    async def run() -> list[int]:
        batcher = Batcher(work, wait=0.0, most=2)
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.sleep(0.03)  # it runs
        given_up = asyncio.create_task(batcher.submit("a", [2, 3]))
        other = asyncio.create_task(batcher.submit("a", [4]))
        await asyncio.sleep(0.01)
        given_up.cancel()
        answers = await first + await other
        await batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return answers

    assert asyncio.run(run()) == [1, 16]
    assert [values for _, values in work.calls] == [[1], [4]]


def test_closing_finishes_what_waits_and_takes_nothing_more() -> None:
    work = Squares(seconds=0.02)

    async def run() -> list[list[int]]:
        batcher = Batcher(work, wait=10.0, most=3)
        tasks = [asyncio.create_task(batcher.submit("a", [n])) for n in range(7)]
        await asyncio.sleep(0.01)
        await batcher.close()  # does not wait ten seconds for company
        with pytest.raises(Busy, match="being stopped"):
            await batcher.submit("a", [1])
        return await asyncio.gather(*tasks)

    began = time.monotonic()
    assert asyncio.run(run()) == [[n**2] for n in range(7)]
    assert time.monotonic() - began < 5


def test_closing_does_not_wait_longer_than_its_grace() -> None:
    work = Squares(seconds=0.3)

    async def run() -> list[Any]:
        batcher = Batcher(work, wait=0.0, most=1)
        tasks = [asyncio.create_task(batcher.submit("a", [n])) for n in range(20)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await batcher.close(grace=0.1)
        assert time.monotonic() - began < 1.5
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 2)

    answers = asyncio.run(run())
    assert sum(isinstance(each, Busy) for each in answers) >= 18


def test_an_empty_request_needs_no_call() -> None:
    work = Squares()

    async def run() -> list[int]:
        batcher = Batcher(work)
        answer = await batcher.submit("a", [])
        await batcher.close()
        return answer

    assert asyncio.run(run()) == []
    assert work.calls == []
