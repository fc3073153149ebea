from hypothesis import given
from hypothesis import strategies as st

from tardis_fx.serving.rows import decoding

LIMIT = 8
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(lengths)
def test_a_rewritten_request_brings_few_tokens_and_all_of_them_together_no_more(lengths: list[int]) -> None:
    rewritten = [n for n, chosen in zip(lengths, decoding(lengths, LIMIT), strict=True) if chosen]
    assert sum(rewritten) <= LIMIT


@given(lengths)
def test_requests_of_few_tokens_are_rewritten_or_there_are_too_many_of_them(lengths: list[int]) -> None:
    chosen = decoding(lengths, LIMIT)
    few = [n for n in lengths if n <= LIMIT]
    assert chosen == [n <= LIMIT and sum(few) <= LIMIT for n in lengths]


@given(lengths, st.lists(st.integers(LIMIT + 1, 10_000)))
def test_long_prompts_change_nothing_for_the_requests_beside_them(lengths: list[int], prompts: list[int]) -> None:
    assert decoding([*lengths, *prompts], LIMIT) == [*decoding(lengths, LIMIT), *[False] * len(prompts)]
