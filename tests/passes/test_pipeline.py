import pytest
import torch
from builders.ffns import Block, config, exact_plan, ffn, inputs, oracle
from builders.profile import examples
from hypothesis import given, note, settings
from torch import Tensor, fx, nn

from tardis_fx import Plan, PlanMismatchError
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes import pipeline
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.testing.capture import capture
from tardis_fx.testing.graphs import Drawn, graphs

CLASSES = list(range(20)), list(range(20, 26))  # of 32 neurons
LIMIT = GuardedFold.decode_tokens
O = oracle(16, 32, 4, d_out=16)
PLAN = Plan((O.plan(*CLASSES),), config())


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method", "call_module")]


def exact_plans(graph: fx.Graph, values: dict[fx.Node, Tensor]) -> list[SitePlan]:
    """A plan of every site that may be rewritten that changes nothing."""
    plans = []
    for site in find_sites(graph):
        if site.reason is None and site.activation is not None:
            parameters = [values[node] for node in site.parameters]
            plans.append(exact_plan(SiteWeights.from_site(site, parameters), parameters, site.activation))
    return plans


@settings(max_examples=examples(60))
@given(graphs())
@torch.no_grad()
def test_any_graph_whose_ffns_compute_every_neuron_exactly_gives_the_same(drawn: Drawn) -> None:
    note(repr(drawn))
    gm = fx.GraphModule({}, drawn.graph)
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = {n: inputs(*n.meta["example_value"].shape, seed=i) / 2 for i, n in enumerate(placeholders)}
    plans = exact_plans(gm.graph, values)
    result = pipeline.apply(gm, list(values.values()), Plan(tuple(plans), config()), "rewritten")
    assert len(result.guards) == len(plans)
    assert sum("tardis.correct" in target for target in targets(result.gm)) == len(plans)
    outputs, expected = result.gm(*values.values(), *result.constants), gm(*values.values())
    for output, original in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, original, rtol=1e-3, atol=1e-3 * max(1, original.abs().max().item()))


@torch.no_grad()
def test_the_rewritten_graph_holds_the_fold_and_one_correction_and_nothing_of_the_ffn() -> None:
    gm, given_inputs, _ = capture(O.model(), O.x)
    before = str(gm.graph)
    result = pipeline.apply(gm, given_inputs, PLAN, "rewritten")
    assert result.modified
    assert sum("linear" in target for target in targets(result.gm)) == 1
    assert sum("tardis.correct" in target for target in targets(result.gm)) == 1
    assert len(targets(result.gm)) == 2
    assert str(gm.graph) == before, "the graph that Dynamo holds was changed"


@torch.no_grad()
def test_a_step_of_few_tokens_reads_the_folded_weight_in_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tokens, where ``prefill`` lets these come, a linear layer multiplies better."""
    gm, given_inputs, _ = capture(O.model(), O.x[:3])
    few, any_number = (pipeline.apply(gm, given_inputs, PLAN, prefill) for prefill in ("original", "rewritten"))
    assert [len(targets(result.gm)) for result in (few, any_number)] == [1, 2]
    outputs = [result.gm(*given_inputs, *result.constants)[0] for result in (few, any_number)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(cpu, "take_fold", lambda _: None)
    assert len(targets(pipeline.apply(gm, given_inputs, PLAN, "original").gm)) == 2


@torch.no_grad()
def test_what_no_site_covers_is_left_as_it_was() -> None:
    gm, given_inputs, _ = capture(Block(O.model()), O.x)
    names = targets(pipeline.apply(gm, given_inputs, PLAN, "rewritten").gm)
    assert sum("layer_norm" in name for name in names) == 1
    assert len(names) == 2 + 2  # norm and sum; fold and correction


@pytest.mark.parametrize(("tokens", "rewritten"), [(1, True), (LIMIT, True), (LIMIT + 1, False), (40, False)])
@torch.no_grad()
def test_prefill_original_keeps_the_ffns_of_many_tokens(tokens: int, rewritten: bool) -> None:
    gm, given_inputs, _ = capture(O.model(), inputs(tokens, 16))
    result = pipeline.apply(gm, given_inputs, PLAN, "original")
    assert result.modified == rewritten
    assert (result.gm is gm) == (not rewritten)
    assert bool(result.constants) == rewritten
    assert pipeline.apply(gm, given_inputs, PLAN, "rewritten").modified


def test_batch_dimensions_count_as_tokens() -> None:
    for shape, rewritten in [
        ((2, LIMIT // 2), True),
        ((3, LIMIT // 2), False),
        ((2, 2, LIMIT // 4), True),
        ((LIMIT + 1, 1), False),
    ]:
        gm, given_inputs, _ = capture(O.model(), inputs(*shape, 16), dynamic=False)
        with torch.no_grad():
            assert pipeline.apply(gm, given_inputs, PLAN, "original").modified == rewritten


def outcome(model: nn.Module, plan: Plan) -> pipeline.Outcome:
    gm, given_inputs, _ = capture(model, inputs(4, 16).to(next(model.parameters()).dtype))
    with torch.no_grad():
        (found,) = pipeline.outcomes(gm, given_inputs, plan)
    return found


def test_the_reason_why_a_plan_does_not_fit_is_told_apart() -> None:
    assert outcome(O.model(), PLAN).reason is None
    assert "float32" in str(outcome(O.to(torch.bfloat16).model(), PLAN).reason)
    assert "bfloat16" in str(outcome(O.to(torch.bfloat16).model(), PLAN).reason)
    assert "weights changed" in str(outcome(oracle(16, 32, 4, d_out=16, seed=1).model(), PLAN).reason)
    assert "no site of these shapes" in str(outcome(ffn(16, 48), PLAN).reason)


def test_a_refused_entry_keeps_its_reason() -> None:
    refused = PLAN.sites[0].kept("for a test")
    found = outcome(O.model(), Plan((refused,), config()))
    assert found.reason == "for a test"
    assert pipeline.check([found], PLAN, strict=False) == [found]
    with pytest.raises(PlanMismatchError, match="for a test"):
        pipeline.check([found], PLAN, strict=True)


def test_a_plan_that_fits_no_site_is_an_error_that_names_the_sites() -> None:
    found = outcome(Block(ffn(16, 48)), PLAN)
    with pytest.raises(PlanMismatchError, match="ffn: the plan has no site of these shapes"):
        pipeline.check([found], PLAN, strict=False)


def test_a_plan_that_fits_some_sites_lists_the_rest() -> None:
    fits, left = outcome(O.model(), PLAN), outcome(ffn(16, 48), PLAN)
    assert pipeline.check([fits, left], PLAN, strict=False) == [left]
    assert pipeline.check([fits], PLAN, strict=True) == []
    with pytest.raises(PlanMismatchError, match="not every site"):
        pipeline.check([fits, left], PLAN, strict=True)


def test_a_graph_without_sites_is_no_error() -> None:
    assert pipeline.check([], PLAN, strict=True) == []


def test_weights_that_are_inference_tensors_are_refused() -> None:
    with torch.inference_mode():
        model = O.model()
    found = outcome(model, PLAN)
    assert "inference tensors" in str(found.reason)


def test_fingerprints_tell_contents_shapes_dtypes_and_order_apart() -> None:
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    same = fingerprint([a, b], "relu")
    assert same == fingerprint([a.clone(), b.clone().requires_grad_()], "relu")
    assert same == fingerprint([torch.stack([a, a], 1)[:, 0], b], "relu")
    others = [
        [b, a],
        [a, a],
        [a.view(2, 3), b],
        [a.double(), b],
        [torch.cat([a, b])],
        [a],
        [-a, b],
        [a.to(torch.bfloat16), b],
    ]
    assert len({same, *(fingerprint(other, "relu") for other in others)}) == 1 + len(others)
    assert fingerprint([a, b], "gelu") != same
