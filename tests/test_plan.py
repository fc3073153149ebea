from __future__ import annotations

import json
import os
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import safetensors.torch
import torch
from builders.ffns import ffn, planned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx import Config, ConfigError, Plan, PlanFileError
from tardis_fx.plan import VERSION, SitePlan, resolve
from tardis_fx.testing import assert_plan_roundtrip
from tardis_fx.testing.assertions import contents

if TYPE_CHECKING:
    from collections.abc import Callable

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
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
sizes = st.integers(0, 2**53)


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
    fingerprint=st.text(),
    name=st.text(),
    kind=st.sampled_from(["plain", "gated"]),
    activation=st.none() | st.text(),
    dtype=st.sampled_from([str(dtype) for dtype in DTYPES]),
    shapes=st.lists(st.lists(sizes, max_size=3).map(tuple), max_size=4).map(tuple),
    dense_bytes=sizes,
    method=st.none() | st.text(),
    reason=st.none() | st.text(),
    stored_bytes=sizes,
    touched_bytes=st.floats(allow_nan=False),
    outlier_rate=st.floats(0, 1),
    error=st.floats(0),
    settings=st.dictionaries(st.text(), json_values, max_size=3),
    tensors=st.dictionaries(st.text(), tensors(), max_size=4),
)
configs = st.builds(
    Config,
    budget=st.floats(0, 1, exclude_min=True),
    method=st.text(st.characters(exclude_characters="+"), min_size=1),
    prefill=st.sampled_from(["original", "rewritten"]),
    predictor_bits=st.integers(1, 8),
    sequential=st.booleans(),
    progress=st.booleans(),
)
plans = st.builds(Plan, st.lists(site_plans, max_size=3).map(tuple), configs)


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


@settings(max_examples=100)
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
    assert torch.equal(Plan.load(folder / "shared").sites[0].tensors["b"], whole)


@settings(max_examples=50)
@given(plan=plans)
def test_the_touched_fraction_counts_refused_sites_in_full(plan: Plan) -> None:
    dense = sum(site.dense_bytes for site in plan.sites)
    refused = [SitePlan(**vars(site) | {"method": None}) for site in plan.sites]
    assert Plan(tuple(refused), plan.config).touched_fraction == (1 if dense else 0)


def test_find_gives_the_entry_of_the_weights(plan: Plan) -> None:
    assert plan.find(plan.sites[0].fingerprint) is plan.sites[0]
    assert plan.find("other") is None


def test_a_plan_describes_itself_in_one_line(plan: Plan) -> None:
    text = str(plan)
    assert "\n" not in text
    assert "1 partial_linear" in text
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
    assert calls[:2] == ["fsync", "replace"]


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
    with pytest.raises((PlanFileError, TypeError)):
        Plan((site,), plan.config).save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


# ---- Files that are no plan


def fails(path: Path, *causes: str) -> str:
    with pytest.raises(PlanFileError) as raised:
        Plan.load(path)
    message = str(raised.value)
    assert str(path) in message
    assert all(cause in message for cause in causes)
    return message


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with its safetensors header changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def with_content(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with its plan changed."""

    def edit(header: dict[str, Any]) -> None:
        content = json.loads(header["__metadata__"]["plan"])
        changed = change(content)
        header["__metadata__"]["plan"] = json.dumps(content if changed is None else changed)

    return with_header(path, edit)


@cache
def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        planned(ffn()).save(Path(folder, "plan"))
        return Path(folder, "plan").read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_a_plan_truncated_at_any_byte_is_refused(data: st.DataObject, folder: Path) -> None:
    path = folder / "truncated"
    path.write_bytes(whole()[: data.draw(st.integers(0, len(whole()) - 1))])
    fails(path, "truncated")


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_byte_is_refused_or_harmless(data: st.DataObject, folder: Path) -> None:
    """Wherever the damage is, the user sees a plan or a PlanFileError with the path."""
    path = folder / "damaged"
    contents = bytearray(whole())
    (length,) = struct.unpack("<Q", contents[:8])
    contents[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents)
    try:
        Plan.load(path)
    except PlanFileError as error:
        assert str(path) in str(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no plan file" in fails(tmp_path / "missing")


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    fails(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\3\4" * 100, b"{}", b"\xff" * 1000, struct.pack("<Q", 2) + b"[]"], ids=repr
)
def test_another_kind_of_file_is_no_plan(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    fails(path, "no safetensors file")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_no_plan(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    fails(path, "no tardis_fx plan")


def test_a_newer_version_says_to_upgrade(saved: Path) -> None:
    fails(
        with_header(saved, lambda h: h["__metadata__"].update(version=str(VERSION + 1))),
        f"version {VERSION + 1}",
        "upgrade",
    )


def test_an_older_version_says_to_calibrate_again(saved: Path) -> None:
    fails(with_header(saved, lambda h: h["__metadata__"].update(version="1")), "version 1", "calibrate again")


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "version is no number": lambda p: with_header(p, lambda h: h["__metadata__"].update(version="one")),
    "version is missing": lambda p: with_header(p, lambda h: h["__metadata__"].pop("version")),
    "plan is missing": lambda p: with_header(p, lambda h: h["__metadata__"].pop("plan")),
    "plan is no JSON": lambda p: with_header(p, lambda h: h["__metadata__"].update(plan="{'sites': []")),
    "plan is a number": lambda p: with_content(p, lambda c: 3),
    "plan is a list": lambda p: with_content(p, lambda c: [c]),
    "sites are missing": lambda p: with_content(p, lambda c: c.pop("sites") and None),
    "sites is a number": lambda p: with_content(p, lambda c: c.update(sites=1)),
    "a site is a string": lambda p: with_content(p, lambda c: c.update(sites=["site"])),
    "a site lacks a field": lambda p: with_content(p, lambda c: c["sites"][0].pop("name") and None),
    "a site has an unknown field": lambda p: with_content(p, lambda c: c["sites"][0].update(more=1)),
    "a site's shapes are numbers": lambda p: with_content(p, lambda c: c["sites"][0].update(shapes=[1, 2])),
    "a tensor of no site": lambda p: with_content(p, lambda c: c.update(sites=[])),
    "config is missing": lambda p: with_content(p, lambda c: c.pop("config") and None),
    "config is null": lambda p: with_content(p, lambda c: c.update(config=None)),
    "config has an unknown field": lambda p: with_content(p, lambda c: c["config"].update(more=1)),
    "config is out of range": lambda p: with_content(p, lambda c: c["config"].update(budget=-1)),
    "config is of the wrong type": lambda p: with_content(p, lambda c: c["config"].update(prefill=["original"])),
    "a tensor of a negative site": lambda p: with_header(p, lambda h: h.update({"-1.neurons": h.pop("0.neurons")})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused_with_path_and_cause(damage: str, saved: Path) -> None:
    fails(DAMAGE[damage](saved), "damaged")


def test_a_plan_of_this_version_with_no_sites_is_a_plan(tmp_path: Path) -> None:
    Plan((), Config()).save(tmp_path / "empty")
    assert Plan.load(tmp_path / "empty").sites == ()


# ---- Plans given by path


def test_a_path_is_read_once_until_it_is_written_again(saved: Path, plan: Plan) -> None:
    first = resolve(saved)
    assert resolve(str(saved)) is first
    Plan((), plan.config).save(saved)
    os.utime(saved, ns=(1, saved.stat().st_mtime_ns + 1))
    assert resolve(saved).sites == ()
    assert resolve(plan) is plan


def test_what_is_neither_plan_nor_path_is_refused() -> None:
    given: list[Any] = [None, 3, {"sites": []}, b"path"]
    for wrong in given:
        with pytest.raises(ConfigError, match="tardis_fx.Plan or the path"):
            resolve(wrong)


def test_a_path_that_is_too_long_is_a_missing_file() -> None:
    with pytest.raises(PlanFileError):
        resolve("a" * 5000)
