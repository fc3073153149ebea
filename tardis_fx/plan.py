"""The plan: the rewrite of every site with its tensors, saved as a safetensors file."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError, PlanFileError
from tardis_fx.graph.site import Site
from tardis_fx.planfile import VERSION as VERSION
from tardis_fx.planfile import content_of, header_of
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.tensorfile import read, read_header, write


# Compared by identity: Dynamo compares the options of compiled models, and comparing tensors gives no single bool.
@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A site that a plan knows: :class:`SitePlan` if it is rewritten, :class:`KeptSite` if not.

    Attributes:
        fingerprint: of the site's weights.
        name: module path, for display.
        kind: plain, gated or linear.
        activation: name in the registry, or None.
        dtype: of the weights, as in ``str(torch.float32)``.
        shapes: of the weights, in the order of the fingerprint.
        dense_bytes: weight bytes of the original site.
    """

    fingerprint: str
    name: str
    kind: str
    activation: str | None
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    dense_bytes: int

    @classmethod
    def from_site(cls, site: Site, parameters: Sequence[Tensor], *, identity: str | None = None, **rest: Any) -> Self:
        """Makes an entry for a site and its weights; the fingerprint is computed unless given as ``identity``."""
        return cls(
            fingerprint=fingerprint(parameters, site.function) if identity is None else identity,
            name=site.name,
            kind=site.kind,
            activation=site.activation,
            dtype=str(parameters[0].dtype),
            shapes=tuple(tuple(p.shape) for p in parameters),
            dense_bytes=sum(p.numel() * p.element_size() for p in parameters),
            **rest,
        )

    @property
    def weights(self) -> int:
        """Number of weights, biases included."""
        return sum(map(math.prod, self.shapes))

    def kept(self, reason: str) -> "KeptSite":
        """An entry that leaves the same site unchanged, with the reason."""
        return KeptSite(**{field.name: getattr(self, field.name) for field in fields(Entry)}, reason=reason)


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptSite(Entry):
    """A site that is not rewritten.

    Attributes:
        reason: why it is not rewritten.
    """

    method: ClassVar[None] = None
    error: ClassVar[float] = 0.0
    reason: str

    @property
    def stored_bytes(self) -> int:
        """Weight bytes that the site keeps: all of them."""
        return self.dense_bytes

    @property
    def touched_bytes(self) -> int:
        """Weight bytes that the site reads per decoded token: all of them."""
        return self.dense_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class SitePlan(Entry):
    """The rewrite of one site: method, settings, tensors, bytes and error.

    Attributes:
        method: name of the rewrite.
        stored_bytes: weight bytes that the rewritten site keeps, including the original weights that corrections read.
        touched_bytes: weight bytes that it reads per decoded token, including expected corrections.
        outlier_rate: share of (token, neuron) pairs on the calibration text that read the neuron's column of ``down``.
        error: root-mean-square error of the site's output on held-back calibration tokens, relative to the output's.
        settings: plain values that the rewrite needs.
        tensors: that the rewrite needs, by name.
    """

    reason: ClassVar[None] = None
    method: str
    stored_bytes: int = 0
    touched_bytes: float = 0.0
    outlier_rate: float = 0.0
    error: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


#: The entry of a site in a plan.
Planned = SitePlan | KeptSite


@dataclass(frozen=True, eq=False)
class Plan:
    """The product of calibration: an entry for every site, and the config.

    Attributes:
        sites: one entry for each site, including sites that are not rewritten: FFNs and, if the config has
            ``linear_bits``, linear layers outside of them.
        config: that the plan was fitted with; if it had a ``target_kl``, with the budget that reaches it instead.
        kl: KL(dense || rewritten) of the model's output on held-back batches, in nats per token, or None if the config
            had no ``target_kl``, or the plan was changed since.
    """

    sites: tuple[Planned, ...]
    config: Config
    kl: float | None = None

    @property
    def rewritten(self) -> tuple[SitePlan, ...]:
        """Entries of the rewritten sites."""
        return tuple(site for site in self.sites if isinstance(site, SitePlan))

    @property
    def ffns(self) -> tuple[Planned, ...]:
        """Entries of the FFNs."""
        return tuple(site for site in self.sites if site.kind != "linear")

    @property
    def linear_layers(self) -> tuple[Planned, ...]:
        """Entries of the linear layers outside of FFNs."""
        return tuple(site for site in self.sites if site.kind == "linear")

    def find(self, fingerprint: str) -> Planned | None:
        """The entry with this fingerprint, or None."""
        return next((site for site in self.sites if site.fingerprint == fingerprint), None)

    @property
    def touched_fraction(self) -> float:
        """Weight bytes read per decoded token as a fraction of all FFN weight bytes; kept sites count in full."""
        touched = sum(site.touched_bytes for site in self.ffns)
        return touched / max(1, sum(site.dense_bytes for site in self.ffns))

    @property
    def touched_bits(self) -> float:
        """Bits read per decoded token for each FFN weight, biases included; kept sites count in full."""
        return bits_per_weight(sum(site.touched_bytes for site in self.ffns), self.weights)

    @property
    def stored_bits(self) -> float:
        """Bits kept for each FFN weight, biases included."""
        return bits_per_weight(sum(site.stored_bytes for site in self.ffns), self.weights)

    @property
    def weights(self) -> int:
        """Number of all FFN weights, biases included."""
        return sum(site.weights for site in self.ffns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file, atomically.

        Args:
            path: of the file; an existing file, or the target of a link, is replaced and keeps its mode.

        Raises:
            PlanFileError: the file cannot be written, or the plan holds what no file can.
        """
        tensors: dict[str, Tensor] = {}
        first: dict[int, str] = {}  # keys of tensors that several sites share, by object: each is written once
        same: dict[str, str] = {}
        for i, site in enumerate(self.sites):
            for name, t in site.tensors.items() if isinstance(site, SitePlan) else ():
                key = f"{i}.{name}"
                if (known := first.setdefault(id(t), key)) == key:
                    tensors[key] = t.contiguous().clone()
                else:
                    same[key] = known
        sites = [{f.name: getattr(site, f.name) for f in fields(site) if f.name != "tensors"} for site in self.sites]
        try:
            write(Path(path), tensors, header_of(asdict(self.config), sites, same, self.kl))
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise PlanFileError(f"cannot write plan {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a plan from a file; later changes to the file do not affect it.

        Raises:
            PlanFileError: the file is missing, truncated, damaged, not a plan, or of another version.
        """
        try:
            tensors, header = read(path)
        except FileNotFoundError as error:
            raise PlanFileError(f"no plan file {path}") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise PlanFileError(f"{path} is truncated or no safetensors file: {error}") from error
        try:
            config, sites, kl = content_of(header, tensors)
            entries = tuple(KeptSite(**site) if "reason" in site else SitePlan(**site) for site in sites)
            return cls(entries, Config(**config), kl)
        except PlanFileError as error:
            raise PlanFileError(f"{path}: {error}") from error
        except Exception as error:
            raise PlanFileError(f"{path} is a damaged plan: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        methods = Counter(site.method if isinstance(site, SitePlan) else "refused" for site in self.ffns)
        listed = ", ".join(f"{count} {method}" for method, count in methods.items())
        layers = self.linear_layers
        coded = sum(isinstance(layer, SitePlan) for layer in layers)
        share = sum(layer.touched_bytes for layer in layers) / max(1, sum(layer.dense_bytes for layer in layers))
        linear = f"; {coded} of {len(layers)} linear layers in codes, {share:.1%} of their bytes" if layers else ""
        return (
            f"Plan({len(self.ffns)} sites: {listed}; {self.touched_fraction:.1%} of the FFN bytes touched per token, "
            f"{self.touched_bits:.3g} bits per weight{linear}"
            f"{'' if self.kl is None else f'; KL {self.kl:.3g} nats per token on held-back batches'})"
        )


def bits_per_weight(size: float, weights: int) -> float:
    """Bits for each weight of a size in bytes."""
    return 8 * size / max(1, weights)


def resolve(plan: Any) -> Plan:
    """Returns a plan, or loads it from a path; a file is only read again if it was replaced or changed.

    Raises:
        ConfigError: ``plan`` is neither a plan nor a path.
        PlanFileError: the file cannot be read.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, Path)):
        raise ConfigError(f"plan must be a tardis_fx.Plan or the path of its file, not {type(plan).__name__}")
    path = Path(plan).absolute()
    try:
        written = path.stat()
        state = (written.st_dev, written.st_ino, written.st_size, written.st_mtime_ns, written.st_ctime_ns)
        header = read_header(path)  # contains the digest of the content; timestamps may repeat or go back
    except (OSError, ValueError, SafetensorError) as error:
        raise PlanFileError(f"no plan file {path}: {getattr(error, 'strerror', None) or error}") from error
    return _load(path, state, header)


@lru_cache(maxsize=1)
def _load(path: Path, _state: tuple[int, ...], _header: bytes) -> Plan:
    return Plan.load(path)
