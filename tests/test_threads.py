"""One owner of the cores: how work is divided among threads, and what BLAS may do meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

from mlxdiff.backends import numpy_layers as layers
from mlxdiff.machine import threads

needs_openblas = pytest.mark.skipif(
    not threads.one_blas_thread.possible, reason="NumPy's BLAS divides products itself"
)


@pytest.fixture(params=[1, 2, 3])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    threads.pool.cache_clear()
    monkeypatch.setattr(threads, "count", lambda: request.param)
    return int(request.param)


@pytest.fixture
def blas_threads(monkeypatch: pytest.MonkeyPatch) -> object:
    """The function that says how many threads BLAS uses; it is set to 2."""
    get, put = threads._openblas() or pytest.skip("NumPy's BLAS divides products itself")
    before = get()
    put(2)
    yield get
    put(before)


def test_results_are_in_order(count: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.001 * (i % 3))
        return i * i

    assert threads.for_each(work, range(20), 99) == [i * i for i in range(20)]
    assert threads.for_each(work, [], 99) == []


def test_the_caller_and_others_work(count: int) -> None:
    meeting = threading.Barrier(count)  # nobody passes before all have come
    who = threads.for_each(
        lambda _: (meeting.wait(10), threading.get_ident())[1], range(count), count
    )
    assert len(set(who)) == count
    assert threading.get_ident() in who


def test_no_more_threads_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count", lambda: 3)
    alone = threads.for_each(lambda _: threading.get_ident(), range(50), 1)
    assert set(alone) == {threading.get_ident()}


def test_work_inside_work_stays_on_its_thread(count: int) -> None:
    def outer(_: int) -> bool:
        inner = threads.for_each(lambda _: threading.get_ident(), range(5), 5)
        return set(inner) == {threading.get_ident()}

    if count > 1:
        assert all(threads.for_each(outer, range(6), 6))
    work = threads.for_each(lambda i: i, range(6), 6)  # the mark does not outlive the work
    assert work == list(range(6))
    assert not threads._dividing.get()


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_a_failure_is_raised_and_ends_the_work(count: int, bad: int) -> None:
    done = []

    def work(i: int) -> None:
        if i == bad:
            raise ValueError(str(i))
        time.sleep(0.005)
        done.append(i)

    with pytest.raises(ValueError, match=str(bad)):
        threads.for_each(work, range(200), 99)
    assert len(done) < 50
    assert threads.for_each(lambda i: i, range(3), 3) == [0, 1, 2]


def test_numpys_error_state_reaches_the_threads(count: int) -> None:
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("NumPy 1 keeps it for each thread")
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        threads.for_each(lambda _: np.float32(1e38) * np.float32(10), range(4), 4)


def test_several_callers_at_once(count: int) -> None:
    """More callers than threads: each finishes, also if no other thread is free for it."""
    got: dict[int, list[int]] = {}

    def call(k: int) -> None:
        got[k] = threads.for_each(lambda i: (time.sleep(0.001), k * i)[1], range(20), 99)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert got == {k: [k * i for i in range(20)] for k in range(6)}


def test_the_number_follows_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in threads.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 5)
    assert threads.count.__wrapped__() == 5
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert threads.count.__wrapped__() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert threads.count.__wrapped__() == 3


# ------------------------------------------------------------------------------------------- BLAS


def test_blas_is_held_to_one_thread_and_given_back(blas_threads) -> None:  # type: ignore[no-untyped-def]
    with threads.one_blas_thread:
        assert blas_threads() == 1
        with threads.one_blas_thread:
            assert blas_threads() == 1
        assert blas_threads() == 1
    assert blas_threads() == 2
    with pytest.raises(ValueError), threads.one_blas_thread:
        raise ValueError
    assert blas_threads() == 2


def test_every_product_of_the_layers_is_on_one_thread_of_blas(
    blas_threads,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    real = np.matmul

    def matmul(*args: np.ndarray, **kwargs: np.ndarray) -> np.ndarray:
        seen.append(blas_threads())
        return real(*args, **kwargs)

    monkeypatch.setattr(layers.np, "matmul", matmul)
    monkeypatch.setattr(threads, "count", lambda: 2)
    x = np.ones((1, 8, 8, 4), np.float32)
    for layer in (layers.Linear(4, 4), layers.Conv2d(4, 4, 1), layers.Conv2d(4, 4, 3, padding=1)):
        layer(x)
    tokens = x.reshape(1, 64, 4)
    layers.attention(tokens, tokens, tokens, 2)
    assert len(seen) == 7
    assert set(seen) == {1}
    assert blas_threads() == 2


def test_another_blas_keeps_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_openblas", lambda: None)
    other = threads._OneBlasThread()
    with other:
        assert not other.possible
    monkeypatch.setattr(threads, "one_blas_thread", other)
    monkeypatch.setattr(threads, "count", lambda: 4)
    assert threads.for_products() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@needs_openblas
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_others_compute(blas_threads) -> None:  # type: ignore[no-untyped-def]
    def child(pipe) -> None:  # type: ignore[no-untyped-def]
        before = blas_threads()
        with threads.one_blas_thread:
            pipe.send((before, blas_threads(), threads.for_each(lambda i: i, range(4), 4)))

    here, there = multiprocessing.Pipe()
    with threads.one_blas_thread:
        process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
        process.start()
    assert here.poll(20)
    assert here.recv() == (2, 1, [0, 1, 2, 3])
    process.join(20)


# ----------------------------------------------------------------------------------------- layers


def test_large_layers_are_divided_and_small_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "count", lambda: 4)
    monkeypatch.setattr(threads, "for_products", lambda: 4)
    assert layers._threads_for(layers._LEAST_MACS) == 1
    assert layers._threads_for(3 * layers._LEAST_MACS) == 3
    assert layers._threads_for(100 * layers._LEAST_MACS) == 4
    used: list[int] = []
    real = threads.for_each
    monkeypatch.setattr(
        threads, "for_each", lambda f, parts, most: used.append(most) or real(f, parts, 1)
    )
    layers.silu(np.zeros(3 * layers._BLOCK, np.float32))
    layers.silu(np.zeros((8, layers._BLOCK), np.float32))
    assert [min(most, 4) for most in used] == [0, 2]


@pytest.mark.parametrize("shape", [(300, 20, 8), (8, 20, 300), (1, 5, 7), (0, 5, 7)])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_divided_product(
    shape: tuple[int, int, int], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "count", lambda: number)
    monkeypatch.setattr(threads, "for_products", lambda: number)
    monkeypatch.setattr(layers, "_LEAST_MACS", 1)
    random = np.random.RandomState(0)
    rows, inner, columns = shape
    a, b = (random.standard_normal(s).astype(np.float32) for s in (shape[:2], (columns, inner)))
    bias = random.standard_normal(columns).astype(np.float32)
    exact = a.astype(np.float64) @ b.T.astype(np.float64) + bias
    got = layers._product(a, b.T, bias)
    assert got.shape == (rows, columns)
    assert got.dtype == np.float32
    # A sum of n products in any order: |error| <= (n + 1) u sum |a b| (Higham 2002, section 3.1).
    bound = (inner + 2) * 2.0**-24 * (np.abs(a) @ np.abs(b.T) + np.abs(bias))
    assert (np.abs(got - exact) <= bound).all()
