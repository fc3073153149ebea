"""Cuts a plan's entry for one tensor-parallel rank, which holds some of the neurons.

Fold and corrections are sums over neurons, and the ranks' outputs are summed. Each rank corrects its own neurons, and
the first rank adds the folded map of all neurons, as vLLM adds biases on the first rank. The other ranks multiply by
zeros instead, so that all ranks run the same graph.
"""

from dataclasses import replace

import torch

from tardis_fx.errors import ServingError
from tardis_fx.plan import SitePlan

#: Rewrites whose tensors are a folded map and one entry per neuron.
SHARDED = ("guarded_fold", "paper")


def shard(entry: SitePlan, rank: int, size: int, hidden: int) -> SitePlan:
    """The entry for one of ``size`` ranks; the outputs of all ranks sum to that of the whole site.

    Rank ``r`` holds the ``r``-th of ``size`` equal runs of the site's ``hidden`` neurons.

    Raises:
        ServingError: the rewrite cannot be sharded.
    """
    if entry.method not in SHARDED:
        raise ServingError(
            f"{entry.name} is rewritten by {entry.method}, which is served by one rank only: use "
            f"--tensor-parallel-size 1, or a plan of {' or '.join(SHARDED)}"
        )
    neurons, guarded = entry.tensors["neurons"].long(), len(entry.tensors["codes"])
    first = rank * (hidden // size)
    in_shard = (neurons >= first) & (neurons < first + hidden // size)
    tensors = {"neurons": (neurons[in_shard] - first).to(entry.tensors["neurons"].dtype)}
    for name, tensor in entry.tensors.items():
        if name.startswith("folded_"):
            tensors[name] = tensor if rank == 0 else torch.zeros_like(tensor)
        elif name != "neurons":
            tensors[name] = tensor[in_shard if len(tensor) == len(neurons) else in_shard[:guarded]]
    return replace(entry, tensors=tensors)
