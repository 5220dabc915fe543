"""No two requests wait for each other: whatever the sizes and options, every accepted request ends by itself."""

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import simulate

from kvarena.engine.errors import RequestRejected
from kvarena.engine.request import FinishReason, Request, SamplingParams
from kvarena.experiments.settings.strategies import strategy_names, strategy_options

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(1, 30),  # max_tokens
        st.integers(0, 2),  # priority
        st.sampled_from("ab"),  # client
        st.sampled_from([None, 1, 7]),  # what it says about its length: nothing, or something wrong
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(
    load=REQUESTS,
    num_blocks=st.integers(3, 20),
    allocator=st.sampled_from(strategy_names("allocator")),
    scheduler=st.sampled_from(strategy_names("scheduler")),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(0, 20),
    preemption=st.sampled_from(["recompute", "swap", "none"]),
    victim=st.sampled_from(["last_arrived", "lowest_priority", "most_blocks"]),
    watermark=st.sampled_from([0.0, 0.1, 0.5]),
    overlap=st.booleans(),
)
def test_every_accepted_request_ends(load, num_blocks, allocator, scheduler, overlap, max_num_seqs, budget, **options):
    known = strategy_options("scheduler", scheduler)
    run = simulate(
        scheduler,
        allocator=allocator,
        num_blocks=num_blocks,
        max_model_len=60,
        overlap=overlap,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + budget,
        **{name: value for name, value in options.items() if name in known},
    )
    engine, accepted = run.engine, []
    for i, (num_prompt, max_tokens, priority, client, oracle) in enumerate(load):
        sampling = SamplingParams(max_tokens=max_tokens)
        prompt = [i % 2] * num_prompt
        req = Request(f"r{i}", prompt, sampling, 0.0, priority, client, oracle_output_len=oracle)
        try:
            engine.add(req)
            accepted.append(req)
        except RequestRejected:
            assert req.max_total_tokens > engine.allocator.max_request_tokens
    # Most steps that could be needed: each request alone, recomputed from its start for each of its tokens.
    limit = sum(req.max_total_tokens**2 for req in accepted) + 10

    def within_limit(output):
        assert output.index < limit

    run.run([], on_step=within_limit)
    assert all(req.finish_reason is FinishReason.LENGTH for req in accepted)
    assert engine.allocator.usage().owned == 0
