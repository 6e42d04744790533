"""Settings that all tests share."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.pool import GlooPool

# A busy machine is no failure: examples are counted, not timed.
settings.register_profile(
    "dcp", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dcp")


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
