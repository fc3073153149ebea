"""Models under comparison: the text that calibrates each, and how its rewritten forms are judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812

from tardis_fx.demo.model import FOLDER, DemoModel, cut, load
from tardis_fx.digest import digest
from tardis_fx.errors import BenchError
from tardis_fx.measure.decoding import Decoder
from tardis_fx.measure.quality import DenseReference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from tardis_fx.compare.cases import RewrittenModel
    from tardis_fx.observation.observe import Batch

#: Windows of text, and most tokens of a window: 16,384 tokens calibrate, and quality is measured on as many others.
WINDOWS, LENGTH = 64, 256
#: Tokens of the prompt, and tokens that follow, when decoding is timed.
PROMPT, NEW_TOKENS = 64, 65


@dataclass(frozen=True)
class Metric:
    """A measure of quality.

    Attributes:
        name: key in what :meth:`Subject.evaluate` returns.
        heading: of its column.
        form: format specification.
    """

    name: str
    heading: str
    form: str


class Subject(ABC):
    """A model under comparison.

    Attributes:
        name: for titles.
        model: the dense one, in eval mode; what is compared are rewritten forms of it.
    """

    #: Columns of the table.
    metrics: ClassVar[tuple[Metric, ...]]
    #: The metric on the plot's logarithmic axis, its label, what it is multiplied by, and the least value shown.
    plotted: ClassVar[tuple[str, str, float, float]]

    def __init__(self, name: str, model: nn.Module) -> None:
        """Names a model."""
        self.name, self.model = name, model

    @cached_property
    def identity(self) -> str:
        """Hash of the weights and of the text that is measured on."""
        return digest(dict(self.model.state_dict()), self.text())

    @abstractmethod
    def text(self) -> Sequence[Batch]:
        """What is measured on, batch by batch."""

    @abstractmethod
    def calibration(self, seed: int) -> Sequence[Batch]:
        """The calibration batches that a seed chooses."""

    @abstractmethod
    def evaluate(self, run: Callable[..., Any]) -> dict[str, float]:
        """All metrics of a rewritten form of the model."""

    @abstractmethod
    def call(self, run: Callable[..., Any], batch: Batch) -> Any:
        """The model's outputs for one batch."""

    def decoder(self, rewritten: RewrittenModel) -> Callable[[], float]:
        """What decodes with a rewritten form, compiled by Inductor, and returns seconds per token.

        Raises:
            BenchError: the model does not decode.
        """
        raise BenchError(f"{self.name} does not decode: leave out --decode")


class LanguageModel(Subject):
    """A causal language model, judged by its next tokens."""

    metrics: ClassVar = (
        Metric("perplexity", "perplexity", ".3f"),
        Metric("rise", "rise", "+.2%"),
        Metric("agreement", "next token as dense", ".1%"),
        Metric("kl", "KL to dense, nats", ".4f"),
    )
    plotted: ClassVar = ("rise", "perplexity rise, %", 100.0, 0.01)

    def __init__(self, name: str, demo: DemoModel, calibration: Tensor, test: Tensor, windows: int = WINDOWS) -> None:
        """Cuts the text.

        Args:
            name: for titles.
            demo: model, tokenizer and context.
            calibration: token ids that windows are calibrated on, [length].
            test: token ids that windows are measured on, [length]; spread evenly, whatever the seed.
            windows: of each.

        Raises:
            BenchError: a text is shorter than a window.
        """
        super().__init__(name, demo.model)
        self._context, self._calibration, self._windows = demo.context, calibration, windows
        self._length = min(LENGTH, demo.context)
        if (least := min(len(calibration), len(test))) < self._length:
            raise BenchError(f"{least} tokens of text are less than one window of {self._length}: give more text")
        self._text = cut(test, windows, self._length)

    @classmethod
    def from_folder(cls, model: str, dtype: str, file: Path | None = None, windows: int = WINDOWS) -> LanguageModel:
        """Loads a model, to be judged on the standard library's splits or on a file.

        Args:
            model: "demo", or a folder.
            dtype: that the model is cast to.
            file: its first half calibrates, quality is measured on its second half.
            windows: of each.

        Raises:
            TardisError: the folder holds no model, the file cannot be read, or it is too short.
        """
        demo = load(FOLDER if model == "demo" else Path(model))
        demo.model.to(getattr(torch, dtype))
        name = f"{Path(model).name}, {dtype}"
        if file is None:
            return cls(name, demo, demo.tokens("calibration"), demo.tokens("test"), windows)
        ids = demo.read(file)
        return cls(name, demo, ids[: len(ids) // 2], ids[len(ids) // 2 :], windows)

    def text(self) -> Sequence[Tensor]:
        """Windows spread evenly over the test text, eight at a time, [8, length]."""
        return list(self._text.split(8))

    def calibration(self, seed: int) -> Sequence[Tensor]:
        """Windows of the calibration text, eight at a time, [8, length]; see :func:`tardis_fx.demo.model.cut`."""
        return list(cut(self._calibration, self._windows, self._length, seed).split(8))

    def call(self, run: Callable[..., Any], batch: Batch) -> Tensor:
        """Logits, [windows, length, vocabulary]."""
        logits: Tensor = run(batch, use_cache=False).logits
        return logits

    @cached_property
    def _reference(self) -> DenseReference:
        return DenseReference(self.model, self._text)

    def evaluate(self, run: Callable[..., Any]) -> dict[str, float]:
        """Fields of :class:`tardis_fx.measure.quality.Quality`."""
        return asdict(self._reference.quality(run))

    def decoder(self, rewritten: RewrittenModel) -> Callable[[], float]:
        """Batch 1, static cache, a prompt from the test text."""
        decoder = Decoder(rewritten.model, self._context, **rewritten.options)
        prompt = self._text[0, :PROMPT]
        return lambda: decoder.continue_text(prompt, min(NEW_TOKENS, self._context - len(prompt)))[1]


class Encoder(Subject):
    """A model of texts as vectors, judged by where the vectors point."""

    metrics: ClassVar = (
        Metric("cosine", "mean cosine to dense", ".4f"),
        Metric("neighbours", "nearest neighbour as dense", ".1%"),
    )
    plotted: ClassVar = ("distance", "1 - mean cosine to the dense embedding", 1.0, 1e-4)

    def __init__(
        self,
        name: str,
        model: nn.Module,
        calibration: Callable[[int], Sequence[Mapping[str, Tensor]]],
        text: Sequence[Mapping[str, Tensor]],
        embed: Callable[[Callable[..., Any], Mapping[str, Tensor]], Tensor],
    ) -> None:
        """Takes the model and its texts.

        Args:
            name: for titles.
            model: in eval mode.
            calibration: batches by seed.
            text: batches that are measured on.
            embed: a model's normalised embeddings of a batch, [texts, d].
        """
        super().__init__(name, model)
        self._calibration, self._text, self._embed = calibration, text, embed

    def text(self) -> Sequence[Mapping[str, Tensor]]:
        """The batches that are measured on."""
        return self._text

    def calibration(self, seed: int) -> Sequence[Mapping[str, Tensor]]:
        """The batches that a seed chooses."""
        return self._calibration(seed)

    def call(self, run: Callable[..., Any], batch: Any) -> Tensor:
        """Embeddings, [texts, d], float32."""
        return self._embed(run, batch).float()

    @torch.no_grad()
    def _embeddings(self, run: Callable[..., Any]) -> Tensor:
        return F.normalize(torch.cat([self.call(run, batch) for batch in self._text]), dim=-1)

    @cached_property
    def _dense(self) -> Tensor:
        return self._embeddings(self.model)

    def evaluate(self, run: Callable[..., Any]) -> dict[str, float]:
        """Mean cosine to the dense embedding, and the share of texts whose nearest other text is the same."""
        found = self._embeddings(run)
        cosine = float((found * self._dense).sum(1).double().mean())
        same = float((_nearest(found) == _nearest(self._dense)).double().mean())
        return {"cosine": cosine, "distance": 1 - cosine, "neighbours": same}


def _nearest(embeddings: Tensor) -> Tensor:
    """The nearest other text of each, [texts]."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1)
