"""FLOPs of the run-time ops and of rewritten sites, beside those that PyTorch counts in plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from builders import gated_correction
from builders.ffns import batches, config, ffn, oracle
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tardis_fx.measure.flops import prefill_share
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.partial_linear import _PER_NEURON, PartialLinear
from tardis_fx.planning import plan_for
from tardis_fx.runtime import flops, ops, reference, reference_gated  # noqa: F401 - flops registers the formulas


@pytest.mark.parametrize(("guarded", "exact"), [(0, 0), (20, 6), (0, 9), (32, 0)])
def test_the_op_counts_what_the_reference_computes(guarded: int, exact: int) -> None:
    o = oracle(16, 32, 40, d_out=12)
    c = PartialLinear().constants(o.plan(range(guarded), range(guarded, guarded + exact)), o.weights)
    given = (c["folded_bias"].expand(40, 12), o.x, c["up"], c.get("up_bias"), c["w2t"], c["counts"])
    given += (*(c[name] for name in _PER_NEURON), 8, o.activation)
    with FlopCounterMode(display=False) as expected:
        reference.correct(*given)
    with FlopCounterMode(display=False) as found:
        torch.ops.tardis.correct(*given)
    assert found.get_total_flops() == expected.get_total_flops()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as most:
        torch.ops.tardis.correct(*(mode.from_tensor(g) if isinstance(g, torch.Tensor) else g for g in given))
    assert most.get_total_flops() == 2 * 40 * 32 * (16 + 16 + 12)


@pytest.mark.parametrize(("fold_bits", "row_bits"), [(16, 16), (4, 16)])
def test_the_op_of_gated_sites_counts_what_its_reference_computes(fold_bits: int, row_bits: int) -> None:
    given = gated_correction.arguments(shape=(40,), always=9, fold_bits=fold_bits, row_bits=row_bits)
    with FlopCounterMode(display=False) as expected:
        reference_gated.correct(**given)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as found:
        torch.ops.tardis.correct_gated(**given)
    assert found.get_total_flops() == expected.get_total_flops() > 0


def test_every_op_has_a_formula_for_none_would_count_as_nothing() -> None:
    assert {"tardis::correct", "tardis::correct_gated", "tardis::dequantise"} <= ops._LIBRARY._op_defs
    for name in ops._LIBRARY._op_defs:
        assert getattr(torch.ops.tardis, name.removeprefix("tardis::")) in flop_registry, name


@pytest.mark.parametrize(("budget", "fold_bits", "row_bits"), [(0.4, 16, 16), (0.1, 4, 4)])
def test_the_share_of_a_plan_is_fold_and_predictor_and_listed_rows(
    budget: float, fold_bits: int, row_bits: int
) -> None:
    observation = BatchObservation(ffn(64, 256), batches(d=64), progress=False)
    plan = plan_for(observation, config(budget=budget, fold_bits=fold_bits, row_bits=row_bits))
    tensors = plan.sites[0].tensors
    listed, guarded = len(tensors["neurons"]), len(tensors["lower"])
    assert guarded > 0
    assert prefill_share(plan, observation) == pytest.approx((64 + guarded + 2 * listed) / (2 * 256))
