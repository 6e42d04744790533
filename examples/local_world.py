"""All ranks of a plan in one process: planned attention equals dense attention.

python examples/local_world.py
"""

import torch

import dcp

seqlens = [700, 300, 24]
batch = dcp.SequenceBatch(seqlens, masks="causal")
spec = dcp.AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=32, dtype="float32")
plan = dcp.plan(batch, spec, dcp.Cluster(num_nodes=1, devices_per_node=4))

q = torch.randn(1024, 8, 32)
k, v = torch.randn(2, 1024, 2, 32)
out = dcp.LocalWorld(plan).attention(q, k, v)

for document in torch.arange(1024).split(seqlens):  # the same, one document at a time
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x[document].transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out[document], dense.transpose(0, 1), rtol=1e-4, atol=1e-5)
print(plan)
