"""What Prometheus is told of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dcp.inference.batching import Batcher

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = of = CollectorRegistry()
        self._requests = Counter(
            "dcp_requests", "Requests by how they ended", ["outcome"], registry=of
        )
        self.prompt_tokens = Counter("dcp_prompt_tokens", "Tokens of prompts", registry=of)
        self.new_tokens = Counter("dcp_generated_tokens", "Tokens of replies", registry=of)
        self.first_token = Histogram(
            "dcp_time_to_first_token_seconds", "Queueing included", buckets=_SECONDS, registry=of
        )
        self.later_token = Histogram(
            "dcp_time_per_token_seconds", "Between tokens of a reply", buckets=_SECONDS, registry=of
        )
        self._queue = Gauge("dcp_queue", "Requests that wait", registry=of)
        self._running = Gauge("dcp_running", "Requests in the cache", registry=of)
        self._kept = Gauge("dcp_kept", "Ended conversations in the cache", registry=of)
        self._shared = Gauge(
            "dcp_shared_tokens", "Tokens of prompts that were in the cache", registry=of
        )
        self._free = Gauge("dcp_free_pages", "Free pages of the fullest rank's cache", registry=of)

    def ended(self, outcome: str) -> None:
        """Count a request: stop, length, error, cancelled or refused."""
        self._requests.labels(outcome).inc()

    def gauge(self, batcher: Batcher, *, num_open: int) -> None:
        """Note where things stand; called by the thread that runs the batcher."""
        self._running.set(batcher.num_running)
        self._queue.set(max(num_open - batcher.num_running, 0))
        self._kept.set(batcher.room.num_kept)
        self._shared.set(batcher.room.num_shared_tokens)
        self._free.set(int(batcher.engine.attention.caches[0].free_pages.min()))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
