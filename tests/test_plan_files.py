"""Files that are no plan are refused: truncated, damaged, foreign, of another version."""

import json
import math
import struct
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from builders.ffns import ffn, planned
from builders.plan_files import put_together, signed, take_apart
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from tardis_fx import Config, Plan, PlanFileError
from tardis_fx.plan import VERSION
from tardis_fx.tensorfile import read
from tardis_fx.testing.assertions import contents as plan_contents


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
    """The file with its safetensors header changed, and the digest that belongs to it."""
    header, data = take_apart(path.read_bytes())
    change(header)
    path.write_bytes(signed(put_together(header, data)))
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


@settings(max_examples=examples(60))
@given(data=st.data())
def test_a_plan_truncated_at_any_byte_is_refused(data: st.DataObject, folder: Path) -> None:
    path = folder / "truncated"
    path.write_bytes(whole()[: data.draw(st.integers(0, len(whole()) - 1))])
    fails(path, "truncated")


@settings(max_examples=examples(300))
@given(data=st.data())
def test_a_damaged_byte_anywhere_is_refused(data: st.DataObject, folder: Path) -> None:
    """Whatever byte is changed to whatever, unless the header says the same in other words."""
    path = folder / "damaged"
    contents = bytearray(whole())
    position = data.draw(st.integers(0, len(contents) - 1))
    contents[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(contents)
    try:
        found = Plan.load(path)
    except PlanFileError as error:
        assert str(path) in str(error)
    else:
        path.write_bytes(whole())
        assert plan_contents(found) == plan_contents(Plan.load(path))


@settings(max_examples=examples(100))
@given(data=st.data())
def test_bytes_at_the_end_or_in_between_are_refused(data: st.DataObject, folder: Path) -> None:
    path, content = folder / "longer", whole()
    position = data.draw(st.sampled_from([0, 8, len(content)]) | st.integers(0, len(content)))
    path.write_bytes(content[:position] + data.draw(st.binary(min_size=1, max_size=9)) + content[position:])
    fails(path)


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


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"a": found}
    return found


def with_field(path: Path, field: str, value: object) -> Path:
    """The file with a field of its entry changed."""
    return with_content(path, lambda c: c["sites"][0].update({field: value}))


#: Values of fields of a site that none can have.
WRONG: dict[str, list[Any]] = {
    "fingerprint": [None, "no hash", 3, ["a"]],
    "name": [None, 3, "\ud800"],
    "kind": ["dense", None, []],
    "activation": [1, ["gelu"]],
    "dtype": [None, 32],
    "shapes": [[[0, 1]], [[-1]], [[1.0]], [["1"]], [[10**30]], "shapes", {}, [[True]]],
    "dense_bytes": [-1, 1.5, None, 10**400, True],
    "method": [3, ["paper"], None],
    "reason": [3, "a rewritten site has none"],
    "stored_bytes": [-1, "1", 10**30],
    "touched_bytes": [-1.0, float("nan"), float("inf"), 10**400, "1"],
    "outlier_rate": [-0.1, float("nan"), None],
    "error": [-1, float("nan"), "small"],
    "settings": [
        None,
        [],
        "settings",
        {"share": float("nan")},
        {"share": 10**400},
        nested(100),
        {"a": "\udfff"},
    ],
}

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
    "version is a huge number": lambda p: with_header(p, lambda h: h["__metadata__"].update(version="9" * 5000)),
    "plan is nested deeply": lambda p: with_header(p, lambda h: h["__metadata__"].update(plan="[" * 10**6)),
    "sites is a string": lambda p: with_content(p, lambda c: c.update(sites="sites")),
    "a tensor of a site's other number": lambda p: with_header(p, lambda h: h.update({"00.a": h.pop("0.neurons")})),
    "a tensor that two names claim": lambda p: with_content(p, lambda c: c.update(same={"0.neurons": "0.guard"})),
    "a tensor that is another's and missing": lambda p: with_content(p, lambda c: c.update(same={"0.a": "0.b"})),
    "a divergence that is no number": lambda p: with_content(p, lambda c: c.update(kl="0.1")),
    "a divergence that is not finite": lambda p: with_content(p, lambda c: c.update(kl=math.inf)),
    "a negative divergence": lambda p: with_content(p, lambda c: c.update(kl=-0.1)),
    "same is a list": lambda p: with_content(p, lambda c: c.update(same=["0.a"])),
    "config has a huge number": lambda p: with_content(p, lambda c: c["config"].update(budget=10**400)),
    **{
        f"{field} is {value!r:.20}": partial(with_field, field=field, value=value)
        for field, values in WRONG.items()
        for value in values
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused_with_path_and_cause(damage: str, saved: Path) -> None:
    assert "not what was saved" not in fails(DAMAGE[damage](saved), "damaged")


def test_a_name_that_stands_twice_in_an_object_is_refused(saved: Path) -> None:
    text = json.dumps({"a": 1})[:-1] + ', "a": 2}'
    fails(with_header(saved, lambda h: h["__metadata__"].update(plan=text)), "damaged", "twice")


# ---- The file beneath the plan


def test_what_is_read_is_what_safetensors_reads(saved: Path) -> None:
    tensors, header = read(saved)
    wanted = safetensors.torch.load_file(saved)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())
    with safetensors.safe_open(saved, framework="pt") as file:
        assert header == file.metadata()


LAYOUTS: dict[str, Any] = {
    "a number": 3,
    "no offsets": {"dtype": "F32", "shape": [1]},
    "an unknown dtype": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]},
    "a dtype that is a list": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    "a negative size": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
    "a size that is true": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    "more bytes than its shape": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
    "a hole before it": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    "its end before its begin": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]},
    "more bytes than the file": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]},
    "nothing in sizes without end": {"dtype": "F32", "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]},
    "too many dimensions": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
    "a byte that is no truth value": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_cannot_be_is_refused(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(put_together({"tensor": LAYOUTS[layout]}, bytes([7] * 8)))
    fails(path, "no safetensors file")


@pytest.mark.parametrize(
    "header", [b"[" * 10**6, b"{\xff}", b'{"a": 1, "a": 1}', b'"text"', b"9" * 10**5], ids=lambda h: repr(h[:9])
)
def test_a_header_that_is_none_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    fails(path, "no safetensors file")


def test_a_plan_of_this_version_with_no_sites_is_a_plan(tmp_path: Path) -> None:
    Plan((), Config()).save(tmp_path / "empty")
    assert Plan.load(tmp_path / "empty").sites == ()
