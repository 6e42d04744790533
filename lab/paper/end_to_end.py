"""A whole training iteration, predicted: what surrounds attention, by the tokens of each rank.

A plan's rank may be a group of ``tensor_parallel`` devices that share its heads and its weights.
Linear layers go by FLOPs, norms and element-wise work by memory, the optimizer by the shard of
parameters that each device updates, gradient reduction and parameter gathering by a ring over all
ranks. Nothing is overlapped; attention is the simulated one (:mod:`dcp.simulate`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.plans import Plan

TENSOR_BYTES = 2  # activations and parameters in bfloat16
GRADIENT_BYTES = 4  # gradients are summed in float32
# of the optimizer, per parameter: gradient, master copy and two moments read, three of them
# written in float32, and the parameter in bfloat16
UPDATE_BYTES = 4 * 4 + 3 * 4 + TENSOR_BYTES
TRAINING_PASSES = 3  # a matrix product forward is two backward


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Shape of a decoder whose MLP has two matrices (GELU)."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Parameters of the linear layers of one layer."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 2 * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Parameters of the output layer, tied with the embedding."""
        return self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        return self.num_layers * self.layer_weights + self.head_weights

    def spec(self, tensor_parallel: int, *, dtype: str = "bfloat16") -> AttentionSpec:
        """Attention of one of ``tensor_parallel`` devices.

        Raises ``ValueError`` where the heads cannot be shared out so.
        """
        if self.num_heads % tensor_parallel or self.num_kv_heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel={tensor_parallel} does not divide num_heads={self.num_heads} "
                f"and num_kv_heads={self.num_kv_heads}"
            )
        return AttentionSpec(
            num_heads=self.num_heads // tensor_parallel,
            num_kv_heads=self.num_kv_heads // tensor_parallel,
            head_dim=self.head_dim,
            dtype=dtype,
        )


# What the published end-to-end figures were run with: 8 B by name, a GELU MLP in fact.
GPT_8B = Transformer(
    num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=50304,
)  # fmt: skip


@dataclass(frozen=True)
class Iteration:
    """Seconds of the parts of one training iteration, one after another."""

    attention: float
    linear: float
    memory_bound: float
    tensor_parallel: float
    optimizer: float
    gradients: float

    @property
    def seconds(self) -> float:
        return self.attention + self.others

    @property
    def others(self) -> float:
        """All but attention."""
        return (
            self.linear + self.memory_bound + self.tensor_parallel + self.optimizer + self.gradients
        )


def sliced_cluster(cluster: Cluster, tensor_parallel: int) -> Cluster:
    """The ranks that plans see: groups of ``tensor_parallel`` devices, each with its share of the
    node's network. All devices of a group move the same messages of their own heads."""
    sizes = cluster.node_sizes
    if (sizes % tensor_parallel).any():
        raise ValueError(f"tensor_parallel={tensor_parallel} does not divide {sizes.tolist()}")
    node = cluster.inter_node_bandwidth / tensor_parallel
    return replace(
        cluster,
        devices_per_node=tuple((sizes // tensor_parallel).tolist()),
        inter_node_bandwidth=node,
        device_network_bandwidth=min(cluster.device_network_bandwidth, node),
    )


def predict_iteration(
    plan: Plan, model: Transformer, cluster: Cluster, tensor_parallel: int
) -> Iteration:
    """One iteration of ``model`` with ``plan``, made for ``sliced_cluster(cluster, …)``.

    Args:
        cluster: all devices, ``tensor_parallel`` of them to each rank of the plan.
    """
    ranks, nodes = plan.num_ranks, cluster.num_nodes
    if ranks * tensor_parallel != cluster.num_ranks:
        raise ValueError(
            f"{ranks} ranks of {tensor_parallel} devices are not the cluster's {cluster.num_ranks}"
        )
    timeline = plan.simulate()
    tokens = float(plan.rank_tokens.max())
    layers, weights = model.num_layers, model.num_parameters
    flops = 2.0 * tokens * weights / tensor_parallel * TRAINING_PASSES

    # a layer reads and writes about this many values a token, forward; backward twice as many
    shared = 3 * model.intermediate_size / tensor_parallel
    values = 2 * 5 * model.hidden_size + shared  # norm, residual, dropout of both halves; MLP
    memory = TRAINING_PASSES * tokens * layers * values * TENSOR_BYTES / cluster.memory_bandwidth

    # two all-reduces forward and two backward in every layer, inside the node
    around = 2 * (tensor_parallel - 1) / tensor_parallel
    moved = 4 * layers * tokens * model.hidden_size * TENSOR_BYTES * around
    update = weights / cluster.num_ranks * UPDATE_BYTES / cluster.memory_bandwidth

    # reduce-scatter of gradients and gather of parameters: every device's ring crosses each node's
    # network once, so a node carries all weights; alone, a node's devices share their links
    bytes_each = (GRADIENT_BYTES + TENSOR_BYTES) * (ranks - 1) / ranks
    inside = weights / tensor_parallel * bytes_each / cluster.intra_node_bandwidth
    across = weights * bytes_each / cluster.inter_node_bandwidth if nodes > 1 else 0.0
    return Iteration(
        attention=layers * (timeline.forward_seconds + timeline.backward_seconds),
        linear=flops / cluster.device_flops,
        memory_bound=memory,
        tensor_parallel=moved / cluster.intra_node_bandwidth,
        optimizer=update,
        gradients=max(inside, across),
    )
