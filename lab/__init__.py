"""The laboratory, ``python -m lab`` from a checkout: what proves the library.

planner  published  dynamic           plans beside recorded and published ones
peers  torchtitan                     other projects' plans
testbed  testbed_rank  fleet          nodes out of network namespaces, ranks on shaped links
attention  train  simulate  soak      what real ranks take, on the testbed
emulated_*  emulate                   a cluster's ranks and links in stretched time, kernels asleep
learn  learn_rank                     wrong rates and slow ranks, and what is learnt of them
inference*  selectors                 conversations, and whether keys or queries should travel
data_centric  video_cost              data-centric parallelism beside its alternatives
paper/                                the SOSP'25 experiments: cases, and rows of what was found
figures/                              the paper's figures, drawn from rows alone
docs/                                 the pictures and tables of docs/
data/                                 reference batches, recorded and published numbers
"""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
