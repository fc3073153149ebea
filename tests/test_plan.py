import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from builders.ffns import ffn, planned
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx import Config, ConfigError, Plan, PlanFileError
from tardis_fx.plan import SitePlan, resolve
from tardis_fx.testing import assert_plan_roundtrip
from tardis_fx.testing.assertions import contents

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
sizes = st.integers(0, 2**53)
finite = st.floats(0, allow_infinity=False)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype and shape, NaN payloads included."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).view(shape)
    size = count * dtype.itemsize
    bits = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    tensor = bits.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


site_plans = st.builds(
    SitePlan,
    fingerprint=st.from_regex("[0-9a-f]{1,32}", fullmatch=True),
    name=st.text(),
    kind=st.sampled_from(["plain", "gated"]),
    activation=st.none() | st.text(),
    dtype=st.sampled_from([str(dtype) for dtype in DTYPES]),
    shapes=st.lists(st.lists(st.integers(1, 2**53), max_size=3).map(tuple), max_size=4).map(tuple),
    dense_bytes=sizes,
    method=st.text(),
    stored_bytes=sizes,
    touched_bytes=finite,
    outlier_rate=st.floats(0, 1),
    error=st.floats(0),
    settings=st.dictionaries(st.text(), json_values, max_size=3),
    tensors=st.dictionaries(st.text(), tensors(), max_size=4),
)
sites = site_plans | st.builds(lambda site, reason: site.kept(reason), site_plans, st.text())
configs = st.builds(
    Config,
    budget=st.floats(0, 1, exclude_min=True),
    method=st.text(st.characters(exclude_characters="+"), min_size=1),
    prefill=st.sampled_from(["original", "rewritten"]),
    options=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3),
    sequential=st.booleans(),
    progress=st.booleans(),
)
plans = st.builds(Plan, st.lists(sites, max_size=3).map(tuple), configs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(ffn())


@pytest.fixture
def saved(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "model.tardis.safetensors"
    plan.save(path)
    return path


# ---- What is written is read


@settings(max_examples=examples(100))
@given(plan=plans)
def test_a_plan_round_trips_bit_for_bit_through_its_file(plan: Plan) -> None:
    assert_plan_roundtrip(plan)


def test_a_calibrated_plan_round_trips_bit_for_bit(plan: Plan, saved: Path) -> None:
    assert contents(Plan.load(saved)) == contents(plan)
    assert contents(Plan.load(str(saved))) == contents(plan)


def test_nothing_but_the_plan_is_left_in_the_folder(saved: Path, plan: Plan) -> None:
    plan.save(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_saved_file_is_as_readable_as_any_other(saved: Path) -> None:
    other = saved.with_name("other")
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode


def test_tensors_that_share_memory_are_saved(plan: Plan, folder: Path) -> None:
    whole = torch.arange(8.0)
    site = SitePlan(**vars(plan.sites[0]) | {"tensors": {"a": whole[:4], "b": whole}})
    Plan((site,), plan.config).save(folder / "shared")
    assert torch.equal(Plan.load(folder / "shared").rewritten[0].tensors["b"], whole)


@settings(max_examples=examples(50))
@given(plan=plans)
def test_the_touched_fraction_counts_refused_sites_in_full(plan: Plan) -> None:
    dense = sum(site.dense_bytes for site in plan.sites)
    refused = [site.kept("for a test") for site in plan.sites]
    assert Plan(tuple(refused), plan.config).touched_fraction == (1 if dense else 0)


def test_find_gives_the_entry_of_the_weights(plan: Plan) -> None:
    assert plan.find(plan.sites[0].fingerprint) is plan.sites[0]
    assert plan.find("other") is None


def test_a_plan_describes_itself_in_one_line(plan: Plan) -> None:
    text = str(plan)
    assert "\n" not in text
    assert "1 guarded_fold" in text
    assert f"{plan.touched_fraction:.1%}" in text


def test_plans_can_be_compared_and_hashed(plan: Plan, saved: Path) -> None:
    """Dynamo compares the options of two compiled models."""
    loaded = Plan.load(saved)
    assert isinstance(plan == loaded, bool)
    assert isinstance(plan.sites[0] == loaded.sites[0], bool)
    assert plan == plan
    assert len({plan, loaded}) in (1, 2)


# ---- Writes that fail


class Interrupted(BaseException):
    """As a user's ctrl-c."""


def _half_written(tensors: dict[str, Tensor], path: str, **kwargs: Any) -> None:
    safetensors.torch.save_file(tensors, path, **kwargs)
    size = Path(path).stat().st_size
    with Path(path).open("rb+") as file:
        file.truncate(size // 2)
    raise OSError(28, "No space left on device")


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


FAILURES: dict[str, tuple[str, Callable[..., Any], type[BaseException]]] = {
    "the disk is full half-way": ("save_file", _half_written, PlanFileError),
    "safetensors fails": ("save_file", _raising(safetensors.SafetensorError("no")), PlanFileError),
    "it cannot be flushed": ("os.fsync", _raising(OSError("no")), PlanFileError),
    "it cannot be renamed": ("os.replace", _raising(OSError("no")), PlanFileError),
    "the user interrupts the writing": ("save_file", _raising(Interrupted()), Interrupted),
    "the user interrupts the renaming": ("os.replace", _raising(Interrupted()), Interrupted),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_write_leaves_what_was_there(
    failure: str, old: bool, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan"
    if old:
        path.write_bytes(b"what was there")
    name, function, error = FAILURES[failure]
    with monkeypatch.context() as patch:
        patch.setattr(f"tardis_fx.tensorfile.{name}", function)
        with pytest.raises(error) as raised:
            plan.save(path)
    if error is PlanFileError:
        assert str(path) in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["plan"] * old
    assert not old or path.read_bytes() == b"what was there"


def test_the_file_is_flushed_before_it_gets_its_name(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(f"tardis_fx.tensorfile.os.{name}", noted(name, getattr(os, name)))
    plan.save(tmp_path / "plan")
    assert calls == ["fsync", "replace", "fsync"], "the folder is flushed last"


@pytest.mark.parametrize("name", ["missing/plan", "a file/plan", "."])
def test_a_path_that_cannot_be_written_is_named(name: str, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    path = tmp_path / name
    with pytest.raises(PlanFileError) as raised:
        plan.save(path)
    assert str(path) in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


def test_settings_that_no_file_can_hold_leave_no_file(plan: Plan, tmp_path: Path) -> None:
    site = SitePlan(**vars(plan.sites[0]) | {"settings": {"function": len}})
    with pytest.raises(PlanFileError):
        Plan((site,), plan.config).save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["fingerprint", "shapes", "touched_bytes", "settings"])
def test_what_would_not_be_read_again_is_not_written(field: str, plan: Plan, tmp_path: Path) -> None:
    wrong = {"fingerprint": "no hash", "shapes": ((-1,),), "touched_bytes": -1.0, "settings": {"share": float("nan")}}
    site = SitePlan(**vars(plan.sites[0]) | {field: wrong[field]})
    with pytest.raises(PlanFileError, match=field):
        Plan((site,), plan.config).save(tmp_path / "plan")


# ---- Files that are replaced


def test_a_replaced_file_keeps_its_mode(saved: Path, plan: Plan) -> None:
    saved.chmod(0o640)
    plan.save(saved)
    assert saved.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("there", [True, False], ids=["of a file", "of nothing"])
def test_the_target_of_a_link_is_replaced_and_the_link_stays(there: bool, plan: Plan, tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"what was there")
    link.symlink_to(Path("folder", "target"))
    plan.save(link)
    assert link.is_symlink()
    assert contents(Plan.load(target)) == contents(plan)
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_a_name_as_long_as_a_file_system_allows_is_written(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / ("p" * 255)
    plan.save(path)
    assert contents(Plan.load(path)) == contents(plan)


def test_what_becomes_of_the_file_does_not_change_a_loaded_plan(saved: Path, plan: Plan) -> None:
    loaded = Plan.load(saved)
    with saved.open("rb+") as file:
        file.write(bytes(saved.stat().st_size))
    assert contents(loaded) == contents(plan)
    os.truncate(saved, 0)
    assert contents(loaded) == contents(plan)


# ---- Plans given by path


def test_a_path_is_read_once_until_it_is_written_again(saved: Path, plan: Plan) -> None:
    first = resolve(saved)
    assert resolve(str(saved)) is first
    Plan((), plan.config).save(saved)
    os.utime(saved, ns=(1, saved.stat().st_mtime_ns + 1))
    assert resolve(saved).sites == ()
    assert resolve(plan) is plan


def test_a_file_whose_times_were_set_back_is_read_again(
    saved: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written over within one tick of the clock, say: the digest in the header tells the two apart."""
    first, times = resolve(saved), saved.stat()
    monkeypatch.setattr("pathlib.Path.stat", lambda *_, **__: times)  # what no clock would show
    other = SitePlan(
        **vars(plan.rewritten[0]) | {"tensors": {n: t.clone() for n, t in plan.rewritten[0].tensors.items()}}
    )
    other.tensors["folded_bias"].add_(1)
    Plan((other,), plan.config).save(saved)
    again = resolve(saved)
    assert again is not first
    assert contents(again) == contents(Plan((other,), plan.config))


def test_a_served_file_that_was_overwritten_is_refused(saved: Path) -> None:
    resolve(saved)
    contents = bytearray(saved.read_bytes())
    contents[-1] ^= 1
    saved.write_bytes(contents)
    with pytest.raises(PlanFileError, match="damaged"):
        resolve(saved)


@pytest.mark.parametrize("path", ["a\0b", "pipe"])
def test_a_path_of_no_regular_file_is_refused(path: str, tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    for read in (resolve, Plan.load):
        with pytest.raises(PlanFileError):
            read(str(tmp_path / path))


def test_what_is_neither_plan_nor_path_is_refused() -> None:
    given: list[Any] = [None, 3, {"sites": []}, b"path"]
    for wrong in given:
        with pytest.raises(ConfigError, match="tardis_fx.Plan or the path"):
            resolve(wrong)


def test_a_path_that_is_too_long_is_a_missing_file() -> None:
    with pytest.raises(PlanFileError):
        resolve("a" * 5000)
