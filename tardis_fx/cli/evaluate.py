"""The command ``tardis eval``, which measures a plan on text."""

from pathlib import Path
from typing import Annotated

import typer

from tardis_fx.cli.options import FOLDER, Device, StoredDType, Windows, available
from tardis_fx.demo.model import LENGTH, WINDOWS, cut, load
from tardis_fx.measure.quality import compare_once, rewrite_every_token
from tardis_fx.measure.tables import markdown
from tardis_fx.plan import Plan, bits_per_weight


def evaluate(
    model: Annotated[str, typer.Argument(help=FOLDER)],
    plan: Annotated[Path, typer.Argument(help="A file written by `tardis calibrate`.")],
    text: Annotated[Path, typer.Argument(help="A file of text, other than the calibration text.")],
    windows: Windows = WINDOWS,
    dtype: StoredDType = "auto",
    device: Device = "cpu",
) -> None:
    """Compare a causal language model with and without a plan on text, every token on the rewritten path."""
    target, loaded = available(device), Plan.load(plan)
    subject = load(model, dtype)
    ids = cut(subject.read(text), windows, min(LENGTH, subject.context)).to(target)
    dense_model = subject.model.to(target)
    dense, rewritten = compare_once(dense_model, rewrite_every_token(dense_model, loaded), ids)
    dense_bits = bits_per_weight(sum(site.dense_bytes for site in loaded.ffns), loaded.weights)
    rows = [
        {
            "": title,
            "perplexity": f"{quality.perplexity:.3f}",
            "rise": f"{quality.rise:+.2%}",
            "next token as dense": f"{quality.agreement:.1%}",
            "KL to dense, nats": f"{quality.kl:.4f}",
            "bits per FFN weight": f"{bits:.3g}",
            "FFN bytes per token": f"{share:.1%}",
        }
        for title, quality, bits, share in (
            ("dense", dense, dense_bits, 1.0),
            ("plan", rewritten, loaded.touched_bits, loaded.touched_fraction),
        )
    ]
    typer.echo(f"{markdown(rows)}\n\n{ids.numel():,} tokens of {text} in {len(ids)} windows")
