"""Settings that all tests share."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from dcp import Cluster, plan
from tests.batches import SPEC, make_batch
from tests.browser import Page, browser
from tests.pool import GlooPool

# A busy machine is no failure: examples are counted, not timed.
settings.register_profile(
    "dcp", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dcp")


def pytest_configure(config: pytest.Config) -> None:
    """Compile the planner once, before workers and their ranks would all do it at the same time."""
    if not hasattr(config, "workerinput"):
        for mask in ("causal", "streaming"):
            plan(make_batch([9000, 3000, 70], mask), SPEC, Cluster(num_nodes=2, devices_per_node=2))


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[Callable[[int], GlooPool]]:
    """``gloo_pool(world)``: the session's processes of that world size."""
    pools: dict[int, GlooPool] = {}

    def get(world: int) -> GlooPool:
        if world not in pools or not pools[world].is_alive:
            pools[world] = GlooPool(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(chromium: Page) -> Page:
    """The session's page of a browser, with no error noted yet."""
    chromium.errors.clear()
    chromium.requests.clear()
    return chromium


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    """``interpreter(function, *args)``: its result in a process where Triton interprets, which its
    own environment variable has to say before it is imported."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_interpret) as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(120)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
