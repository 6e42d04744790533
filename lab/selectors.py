"""Whether keys and values or queries go round the ring: published rules by totals of the batch.

Each is a ``strategy`` for :func:`dcp.inference.plan_turn`, and sees only numbers that all ranks
know (new and cached tokens, heads, the cluster's rates), so that all ranks choose alike. From arXiv
2411.01783: algorithm 1, algorithm 5 (appendix C), and the form of the empirical rule (appendix D),
whose coefficients are fitted to measurements of the machine at hand; the published ones belong to
another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.inference.turn import Selector


def algorithm_1(new: int, cached: int, spec: AttentionSpec, cluster: Cluster) -> str:
    """Pass keys and values where that hides behind compute, or where they are the smaller."""
    hidden = new >= _hiding_tokens(spec, cluster)
    return "pass_kv" if hidden or _miss_rate(new, cached) >= _size_ratio(spec) else "pass_q"


def algorithm_5(new: int, cached: int, spec: AttentionSpec, cluster: Cluster) -> str:
    """As algorithm 1, with the cost of bringing outputs home counted against queries."""
    share = new / _hiding_tokens(spec, cluster)
    smaller = _miss_rate(new, cached) >= _size_ratio(spec) * (1 - share)
    return "pass_kv" if share >= 1 or smaller else "pass_q"


SELECTORS: dict[str, Selector] = {"algorithm_1": algorithm_1, "algorithm_5": algorithm_5}


@dataclass(frozen=True)
class Empirical:
    """``a log T + b log(T / (T + P)) + c > 0``: pass keys and values; T new, P cached tokens."""

    a: float
    b: float
    c: float

    def __call__(self, new: int, cached: int, spec: AttentionSpec, cluster: Cluster) -> str:
        return "pass_kv" if self.score(new, cached) > 0 else "pass_q"

    def score(self, new: int, cached: int) -> float:
        """The log of how many times longer passing queries would take."""
        return float(np.array([self.a, self.b, self.c]) @ _features([new], [cached])[:, 0])

    @classmethod
    def fit(cls, measured: Iterable[tuple[int, int, float, float]]) -> Empirical:
        """Least squares on (new, cached, seconds of pass-KV, seconds of pass-Q) of one machine.

        Raises ``ValueError`` for fewer than three measurements: three numbers are fitted.
        """
        rows = list(measured)
        if len(rows) < 3:
            raise ValueError(f"{len(rows)} measurements are too few to fit 3 coefficients")
        new, cached, pass_kv, pass_q = np.array(rows, dtype=np.float64).T
        target = np.log(pass_q / pass_kv)
        a, b, c = np.linalg.lstsq(_features(new, cached).T, target, rcond=None)[0].tolist()
        return cls(a, b, c)

    def save(self, path: str | Path) -> None:
        """Write the coefficients as JSON, readable by :meth:`load`."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Empirical:
        """Read what :meth:`save` wrote; ``ValueError`` for anything else."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (OSError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no fitted rule: {error}") from None


def _features(new: Iterable[float], cached: Iterable[float]) -> np.ndarray:
    """``[3, n]``; at least one new token, for a turn without any needs no choice."""
    tokens = np.maximum(np.asarray(new, dtype=np.float64), 1)
    miss = tokens / (tokens + np.asarray(cached, dtype=np.float64))
    return np.stack([np.log(tokens), np.log(miss), np.ones_like(tokens)])


def _miss_rate(new: int, cached: int) -> float:
    return new / max(new + cached, 1)


def _size_ratio(spec: AttentionSpec) -> float:
    """Miss rate at which a turn's queries are as many bytes as its keys and values (equation 1)."""
    return 2 * spec.num_kv_heads / spec.num_heads


def _hiding_tokens(spec: AttentionSpec, cluster: Cluster) -> float:
    """New tokens from which on a ring step computes longer than it passes keys (equation 2)."""
    return (
        cluster.num_ranks * cluster.device_flops * spec.num_kv_heads * spec.dtype_bytes
    ) / (2 * spec.num_heads * cluster.ring_bandwidth)  # fmt: skip
