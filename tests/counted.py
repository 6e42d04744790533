"""What a placement costs: balances and bytes, counted from the two maps alone."""

from __future__ import annotations

import numpy as np

from dcp.cluster import Cluster
from dcp.cost import attention_seconds, bound_seconds, linear_seconds
from dcp.placement import Placement


def placement_figures(placement: Placement, cluster: Cluster) -> dict[str, float]:
    """Balances, bytes and the bound of one forward pass under every mask, weighted and summed.

    A query or key part needed by several ranks of a foreign node crosses the link once and is
    passed on inside; their partial outputs are summed there and cross once.

    Returns ``compute_balance``, ``token_balance``, ``load_balance`` (busiest rank over mean, 1 when
    there is nothing; the load is the seconds of attention and linear layers at full rate),
    ``inter_node_bytes``, ``intra_node_bytes``, ``max_rank_recv_bytes`` and ``bound_seconds`` (see
    :func:`dcp.cost.bound_seconds`).
    """
    blocks, owner, num_ranks = placement.blocks, placement.owner, cluster.num_ranks
    spec, groups, kv_groups = blocks.spec, blocks.num_head_groups, blocks.num_kv_groups
    held = np.bincount(owner, weights=blocks.length, minlength=num_ranks)
    load, recv, inter, total = np.zeros(num_ranks), np.zeros(num_ranks), 0.0, 0.0
    for name, tiles in blocks.masks.items():
        weight, rank = blocks.batch.weights[name], placement.rank[name]
        group = np.arange(groups)
        load += weight * np.bincount(
            rank, weights=np.repeat(tiles.area / groups, groups), minlength=num_ranks
        )
        query = (tiles.q[:, None] * groups + group).ravel()
        key = (tiles.k[:, None] * kv_groups + group * kv_groups // groups).ravel()
        for piece, parts, into, out in (
            (query, groups, spec.q_token_bytes, spec.out_token_bytes),
            (key, kv_groups, spec.kv_token_bytes, 0),
        ):
            piece, user = np.divmod(np.unique(piece * num_ranks + rank), num_ranks)
            home = owner[piece // parts]
            away = home != user
            piece, user, home = piece[away], user[away], home[away]
            size = blocks.length[piece // parts] * (weight / parts)
            recv += np.bincount(user, weights=size * into, minlength=num_ranks)
            recv += np.bincount(home, weights=size * out, minlength=num_ranks)
            total += size.sum() * (into + out)
            node = cluster.node_of_rank[user]
            crosses = node != cluster.node_of_rank[home]
            first = np.unique(piece * cluster.num_nodes + node, return_index=True)[1]
            inter += size[first][crosses[first]].sum() * (into + out)
    attention = [attention_seconds(load, spec, cluster, backward=b) for b in (False, True)]
    linear = held * linear_seconds(1.0, spec, cluster) * sum(blocks.batch.weights.values())
    return {
        "load_balance": _balance(sum(attention) + linear),
        "compute_balance": _balance(load),
        "token_balance": _balance(held),
        "inter_node_bytes": inter,
        "intra_node_bytes": total - inter,
        "max_rank_recv_bytes": float(recv.max()),
        "bound_seconds": bound_seconds(
            max_rank_area=load.max(),
            inter_node_bytes=inter,
            max_rank_recv_bytes=recv.max(),
            spec=spec,
            cluster=cluster,
        ),
    }


def _balance(share: np.ndarray) -> float:
    return float(share.max() / share.mean()) if share.any() else 1.0
