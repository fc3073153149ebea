"""Weight-only quantisation: rounding to nearest, and GPTQ, also in rotated bases."""

from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
import torch
from builders.ffns import batches, config, ffn, inputs
from torch import fx

from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.runtime.tables import row_bytes
from tardis_fx.statistics.check import original
from tardis_fx.testing.assertions import relative_error
from tardis_fx.testing.laws import output
from tardis_fx.testing.observation import SiteObservation
from tardis_fx.testing.strategies import Calibration, Specimen, Weights

D, HIDDEN = 80, 160


def observed(seed: int = 0) -> BatchObservation:
    """An FFN whose inputs are correlated."""
    mixing = inputs(D, D, seed=seed + 50) / 6 + torch.eye(D)
    model = ffn(D, HIDDEN, seed=seed)
    return BatchObservation(model, [batch @ mixing for batch in batches(d=D)], progress=False)


def test_the_budget_picks_the_widest_codes_that_fit() -> None:
    observation = observed()
    found = {}
    for budget in (0.12, 0.16, 0.3, 0.5):
        (plan,) = plan_for(observation, config(method="rtn", budget=budget)).rewritten
        found[plan.settings["bits"]] = plan.error
        assert plan.touched_bytes <= budget * plan.dense_bytes
    assert list(found) == [2, 3, 4, 8]
    assert found[2] > 1.5 * found[3] > 2 * found[4] > 10 * found[8]


@pytest.mark.parametrize(("budget", "group_size"), [(0.11, 128), (0.12, 64)])
def test_groups_are_as_small_as_the_budget_allows(budget: float, group_size: int) -> None:
    (plan,) = plan_for(observed(), config(method="rtn", budget=budget)).rewritten
    assert (plan.settings["bits"], plan.settings["group_size"]) == (2, group_size)
    assert plan.touched_bytes <= budget * plan.dense_bytes
    constants = sum(tensor.nbytes for tensor in plan.tensors.values()) + 4 * (D + HIDDEN)
    assert plan.touched_bytes == constants


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("budget", [0.12, 0.2, 0.3])
def test_gptq_errs_less_than_rounding_where_inputs_are_correlated(seed: int, budget: float) -> None:
    observation = observed(seed)
    gptq, rtn = (plan_for(observation, config(method=m, budget=budget)).sites[0].error for m in ("gptq", "rtn"))
    assert gptq < 0.95 * rtn


# ---- In rotated bases

#: Several blocks of columns, the last ones shorter than 128.
WIDE = 192


@cache
def rotated(
    kind: str, bits: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[SiteObservation, SitePlan]:
    """A site with a plan of so many bits."""
    weights = Weights(WIDE, 240, "silu", bias=bias, kind=kind, dtype=dtype)
    specimen = Specimen(weights, Calibration(2, 600, "correlated"))
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    budget = {2: 0.15, 3: 0.21, 4: 0.28, 8: 0.55}[bits] * (0.5 if dtype == torch.float32 else 1)
    (plan,) = plan_for(observation, config(method="gptq_rotated", budget=budget)).rewritten
    assert plan.settings == {"bits": bits, "d": WIDE, "d_out": WIDE}
    return observation, plan


@pytest.mark.parametrize("kind", ["plain", "gated", "fused"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_in_rotated_bases_codes_a_scale_for_each_neuron_and_signs_are_read(kind: str, bits: int, bias: bool) -> None:
    _, plan = rotated(kind, bits, bias=bias)
    k = 1 if kind == "plain" else 2
    codes = (k + 1) * 240 * row_bytes(WIDE, bits)
    assert sum(tensor.nbytes for tensor in plan.tensors.values()) == codes + 2 * WIDE
    assert plan.touched_bytes == codes + 2 * WIDE + bias * 4 * (240 * k + WIDE)
    assert plan.stored_bytes == plan.dense_bytes + codes + 2 * WIDE


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_rotated_bases_more_bits_err_less(kind: str, dtype: torch.dtype) -> None:
    errors = [rotated(kind, bits, dtype=dtype)[1].error for bits in (2, 3, 4, 8)]
    assert all(1.4 * more < less for less, more in pairwise(errors)), errors
    assert errors[-1] < 0.02


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_an_ffn_in_rotated_bases_dequantises_to_the_ffn_that_it_was(kind: str) -> None:
    observation, plan = rotated(kind, 8)
    (site,), x = observation.sites, Calibration(stream="correlated").batch(50, WIDE, number=9)
    assert relative_error(output(site, plan, x), original(site.weights, "silu", x)) < 0.02


@pytest.mark.parametrize(("kind", "k"), [("plain", 1), ("gated", 2)])
def test_the_graph_rotates_once_each_way_and_dequantises_every_matrix(kind: str, k: int) -> None:
    observation, plan = rotated(kind, 3)
    rewrite, graph = rewrite_named("gptq_rotated"), fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = rewrite.constants(plan, observation.sites[0].weights)
    x, *constants = (fx.Proxy(graph.placeholder(name), tracer) for name in ("x", *names))
    rewrite.forward(x, dict(zip(names, constants, strict=True)), plan)  # type: ignore[arg-type]
    targets = Counter(node.target for node in graph.nodes)
    assert (targets[torch.ops.tardis.rotate], targets[torch.ops.tardis.dequantise_rows]) == (2, k + 1)


@pytest.mark.parametrize("seed", range(2))
def test_where_some_inputs_are_loud_rotated_gptq_errs_less_with_fewer_bytes(seed: int) -> None:
    loud = torch.ones(128)
    loud[[3, 40, 77, 120]] = 10
    observation = BatchObservation(ffn(128, 256, seed=seed), [x * loud for x in batches(d=128)], progress=False)
    gptq, rotated = (
        plan_for(observation, config(method=m, budget=0.12)).rewritten[0] for m in ("gptq", "gptq_rotated")
    )
    assert gptq.settings["bits"] == rotated.settings["bits"] == 3
    assert rotated.error < 0.8 * gptq.error
    assert rotated.touched_bytes < gptq.touched_bytes


@pytest.mark.parametrize(("d", "taken"), [(8, False), (12, True)])
def test_rows_that_codes_do_not_shorten_are_refused(d: int, taken: bool) -> None:
    specimen = Specimen(Weights(d, 32, dtype=torch.bfloat16))
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    (site,) = plan_for(observation, config(method="gptq_rotated", budget=1.0)).sites
    assert (site.method == "gptq_rotated") == taken
    assert taken or site.reason == "a row of 8 weights in 16 bits is no smaller in codes"
