"""FLOPs of the run-time ops and of rewritten sites, beside those that PyTorch counts in plain arithmetic."""

import pytest
import torch
from builders import coded
from builders.correction import arguments, every_k, mapped
from builders.ffns import batches, config, ffn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tardis_fx.errors import ConfigError
from tardis_fx.measure.flops import prefill_share
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.planning import plan_for
from tardis_fx.runtime import coded_reference, flops, ops, reference  # noqa: F401 - flops registers the formulas
from tardis_fx.runtime.cpu.coded_layout import prepare


@every_k
@pytest.mark.parametrize("always", [0, 9, 100])
@pytest.mark.parametrize("fold_bits", [16, 4])
def test_the_op_counts_what_the_reference_computes(always: int, fold_bits: int, k: int) -> None:
    op = arguments(k=k, shape=(40,), d=16, d_out=12, h=48, always=always, fold_bits=fold_bits)
    with FlopCounterMode(display=False) as expected:
        reference.correct(op)
    with FlopCounterMode(display=False) as counter:
        torch.ops.tardis.correct(*op)
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as most:
        torch.ops.tardis.correct(*mapped(mode.from_tensor, op))
    fold = 0 if op.fold is None else 16 * 12
    assert most.get_total_flops() == 2 * 40 * (len(op.neurons) * (2 * k * 16 + 12) + fold)


@every_k
@pytest.mark.parametrize("fold", [False, True])
def test_the_op_in_codes_counts_what_the_reference_computes(fold: bool, k: int) -> None:
    call = coded.arguments(k=k, shape=(40,), d=16, d_out=12, listed=30, fold=fold, thresholds="none")
    with FlopCounterMode(display=False) as expected:
        coded_reference.coded_ffn(call)
    with FlopCounterMode(display=False) as counter:
        coded.run(call)
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    site = prepare(call)
    with FakeTensorMode() as mode, FlopCounterMode(display=False), pytest.raises(ConfigError, match="FakeTensorMode"):
        torch.ops.tardis.coded_ffn(mode.from_tensor(call.x), mode.from_tensor(site), 12)


def test_every_op_has_a_formula_for_none_would_count_as_nothing() -> None:
    assert {"tardis::correct", "tardis::coded_ffn", "tardis::dequantise"} <= ops._LIBRARY._op_defs
    for name in ops._LIBRARY._op_defs:
        assert getattr(torch.ops.tardis, name.removeprefix("tardis::")) in flop_registry, name


@pytest.mark.parametrize(("budget", "fold_bits", "row_bits"), [(0.4, 16, 16), (0.1, 4, 4)])
def test_the_share_of_a_plan_is_fold_and_predictor_and_listed_rows(
    budget: float, fold_bits: int, row_bits: int
) -> None:
    observation = BatchObservation(ffn(64, 256), batches(d=64), progress=False)
    plan = plan_for(observation, config(budget=budget, fold_bits=fold_bits, row_bits=row_bits))
    tensors = plan.rewritten[0].tensors
    listed, guarded = len(tensors["neurons"]), len(tensors["codes"])
    assert guarded > 0
    assert prefill_share(plan, observation) == pytest.approx((64 + guarded + 2 * listed) / (2 * 256))
