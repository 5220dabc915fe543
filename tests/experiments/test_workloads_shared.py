"""Workloads whose prompts share tokens or come in sessions: shared prefixes, conversations, agents, mixtures."""

import itertools

import numpy as np
import pytest

from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.mixture import MixtureWorkload
from kvarena.experiments.workloads.sessions import AgentLoopWorkload, MultiTurnWorkload
from kvarena.experiments.workloads.shared_prefix import SharedPrefixWorkload

COMMON = {"seed": 0, "vocab_size": 5000}
RANGE = {"min": 5, "max": 50}
LENGTH = {"mean": 30, "sigma": 0.8, "min": 2, "max": 200}


def shared_prefix(**options):
    base = {"num_requests": 200, "num_prefixes": 4, "prefix_len": 40, "suffix_len": RANGE, "output_len": RANGE}
    return SharedPrefixWorkload(**(COMMON | base | options))


def multi_turn(**options):
    base = {
        "num_requests": 300,
        "num_turns": {"min": 2, "max": 5},
        "system_len": 20,
        "user_len": LENGTH,
        "output_len": LENGTH,
        "think_time": 8.0,
        "token_time": 0.05,
        "session_rate": 0.5,
        "max_total_len": None,
    }
    return MultiTurnWorkload(**(COMMON | base | options))


def common_len(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_shared_prefix_groups():
    items = shared_prefix().items()
    prefixes = {item.client_id: tuple(item.prompt_token_ids[:40]) for item in items}
    assert len(prefixes) == len(set(prefixes.values())) == 4
    assert all(tuple(item.prompt_token_ids[:40]) == prefixes[item.client_id] for item in items)
    suffixes = [tuple(item.prompt_token_ids[40:]) for item in items]
    assert len(set(suffixes)) == 200
    assert all(5 <= len(suffix) <= 50 for suffix in suffixes)


def test_shared_prefix_popularity_is_zipf():
    items = shared_prefix(num_requests=20_000, num_prefixes=8, skew=1.0).items_iter(with_token_ids=False)
    counts = np.bincount([int(item.client_id.removeprefix("prefix-")) for item in items], minlength=8)
    wanted = 20_000 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum()
    assert counts == pytest.approx(wanted, abs=4 * wanted.max() ** 0.5)


def test_each_turn_extends_the_one_before():
    workload = multi_turn()
    items = workload.items()
    assert len(items) == 300
    sessions: dict[str, list] = {}
    for item in items:
        sessions.setdefault(item.client_id, []).append(item)
    for turns in sessions.values():
        for before, after in itertools.pairwise(turns):
            a, b = before.prompt_token_ids, after.prompt_token_ids
            assert b[: len(a)] == a
            question = len(b) - len(a) - before.output_len  # the history holds the reply at its full length
            assert 2 <= question <= 200
            assert after.arrival_time > before.arrival_time + 0.05 * before.output_len
        assert [item.kind for item in turns] == [f"turn-{1 + i}" for i in range(len(turns))]
    first, second = (turns[0].prompt_token_ids for turns in list(sessions.values())[:2])
    assert common_len(first, second) == 20  # the system prompt and no more


def test_sessions_start_as_poisson_and_people_think():
    workload = multi_turn(num_requests=20_000, num_turns={"min": 3, "max": 3}, session_rate=2.0)
    items = list(workload.items_iter(with_token_ids=False))
    times = [item.arrival_time for item in items]
    assert times == sorted(times)
    assert times[0] == 0
    sessions: dict[str, list] = {}
    for item in items:
        sessions.setdefault(item.client_id, []).append(item)
    starts = np.sort([turns[0].arrival_time for turns in sessions.values()])
    gaps = np.diff(starts)
    assert gaps.mean() == pytest.approx(0.5, rel=4 / len(gaps) ** 0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=4 / len(gaps) ** 0.5)
    thinking = [
        b.arrival_time - a.arrival_time - 0.05 * a.output_len
        for turns in sessions.values()
        if len(turns) == 3
        for a, b in itertools.pairwise(turns)
    ]
    assert np.mean(thinking) == pytest.approx(8, rel=0.05)
    assert np.std(thinking) / np.mean(thinking) == pytest.approx(1, abs=0.05)


def test_sessions_end_at_the_length_limit():
    workload = multi_turn(max_total_len=120)
    assert (workload.table.prompt_lens + workload.table.output_lens).max() <= 120
    assert "sessions cut short at 120 tokens" in workload.description
    assert "cut short" not in multi_turn().description
    with pytest.raises(ConfigError, match="hardly any first turn fits"):
        multi_turn(max_total_len=10).items()


def test_agent_context_grows():
    workload = AgentLoopWorkload(
        num_requests=400,
        num_steps={"min": 6, "max": 6},
        system_len=100,
        task_len=LENGTH,
        observation_len={"mean": 120, "sigma": 1.0, "min": 4, "max": 500},
        output_len={"mean": 20, "sigma": 0.5, "min": 4, "max": 60},
        tool_time=0.5,
        token_time=0.0,
        session_rate=1.0,
        max_total_len=None,
        **COMMON,
    )
    items = workload.items()
    assert len({tuple(item.prompt_token_ids[:100]) for item in items}) == 1
    steps: dict[str, list[int]] = {}
    for item in items:
        steps.setdefault(item.client_id, []).append(len(item.prompt_token_ids))
    whole = np.array([lens for lens in steps.values() if len(lens) == 6])
    assert len(whole) > 30
    assert whole[:, 0].mean() == pytest.approx(130, rel=0.15)
    growth = np.diff(whole, axis=1).mean()  # observation + call
    assert growth == pytest.approx(140, rel=0.15)


def test_a_share_of_an_agents_calls_waits_for_a_person():
    def times(**options):
        workload = AgentLoopWorkload(
            num_requests=4000, num_steps={"min": 5, "max": 5}, system_len=0, task_len=LENGTH, observation_len=LENGTH,
            output_len=LENGTH, tool_time=1.0, token_time=0.0, session_rate=100.0, max_total_len=None, **COMMON,
            **options,
        )  # fmt: skip
        sessions: dict[str, list[float]] = {}
        for client, time in zip(workload.table.client_ids, workload.table.arrival_times, strict=True):
            sessions.setdefault(client, []).append(time)
        return sessions

    def pauses(sessions):
        return np.concatenate([np.diff(one) for one in sessions.values()])

    alone, with_people = times(), times(user_share=0.25, user_time=10_000.0)
    # What tools take is drawn as without people; a quarter of the calls wait for one, too.
    assert np.mean(pauses(with_people) > 60) == pytest.approx(0.25, abs=0.03)
    short = pauses(with_people)[pauses(with_people) < 8]
    assert np.mean(short) == pytest.approx(np.mean(pauses(alone)), rel=0.1)
    assert pauses(alone).max() < 30
    with pytest.raises(ConfigError, match=r"user_share=1\.5 must be a share"):
        times(user_share=1.5)


def part(kind, **options):
    return {"_target_": f"kvarena.experiments.workloads.{kind}", "num_requests": None, "seed": 0, **options}


FIXED = part("synthetic.FixedWorkload", prompt_len=10, output_len=3)
OTHER = part("synthetic.FixedWorkload", prompt_len=20, output_len=4)


def mixture(components, weights, **options):
    return MixtureWorkload(**({"num_requests": 400, **COMMON, "components": components, "weights": weights} | options))


def test_mixture_draws_by_weight_and_names_clients():
    items = mixture({"chat": FIXED, "batch": OTHER}, {"chat": 3, "batch": 1}, priorities={"batch": 7}).items()
    chat = [item for item in items if item.client_id == "chat"]
    batch = [item for item in items if item.client_id == "batch"]
    assert len(chat) + len(batch) == 400
    assert len(chat) == pytest.approx(300, abs=4 * (400 * 0.75 * 0.25) ** 0.5)
    assert {(len(i.prompt_token_ids), i.output_len, i.priority) for i in chat} == {(10, 3, 0)}
    assert {(len(i.prompt_token_ids), i.output_len, i.priority) for i in batch} == {(20, 4, 7)}
    assert len({item.request_id for item in items}) == 400
    assert len({tuple(item.prompt_token_ids[:10]) for item in items}) == 400  # no two parts share content
    clients = "".join(item.client_id[0] for item in items)
    assert "cbc" in clients  # interleaved
    assert "bcb" in clients


def test_mixture_merges_traces_by_time(tmp_path):
    for name, times in (("a", range(0, 400, 2)), ("b", range(1, 600, 3))):
        rows = "".join(f"{t},{len(name) + 3},2\n" for t in times)
        (tmp_path / f"{name}.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    traces = {name: part("vidur.VidurWorkload", path=str(tmp_path / f"{name}.csv")) for name in "ab"}
    items = mixture(traces, {"a": 1, "b": 1}, num_requests=100).items()
    times = [item.arrival_time for item in items]
    assert times == sorted(times)
    assert {item.client_id for item in items} == {"a", "b"}
    untimed = mixture(traces | {"c": FIXED}, {"a": 1, "b": 1, "c": 1}, num_requests=100).items()
    assert all(item.arrival_time is None for item in untimed)


def test_mixture_of_sessions_keeps_their_clients():
    session = part(
        "sessions.MultiTurnWorkload",
        num_turns={"min": 2, "max": 2},
        system_len=0,
        user_len=LENGTH,
        output_len=LENGTH,
        think_time=1.0,
        token_time=0.0,
        session_rate=1.0,
        max_total_len=None,
    )
    items = mixture({"talk": session, "job": FIXED}, {"talk": 1, "job": 1}, num_requests=40).items()
    assert {item.client_id.split("/")[0] for item in items} == {"talk", "job"}
    assert any(item.client_id.startswith("talk/session-") for item in items)
    assert {item.kind for item in items} == {"talk/turn-1", "talk/turn-2", "job"}


@pytest.mark.parametrize(
    ("components", "weights", "message"),
    [
        ({}, {}, "must name at least one workload"),
        ({"a": FIXED}, {"b": 1}, "unknown key workload.weights.b"),
        ({"a": FIXED}, {}, "workload.weights lacks the key 'a'"),
        ({"a": FIXED}, {"a": 0}, "workload.weights.a=0 must be a finite number above 0"),
        ({"a": FIXED | {"num_requests": 5}}, {"a": 1}, "workload.components.a.num_requests=5 must be null"),
        ({"a": FIXED | {"prompt_len": 0}}, {"a": 1}, "workload.components.a: workload.prompt_len=0 must be an integer"),
        ({"a": FIXED | {"colour": 1}}, {"a": 1}, "workload.components.a: Error in call to target"),
        ({"a": {"prompt_len": 1}}, {"a": 1}, "must be a workload's config with a _target_"),
        ({"a": {"_target_": "builtins.dict"}}, {"a": 1}, "is not a workload"),
    ],
)
def test_bad_mixtures(components, weights, message):
    with pytest.raises(ConfigError) as error:
        mixture(components, weights).items()
    assert message in str(error.value)


def test_a_broken_trace_in_a_mixture_stays_a_trace_error(tmp_path):
    (tmp_path / "a.csv").write_text("num_prefill_tokens,num_decode_tokens\n1,-1\n")
    with pytest.raises(TraceError, match="line 2"):
        mixture({"a": part("vidur.VidurWorkload", path=str(tmp_path / "a.csv"))}, {"a": 1}).items()
