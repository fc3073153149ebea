"""Weights and inputs that are no plain tensors, freed storages, and DDP and FSDP around a model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders.counted import blocks, changing_nothing, counted, fast
from builders.ffns import config, ffn_of, inputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from tardis_fx import CalibrationError, PlanMismatchError, StaleWeightError, calibrate, explain
from tardis_fx.observation.observe import BatchObservation

FEW, MANY = inputs(4, 16, seed=7), inputs(40, 16, seed=8)


@pytest.fixture
def calls() -> Iterator[Callable[[], int]]:
    with torch.no_grad(), counted() as asked:
        yield asked


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_near(output: Tensor, expected: Tensor) -> None:
    if isinstance(expected, TwoTensor):
        assert isinstance(output, TwoTensor)
        output, expected = output.a, expected.a
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


# ---- Weights that are tensor subclasses


def _doubled(model: nn.Sequential) -> str:
    for linear in (ffn_of(model[1]).up, ffn_of(model[1]).down):
        weight = linear.weight.detach()
        linear.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    return "torch's TwoTensor"


def _quantised(model: nn.Sequential) -> str:
    quantization = pytest.importorskip("torchao.quantization")
    first = lambda module, name: isinstance(module, nn.Linear) and name.startswith("1.")  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=first)
    return f"torchao's {type(ffn_of(model[1]).up.weight).__name__}"  # its releases differ


CONVERSIONS = {"two tensors in one": _doubled, "torchao": _quantised}
conversions = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)


@conversions
def test_a_subclass_among_weights_is_refused_by_name_wherever_sites_are_listed(
    convert: Callable[[nn.Module], str], calls: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    model = blocks()
    plan = changing_nothing(model)
    reason = f"its weights are {convert(model)}: a rewrite reads plain tensors only"
    assert [site.reason for site in explain(model, plan, FEW).sites] == ["", reason]
    observed = BatchObservation(model, [FEW], progress=False)
    assert {site.site.reason for site in observed.sites} == {None, reason}
    assert_near(fast(model, plan)(FEW), model(FEW))
    assert calls() == 1
    assert f"ffn is not rewritten: {reason}" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(PlanMismatchError, match=reason):
        fast(model, plan, strict=True)(FEW)
    torch._dynamo.reset()
    assert_near(fast(model, None)(MANY), model(MANY))


@conversions
def test_a_plan_names_subclasses_and_finds_its_entries_again(convert: Callable[[nn.Module], str]) -> None:
    model = blocks()
    name = convert(model)
    plan = calibrate(model, [inputs(512, 16)], config=config(method="magnitude"))
    assert {site.method: site.reason for site in plan.sites} == {
        "magnitude": None,
        None: f"its weights are {name}: a rewrite reads plain tensors only",
    }
    report = explain(model, plan, FEW)
    assert [site.status for site in report.sites] == ["rewritten", "refused"]
    assert report.missing == ()


@conversions
def test_weights_that_become_subclasses_under_a_compiled_model_are_seen(
    convert: Callable[[nn.Module], str], calls: Callable[[], int]
) -> None:
    model = blocks()
    run = fast(model, changing_nothing(model))
    run(FEW)
    convert(model)
    assert_near(run(FEW), model(FEW))
    assert calls() == 2 + 1


class Named(nn.Parameter):
    """A parameter like any other, as libraries define them to hold notes of their own."""


def test_a_parameter_class_without_arithmetic_of_its_own_is_plain(calls: Callable[[], int]) -> None:
    model = blocks()
    plan = changing_nothing(model)
    for block in model:
        up = ffn_of(block).up
        up.weight = Named(up.weight.detach())
    assert_near(fast(model, plan)(FEW), model(FEW))
    assert calls() == 2


def test_inference_tensors_among_weights_are_refused(calls: Callable[[], int]) -> None:
    plan = changing_nothing(blocks())
    with torch.inference_mode():
        model = blocks()
    assert_near(fast(model, plan)(FEW), model(FEW))
    assert calls() == 0
    assert {site.reason for site in explain(model, plan, FEW).sites} == {
        "its weights are inference tensors, whose changes cannot be detected"
    }
    assert len(BatchObservation(model, [FEW], progress=False).sites) == 2


def test_nested_inputs_are_refused_by_name(calls: Callable[[], int]) -> None:
    model = blocks()
    plan = changing_nothing(model)
    x = torch.nested.nested_tensor([inputs(3, 16), inputs(5, 16)], layout=torch.jagged)
    assert_near(fast(model, plan)(x).values(), model(x).values())
    assert_near(fast(model, None)(x).values(), model(x).values())
    assert calls() == 0
    assert {site.reason for site in explain(model, plan, x).sites} == {
        "its inputs are torch's NestedTensor: a rewrite reads plain tensors only"
    }
    assert all(entry.method is None for entry in calibrate(model, [x], config=config()).sites)


# ---- Storages that come and go


def test_a_freed_storage_is_an_error_until_it_is_back(calls: Callable[[], int]) -> None:
    model = blocks()
    run = fast(model, changing_nothing(model))
    run(FEW)
    values = [(parameter, parameter.clone()) for parameter in model.parameters()]
    for parameter, _ in values:
        parameter.untyped_storage().resize_(0)
    with pytest.raises(StaleWeightError, match="the storage of a weight was freed"):
        run(FEW)
    for parameter, value in values:
        parameter.untyped_storage().resize_(value.nbytes)
        parameter.copy_(value)
    assert_near(run(FEW), model(FEW))
    assert calls() == 2 * 2


def test_explaining_and_observing_leave_storages_that_can_be_resized() -> None:
    model = blocks()
    explain(model, changing_nothing(model), FEW)
    BatchObservation(model, [FEW], progress=False)
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)


# ---- Distributed


@pytest.mark.parametrize("inner", ["counting_calls", "inductor"])
@pytest.mark.usefixtures("gloo")
def test_ddp_around_a_compiled_model(inner: str, calls: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    model, x = blocks(2, d=128, hidden=1024), inputs(2, 128)
    run = DistributedDataParallel(fast(model, changing_nothing(model), inner=inner))  # type: ignore[arg-type]
    for _ in range(2):
        assert_near(run(x), model(x))
    assert calls() == (2 * 2 if inner == "counting_calls" else 0)
    ffn_of(model[1]).up.weight.mul_(2)
    with pytest.raises(StaleWeightError):
        run(x)


def _in_parts(model: nn.Module, plan: Any, **options: Any) -> Callable[..., Tensor]:
    return DistributedDataParallel(fast(model, plan, **options), bucket_cap_mb=1)  # type: ignore[arg-type]


@pytest.mark.usefixtures("gloo")
def test_strict_refuses_ddps_parts_and_says_what_to_set(calls: Callable[[], int]) -> None:
    model, x = blocks(3, d=256, hidden=1024), inputs(2, 256)
    plan = changing_nothing(model)
    with pytest.raises(PlanMismatchError, match="optimize_ddp = False"):
        _in_parts(model, plan, strict=True)(x)
    torch._dynamo.reset()
    assert_near(_in_parts(model, plan)(x), model(x))
    torch._dynamo.reset()
    assert_near(_in_parts(model, None)(x), model(x))
    calls()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False):
        assert_near(_in_parts(model, plan, strict=True)(x), model(x))
    assert calls() == 3


@pytest.mark.usefixtures("gloo")
def test_ddps_parts_are_trained_as_they_are() -> None:
    model, x = blocks(3, d=128, hidden=1024), inputs(2, 128)
    run = DistributedDataParallel(fast(model, changing_nothing(model), inner="aot_eager"))  # type: ignore[arg-type]
    output = run(x)
    torch.testing.assert_close(output, model(x))
    output.sum().backward()
    assert ffn_of(model[0]).up.weight.grad is not None


@pytest.mark.parametrize("optimize_ddp", ["ddp_optimizer", False, "python_reducer"])
@pytest.mark.usefixtures("gloo")
def test_ddp_inside_a_compiled_model(optimize_ddp: Any, calls: Callable[[], int]) -> None:
    model, x = blocks(3, d=128, hidden=1024), inputs(2, 128)
    plan = changing_nothing(model)
    wrapped = DistributedDataParallel(model)
    with torch._dynamo.config.patch(optimize_ddp=optimize_ddp):
        assert_near(fast(wrapped, plan)(x), model(x))
        assert {site.status for site in explain(wrapped, plan, x).sites} == {"rewritten"}
        assert len(BatchObservation(wrapped.eval(), [x], progress=False).sites) == 3
    assert calls() == 3


def _sharded(model: nn.Sequential) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place
    return model


@pytest.mark.usefixtures("gloo")
def test_a_model_that_is_sharded_after_its_plan_was_made_is_rewritten(calls: Callable[[], int]) -> None:
    model = blocks()
    plan, expected = changing_nothing(model), model(FEW)
    run = fast(_sharded(model), plan)
    for _ in range(3):
        assert_near(run(FEW), expected)
    assert calls() == 3 * 2


@pytest.mark.usefixtures("gloo")
def test_a_sharded_model_is_not_calibrated_and_says_what_to_do(calls: Callable[[], int]) -> None:
    plan = calibrate(_sharded(blocks()), [MANY], config=config())
    assert {site.reason for site in plan.sites} == {
        "its weights are freed after every forward pass: calibrate before sharding or offloading"
    }


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("gloo")
def test_fsdp_1_runs_as_it_was() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = blocks()
    plan, expected = changing_nothing(model), model(FEW)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(wrapped, plan)(FEW), expected)


@pytest.mark.usefixtures("gloo")
def test_distributed_weights_are_refused_by_name(calls: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    model = blocks()
    plan, expected, mesh = changing_nothing(model), model(FEW), init_device_mesh("cpu", (1,))
    distribute_module(model, mesh)
    x = DTensor.from_local(FEW, mesh)
    assert_near(fast(model, plan)(x).to_local(), expected)
    assert calls() == 0
    assert "its weights are torch's DTensor" in caplog.text


def test_a_model_of_no_contents_is_refused_by_name(calls: Callable[[], int]) -> None:
    model = blocks().to("meta")
    plan = changing_nothing(blocks())
    report = explain(model, plan, FEW.to("meta"))
    assert {site.reason for site in report.sites} == {"its weights are on the meta device: there is nothing to read"}
    with pytest.raises(CalibrationError):
        calibrate(model, [FEW], config=config())
