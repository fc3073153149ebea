"""Models under comparison, with their calibration text and the metrics for rewritten forms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tardis_fx.demo.model import LENGTH, NEW_TOKENS, PROMPT, WINDOWS, DemoModel, cut, load
from tardis_fx.digest import digest
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.quality import DenseReference, HeadReference, rewrite_every_token
from tardis_fx.observation.batches import Batch
from tardis_fx.plan import Plan


class Metric(NamedTuple):
    """A measure of quality: its name, the heading of its column, and its format specification."""

    name: str
    heading: str
    form: str


#: Metrics of a model that predicts tokens.
TOKENS = (
    Metric("perplexity", "perplexity", ".3f"),
    Metric("rise", "rise", "+.2%"),
    Metric("agreement", "next token as dense", ".1%"),
    Metric("kl", "KL to dense, nats", ".4f"),
)


@dataclass(frozen=True)
class RewrittenModel:
    """A rewritten form of a model.

    Attributes:
        model: to be run with the plan, or unchanged without one.
        plan: of the rewrite, or None.
        stored: weight bytes kept, as a fraction of those of the dense FFNs.
        touched: weight bytes read per decoded token, likewise.
        flops: of a prefill in which every token takes the rewritten path, likewise.
    """

    model: nn.Module
    plan: Plan | None = None
    stored: float = 1.0
    touched: float = 1.0
    flops: float = 1.0

    def every_token(self) -> Callable[..., Any]:
        """The model with every token on the rewritten path, run eagerly; resets earlier compilations."""
        return self.model if self.plan is None else rewrite_every_token(self.model, self.plan)


@dataclass(frozen=True)
class Subject:
    """A model under comparison.

    Attributes:
        name: for titles.
        model: the dense model, in eval mode, whose rewritten forms are compared.
        calibration: returns the calibration batches of a seed.
        text: batches on which quality is measured.
        call: computes outputs of a form of the model for one batch.
        evaluate: computes all metrics of a form of the model, by name.
        metrics: columns of the table.
        plotted: the metric on the plot's logarithmic axis, its label, a factor, and the smallest value shown.
        decoder: makes a function that decodes with a rewritten form and returns seconds per token; None if the model
            does not decode.
    """

    name: str
    model: nn.Module
    calibration: Callable[[int], Sequence[Batch]]
    text: Sequence[Batch]
    call: Callable[[Callable[..., Any], Any], Tensor]
    evaluate: Callable[[Callable[..., Any]], dict[str, float]]
    metrics: Sequence[Metric]
    plotted: tuple[str, str, float, float]
    decoder: Callable[[RewrittenModel], Callable[[], float]] | None = None

    @cached_property
    def identity(self) -> str:
        """Hash of the weights and of the text on which quality is measured."""
        return digest(dict(self.model.state_dict()), self.text)


def load_subject(model: str, dtype: torch.dtype, file: Path | None = None, windows: int = WINDOWS) -> Subject:
    """Loads a causal language model ("demo", or a folder) and casts it to a dtype.

    It is evaluated on the standard library's splits, or on a file: the first half calibrates, the second is measured.

    Raises:
        TardisError: the folder holds no model, or the file cannot be read or is too short.
    """
    demo = load(model)
    demo.model.to(dtype)
    name = f"{Path(model).name}, {str(dtype).removeprefix('torch.')}"
    if file is None:
        return language_model(name, demo, demo.tokens("calibration"), demo.tokens("test"), windows)
    ids = demo.read(file)
    return language_model(name, demo, ids[: len(ids) // 2], ids[len(ids) // 2 :], windows)


def language_model(
    name: str,
    demo: DemoModel,
    calibration: Int64[Tensor, " length"],
    test: Int64[Tensor, " test_length"],
    windows: int = WINDOWS,
) -> Subject:
    """A causal language model, evaluated by its next tokens; decoding is timed at batch 1 on a prompt of the test text.

    The windows of a seed are cut from the calibration text; those of the test text are spread evenly.

    Raises:
        CalibrationError: the text is shorter than a window.
    """
    length = min(LENGTH, demo.context)
    text = cut(test, windows, length)
    reference = cache(lambda: DenseReference(demo.model, text))
    prompt = text[0, :PROMPT]

    def compiled(rewritten: RewrittenModel) -> Callable[[], float]:
        decoder = Decoder(rewritten.model, demo.context, rewritten.plan)
        return lambda: decoder.continue_text(prompt, min(NEW_TOKENS, demo.context - len(prompt)))[1]

    return Subject(
        name,
        demo.model,
        calibration=lambda seed: list(cut(calibration, windows, length, seed).split(8)),
        text=list(text.split(8)),
        call=lambda run, batch: run(batch, use_cache=False).logits,
        evaluate=lambda run: asdict(reference().quality(run)),
        metrics=TOKENS,
        plotted=("rise", "perplexity rise, %", 100.0, 0.01),
        decoder=compiled,
    )


def token_model(
    name: str,
    model: nn.Module,
    calibration: Callable[[int], Sequence[Batch]],
    text: Sequence[Batch],
    targets: Sequence[Int64[Tensor, "_ _"]],
    outputs: Callable[[Callable[..., Any], Any], Float[Tensor, "batch length d"]],
    head: nn.Module,
) -> Subject:
    """A model of any inputs, evaluated by the tokens that it predicts.

    Args:
        name: for titles.
        model: in eval mode, without its head.
        calibration: returns the batches of a seed.
        text: batches on which quality is measured.
        targets: [batch, length], the next token at each position of each batch, or ``PADDING``, or ``UNPREDICTED``.
        outputs: computes the outputs of a form of the model for a batch.
        head: computes logits from outputs; it is not rewritten.
    """
    reference = cache(lambda: HeadReference(model, text, targets, outputs, head))
    return Subject(
        name,
        model,
        calibration,
        text,
        call=outputs,
        evaluate=lambda run: asdict(reference().quality(run)),
        metrics=TOKENS,
        plotted=("kl", "KL to dense, nats", 1.0, 1e-4),
    )


def encoder(
    name: str,
    model: nn.Module,
    calibration: Callable[[int], Sequence[Mapping[str, Tensor]]],
    text: Sequence[Mapping[str, Tensor]],
    embed: Callable[[Callable[..., Any], Mapping[str, Tensor]], Float[Tensor, "texts d"]],
) -> Subject:
    """A model of text embeddings, evaluated by their direction and their nearest neighbours.

    Args:
        name: for titles.
        model: in eval mode.
        calibration: returns the batches of a seed.
        text: batches on which quality is measured.
        embed: computes a model's normalised embeddings of a batch.
    """

    @torch.no_grad()
    def embeddings(run: Callable[..., Any]) -> Float[Tensor, "texts d"]:
        return F.normalize(torch.cat([embed(run, batch).float() for batch in text]), dim=-1)

    dense = cache(lambda: embeddings(model))

    def evaluate(run: Callable[..., Any]) -> dict[str, float]:
        rewritten = embeddings(run)
        cosine = float((rewritten * dense()).sum(1).double().mean())
        same = float((_nearest(rewritten) == _nearest(dense())).double().mean())
        return {"cosine": cosine, "distance": 1 - cosine, "neighbours": same}

    return Subject(
        name,
        model,
        calibration,
        text,
        call=embed,
        evaluate=evaluate,
        metrics=(
            Metric("cosine", "mean cosine to dense", ".4f"),
            Metric("neighbours", "nearest neighbour as dense", ".1%"),
        ),
        plotted=("distance", "1 - mean cosine to the dense embedding", 1.0, 1e-4),
    )


def _nearest(embeddings: Float[Tensor, "texts d"]) -> Int64[Tensor, " texts"]:
    """Index of the nearest other text for each text."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1)
