"""The options of calibration and of the backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, SkipValidation, ValidationError, create_model

from tardis_fx.errors import ConfigError, reasons

Prefill = Literal["original", "rewritten"]
Select = Literal["fastest", "always"]
Rounding = Literal["gptq", "nearest"]

#: Fields of the config in earlier versions, now options of a rewrite.
MOVED = ("predictor_bits", "fold_bits", "row_bits", "group_size", "rounding")
#: Fields of which exactly one says how much a plan may read.
GOALS = ("budget", "bits", "target_error", "target_kl")
#: The budget of a config without any of these.
BUDGET = 0.2

#: One rewrite, a chain of rewrites, or a mapping from sites to either; None leaves sites unchanged.
Method = str | Sequence[str] | Mapping[str, str | Sequence[str] | None]

T = TypeVar("T")


def checked(cls: type[T]) -> type[T]:
    """Makes a dataclass check the values of its fields against their annotations, strictly.

    A wrong value or an unknown name raises a ConfigError that names the field, the value and the allowed values.
    """
    hints, known = get_type_hints(cls, include_extras=True), {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    specs: dict[str, Any] = {name: (hints[name], default) for name, default in known.items()}
    model = create_model(cls.__name__, __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **specs)
    assign: Any = cls.__init__

    @wraps(assign)
    def init(self: Any, **values: Any) -> None:
        if unknown := [name for name in values if name not in known]:
            raise ConfigError(f"unknown option {', '.join(map(repr, unknown))}: the options are {', '.join(known)}")
        try:
            model(**{name: value for name, value in values.items() if value is not known[name]})
        except ValidationError as error:
            raise ConfigError(reasons(error)) from None
        assign(self, **values)

    cls.__init__ = init  # type: ignore[assignment, method-assign]
    return cls


@checked
@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings that a plan is fitted with.

    Of ``budget``, ``bits``, ``target_error`` and ``target_kl``, at most one is given; without any, the budget is 0.2.

    Attributes:
        budget: fraction of the FFN weight bytes touched per decoded token, in the model's own dtype, with predictor
            and expected corrections; 0.2 is the paper's 80% reduction. None if another goal is given; the config that
            :meth:`tardis_fx.passes.base.Rewrite.fit` gets has the fraction that stands for ``bits``.
        bits: the same as bits touched per decoded token and FFN weight, biases included: 3.2 is 20% of the bytes of
            bfloat16, and 10% of those of float32.
        target_error: root mean square of the sites' relative errors on held-back calibration tokens; the fewest bytes
            that reach it are found by fitting several times.
        target_kl: KL(dense || rewritten) of the model's own output, in nats per token, with every token on the
            rewritten path; the smallest budget that reaches it is found by fitting several times. It is measured on
            the last eighth of the calibration batches, at least one, which no fit sees.
        allocation: ``"joint"`` distributes the bytes over the sites to minimise the total error; ``"per_site"`` gives
            each site the same fraction, for comparison.
        method: name of a rewrite registered under the entry-point group ``tardis_fx.passes``; a sequence of names for a
            chain of rewrites, stored as ``"drop_bias+low_rank"``; or a mapping from patterns of site names (as in
            ``fnmatch``) to either, or to None. In a mapping the first matching pattern counts, sites that match none
            are not rewritten, and the budget applies to each method's sites. It is stored as pairs.
        prefill: ``"original"`` runs the exact original FFN for steps of more than 32 tokens (``guarded_fold``: 8, or
            16 on a GPU); ``"rewritten"`` rewrites every token (encoders, and every measurement of quality).
        options: of the rewrite, by name, as declared by its class in ``Options``: ``{"predictor_bits": 3}``. If
            ``method`` names several rewrites, by rewrite: ``{"guarded_fold": {"predictor_bits": 3}}``. They are
            stored as pairs; :meth:`options_of` returns those of one rewrite.
        sequential: fit the FFNs in order, each on inputs computed by the rewritten FFNs before it.
        linear_bits: bits of the codes of linear layers outside of FFNs (attention, the head), or None to leave them as
            they are. No budget or target in bytes counts them.
        progress: show progress bars.

    Raises:
        ConfigError: a value is out of range, or several goals are given.
    """

    # Typed for rewrites, whose config has a number here.
    budget: Annotated[float, Field(gt=0, le=1)] = None  # type: ignore[assignment]
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    target_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    allocation: Literal["joint", "per_site"] = "joint"
    method: SkipValidation[Method] = "partial_linear"
    prefill: Prefill = "original"
    options: SkipValidation[Mapping[str, Any] | tuple[tuple[str, Any], ...]] = ()
    sequential: bool = False
    linear_bits: Literal[4, 8] | None = None
    progress: bool = True

    def __new__(cls, **values: Any) -> "Config":
        """Refuses fields that have become options of a rewrite.

        Raises:
            ConfigError: such a field is given.
        """
        if moved := {name: value for name, value in values.items() if name in MOVED}:
            raise ConfigError(
                f"{', '.join(moved)}: options of guarded_fold and paper, give method and options={moved!r}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        goals = [name for name in GOALS if getattr(self, name) is not None]
        if len(goals) > 1:
            raise ConfigError(f"{' and '.join(goals)}: give one of {', '.join(GOALS)}")
        if not goals:
            object.__setattr__(self, "budget", BUDGET)
        object.__setattr__(self, "method", _method(self.method))  # hashable, and unchanged by a round trip through JSON
        for name in ("sequential", "target_error"):
            if getattr(self, name) and (not isinstance(self.method, str) or "+" in self.method):
                raise ConfigError(f"{name} needs one rewrite for all sites, not {self.method!r}")
        object.__setattr__(self, "options", _options(self.options, self.rewrites))

    @property
    def methods(self) -> tuple[tuple[str, str | None], ...]:
        """Pairs of a pattern of site names and its method; the first matching pattern counts."""
        if isinstance(self.method, str):
            return (("*", self.method),)
        assert isinstance(self.method, tuple)
        return self.method

    @property
    def rewrites(self) -> tuple[str, ...]:
        """Names of all rewrites that ``method`` names."""
        return tuple(dict.fromkeys(name for _, method in self.methods if method for name in method.split("+")))

    def options_of(self, rewrite: str) -> dict[str, Any]:
        """The options given for a rewrite."""
        return dict(dict(self.options).get(rewrite, ()))

    def with_options(self, rewrite: str, **changed: Any) -> "Config":
        """A copy of the config with changed options for a rewrite."""
        return replace(self, options=dict(self.options) | {rewrite: self.options_of(rewrite) | changed})


@checked
@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``torch.compile(..., backend="tardis", options={...})``.

    Attributes:
        plan: a :class:`tardis_fx.Plan` or the path of its file. Without a plan, the first calls are observed, and FFNs
            are rewritten once they have been fitted and checked.
        config: without a plan, how to fit; None means the defaults.
        profile_tokens: without a plan, how many tokens each step of the fit and the check observe.
        tolerance: without a plan, the largest relative error of a site's output, on calls that it was not fitted on, at
            which the site is rewritten.
        on_change: when a weight differs from the one that its site was fitted to, ``"error"`` refuses the call;
            ``"original"`` runs the original FFN; ``"refit"`` also runs it, and observes and fits again.
        prefill: overrides that of the plan.
        select: ``"fastest"`` times each FFN in both forms when a step of few tokens is compiled, and leaves the
            original where it is faster on this device; ``"always"`` rewrites without timing, as every measurement of
            quality must. Steps of more than 32 tokens (``guarded_fold``: 8, or 16 on a GPU), and FFNs whose weights
            were released, are not timed.
        strict: raise an error, instead of warning, if a site of the graph is not rewritten. A site that stays original
            because it is faster is no error.
        inner: the backend that compiles the rewritten graph.
        mode: of Inductor, as in ``torch.compile(mode=...)``, which cannot be combined with options.
    """

    plan: Any = None
    config: Config | None = None
    profile_tokens: Annotated[int, Field(ge=1)] = 8192
    tolerance: Annotated[float, Field(gt=0)] = 0.3
    on_change: Literal["error", "original", "refit"] = "error"
    prefill: Prefill | None = None
    select: Select = "fastest"
    strict: bool = False
    inner: str = "inductor"
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.config is not None and self.plan is not None:
            raise ConfigError("config says how to fit where there is no plan: give one of them")
        for name in ("sequential", "target_kl"):
            if self.config is not None and getattr(self.config, name):
                raise ConfigError(f"{name} runs the model again and again: it needs calibrate and a plan")

    @property
    def observes(self) -> bool:
        """Whether sites without a plan entry are observed and fitted."""
        return self.plan is None or self.on_change == "refit"


def _method(method: Any) -> str | tuple[tuple[str, str | None], ...]:
    """The stored form of a method, from a user's value or from JSON.

    Raises:
        ConfigError: it is not a method.
    """
    if isinstance(method, str) or not isinstance(method, (Mapping, Sequence)):
        return _chain(method)
    pairs: list[Any] = list(method.items() if isinstance(method, Mapping) else method)
    if not pairs:
        raise ConfigError(f"method names no rewrite: {method!r}")
    if all(isinstance(name, str) for name in pairs):
        return _chain("+".join(pairs))
    methods = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ConfigError(f"method must map patterns of site names to rewrites, not {pair!r}")
        pattern, value = pair
        chain = value if value is None or isinstance(value, str) else _method(value)
        methods.append((pattern, None if chain is None else _chain(chain)))
    return tuple(methods)


def _chain(method: Any) -> str:
    if not isinstance(method, str) or not all(method.split("+")):
        raise ConfigError(f"method must be the name of a rewrite, or names joined with +, not {method!r}")
    return method


def _options(options: Any, rewrites: tuple[str, ...]) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """The stored form of options, from a user's value or from JSON.

    Raises:
        ConfigError: they are not options, or belong to a rewrite that ``method`` does not name.
    """
    by_rewrite = _pairs(options)
    if by_rewrite and not any(isinstance(value, (Mapping, list, tuple)) for value in by_rewrite.values()):
        if len(rewrites) != 1:
            example = f"{{{(*rewrites, '?')[0]!r}: {options!r}}}"
            raise ConfigError(f"options go by rewrite unless method names one: {example}")
        by_rewrite = {rewrites[0]: options}
    for rewrite, values in by_rewrite.items():
        if rewrite not in rewrites:
            raise ConfigError(f"options: {rewrite!r} is not a rewrite of method, which names {', '.join(rewrites)}")
        by_rewrite[rewrite] = tuple(_pairs(values).items())
        if wrong := [v for _, v in by_rewrite[rewrite] if not isinstance(v, (str, int, float, type(None)))]:
            raise ConfigError(f"options of {rewrite} must be a number, a string, a bool or None, not {wrong[0]!r}")
    return tuple(by_rewrite.items())


def _pairs(options: Any) -> dict[str, Any]:
    try:
        pairs = dict(options)
    except (TypeError, ValueError):
        pairs = {None: None}
    if not all(isinstance(name, str) for name in pairs):
        raise ConfigError(f"options must map names of options to values, or rewrites to such mappings, not {options!r}")
    return pairs


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Checks that a value is one of the allowed ones.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
