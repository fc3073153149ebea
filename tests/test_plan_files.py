"""Files that are no plan are refused: truncated, damaged, foreign, of another version."""

from __future__ import annotations

import json
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

from tardis_fx import Config, Plan, PlanFileError
from tardis_fx.plan import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.tardis.safetensors"
    path.write_bytes(whole())
    return path


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
