"""Measures healing on models that others trained: KL divergence from the dense model before and after.

    python benchmarks/healing.py 0.1 0.125 --gemma --text FILE    budgets, as shares of the bfloat16 FFN bytes
    python benchmarks/healing.py 0.1 0.125 --whisper              the decoder of Whisper tiny.en

Plans are calibrated as in ``benchmarks/quality.py``, but with the models' logits, and healed with ``tardis_fx.heal`` on
more of the calibration text: 200 rows of 128 tokens, or 400 clips. KL divergence is measured on text that was used for
neither, with every token rewritten: 12 rows of 512 tokens, or 64 clips.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

import tardis_fx
from tardis_fx import Config, Plan, TardisError
from tardis_fx.measure.machine import conditions
from tardis_fx.measure.quality import rewrite_every_token
from tardis_fx.measure.tables import markdown
from tardis_fx.observation.batches import Batch
from tardis_fx.statistics.divergence import divergence

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # they load the real models

#: Rows of text to heal on, and their length; clips to heal on, and to measure.
ROWS, LENGTH, CLIPS, TEST_CLIPS = 200, 128, 400, 64


class Subject(NamedTuple):
    """A model with its text."""

    model: nn.Module
    calibration: Sequence[Batch]
    healing: Sequence[Batch]
    test: Sequence[dict[str, Tensor]]


class Decoder(nn.Module):
    """Whisper's decoder with its head; the encoder's output is an input."""

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.proj_out

    def forward(
        self,
        states: Float[Tensor, "batch frames d"],
        input_ids: Int64[Tensor, "batch length"],
        attention_mask: Int64[Tensor, "batch length"],
    ) -> CausalLMOutput:
        """Logits of the next tokens."""
        hidden = self.decoder(input_ids, attention_mask, encoder_hidden_states=states, use_cache=False)
        return CausalLMOutput(logits=self.head(hidden.last_hidden_state))


def whisper() -> Subject:
    """Whisper's decoder, on what the dense model hears in clips."""
    from clips import batches, clips
    from whisper_weights import load

    model, _ = load("tiny.en", torch.bfloat16)

    @torch.no_grad()
    def decoded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        states = model.model.encoder(batch["input_features"]).last_hidden_state
        tokens, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
        return {"states": states, "input_ids": tokens, "attention_mask": mask}

    made = (clips(model, "train", 64, 1), clips(model, "train", CLIPS, 2), clips(model, "test", TEST_CLIPS))
    calibration, healing, test = ([decoded(batch) for batch in batches(model, c)] for c in made)
    return Subject(Decoder(model).eval(), calibration, healing, test)


def gemma(file: Path | None) -> Subject:
    """Gemma 3 270M."""
    from gemma import CALIBRATION, TEST, rows, tokens
    from gemma_weights import load

    model, tokenizer = load(torch.bfloat16)
    calibration, test = tokens(tokenizer, file)
    bos = tokenizer.bos_token_id
    healing = rows(calibration, ROWS, bos, 2)[:, :LENGTH]
    measured = [{"input_ids": row} for row in rows(test, TEST, bos).split(1)]
    return Subject(model, rows(calibration, CALIBRATION, bos, 1).split(4), healing.split(1), measured)


@torch.no_grad()
def kl(subject: Subject, plan: Plan) -> float:
    """Mean KL divergence of the test text's tokens, in nats."""
    run = rewrite_every_token(subject.model, plan)
    total = tokens = 0.0
    for batch in tqdm(subject.test, desc="measuring", unit="batch", leave=False):
        count = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
        total += count * float(divergence(run(**batch), subject.model(**batch), batch))
        tokens += count
    return total / tokens


def main() -> None:
    """Calibrates and heals at each budget, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="+", type=float)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--whisper", action="store_true")
    models.add_argument("--gemma", action="store_true")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for --gemma: half calibrates, half is measured")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    table = []
    try:
        subject = whisper() if options.whisper else gemma(options.text)
        for budget in options.budgets:
            plan = tardis_fx.calibrate(subject.model, subject.calibration, config=Config(budget=budget))
            healed = tardis_fx.heal(subject.model, plan, subject.healing, steps=options.steps)
            before, after = kl(subject, plan), kl(subject, healed)
            table.append(
                {
                    "touched": f"{plan.touched_fraction:.2%}",
                    "touched, healed": f"{healed.touched_fraction:.2%}",
                    "KL to dense, nats": f"{before:.4f}",
                    "KL, healed": f"{after:.4f}",
                    "change": f"{after / before - 1:+.1%}",
                }
            )
    except TardisError as error:
        sys.exit(f"healing: {error}")
    print(markdown(table))
    print(f"\n{options.steps} steps; {conditions()}.")


if __name__ == "__main__":
    main()
