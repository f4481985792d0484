"""Traces: a case worked by hand, twins by brute force, round trips, refusal of what is unfinished or damaged."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.context import RoutingContext
from moestro.core.errors import TraceError
from moestro.core.routing import Routing, Scores
from moestro.core.session import Session
from moestro.core.tokens import Tokens
from moestro.core.trace import RoutingTrace
from moestro.core.trace_writer import TraceWriter


def context(ids_BS, valid_BS=None, tags=None, first=0):
    """A context of one forward as a stack would open it."""
    ids = torch.tensor(ids_BS)
    rows, width = ids.shape
    valid = torch.ones(rows, width, dtype=torch.bool) if valid_BS is None else torch.tensor(valid_BS, dtype=torch.bool)
    tokens = Tokens(
        row_T=torch.arange(rows).repeat_interleave(width),
        position_T=torch.arange(first, first + width).repeat(rows),
        valid_T=valid.reshape(-1),
        ids_T=ids.reshape(-1),
        num_rows=rows,
        width=width,
    )
    return RoutingContext("model", Session(tags=tags or {}), tokens)


def hand_routings():
    """Four tokens (the last is padding), three experts and one null, two layers; layer 1 drops one assignment."""
    first = Routing.from_topk(
        torch.tensor([[0, 1], [1, 2], [0, 3], [2, 2]]),
        torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [1.0, 0.0]]),
        num_experts=3,
        num_null=1,
        scores=Scores(torch.zeros(4, 4), torch.zeros(4, 4), torch.arange(16.0).view(4, 4)),
    )
    second = Routing(
        token_N=torch.tensor([2, 0, 0, 3]),  # token 1 gets nobody
        expert_N=torch.tensor([2, 2, 0, 1]),
        weight_N=torch.tensor([1.0, 0.5, 0.25, 1.0]),
        num_tokens=4,
        num_experts=3,
        kept_N=torch.tensor([True, True, False, True]),
    )
    return first, second


@pytest.fixture
def hand(tmp_path):
    with TraceWriter(tmp_path / "hand.trace", model="by hand") as writer:
        ctx = context([[7, 8, 9, 0]], [[1, 1, 1, 0]], {"tag": ["prose"]})
        for site, routing in zip(("layers.1.mlp", "layers.4.mlp"), hand_routings(), strict=True):
            writer.record(site, routing, ctx)
    return RoutingTrace.open(tmp_path / "hand.trace")


def test_rows_on_disk_are_what_was_routed(hand):
    table = pq.read_table(hand.path / "trace.parquet")
    rows = [
        tuple(row[name] for name in ("position", "token_id", "layer", "rank", "expert", "weight", "kept"))
        for row in table.to_pylist()
    ]
    assert rows == [
        (0, 7, 1, 0, 0, 0.75, True),
        (0, 7, 1, 1, 1, 0.25, True),
        (1, 8, 1, 0, 1, 0.5, True),
        (1, 8, 1, 1, 2, 0.5, True),
        (2, 9, 1, 0, 0, 0.625, True),
        (2, 9, 1, 1, 3, 0.375, True),
        (0, 7, 4, 0, 2, 0.5, True),
        (0, 7, 4, 1, 0, 0.25, False),
        (1, 8, 4, -1, -1, 0.0, False),
        (2, 9, 4, 0, 2, 1.0, True),
    ]  # fmt: skip
    assert set(table["tag"].to_pylist()) == {"prose"}
    assert set(table["sequence"].to_pylist()) == {0}
    gates = table["gate"].to_pylist()
    assert gates[:6] == [0.0, 1.0, 5.0, 6.0, 8.0, 11.0]
    assert all(math.isnan(gate) for gate in gates[6:])


def test_header_tells_the_shape(hand):
    header = json.loads((hand.path / "header.json").read_text())
    assert header["schema"] == 1
    assert header["num_tokens"] == 3
    assert header["num_rows"] == 10
    assert header["tags"] == ["prose"]
    assert [(x["layer"], x["site"], x["num_experts"], x["num_null"], x["top_k"]) for x in header["layers"]] == [
        (1, "layers.1.mlp", 3, 1, 2),
        (4, "layers.4.mlp", 3, 0, None),
    ]


def test_load_by_hand(hand):
    assert hand.load(1).tolist() == [2, 2, 1]
    assert hand.load(1, nulls=True).tolist() == [2, 2, 1, 1]
    assert hand.load(4).tolist() == [1, 0, 2]
    assert hand.load(4, ran=True).tolist() == [0, 0, 2]
    assert hand.load(tag="prose").tolist() == [3, 2, 3]
    assert hand.load(1, phase="decode").tolist() == [0, 0, 0]
    with pytest.raises(TraceError, match="no layer 2; it has 1, 4"):
        hand.load(2)
    with pytest.raises(TraceError, match="no tag 'code'"):
        hand.load(1, "code")


def test_pairs_by_hand(hand):
    assert hand.coactivation(1).tolist() == [[2, 1, 0], [1, 2, 1], [0, 1, 1]]
    # token 0: {0, 1} -> {2, 0}; token 1: -> nobody; token 2: {0} -> {2}
    assert hand.affinity(1, 4).tolist() == [[1, 0, 2], [1, 0, 1], [0, 0, 0]]
    assert hand.affinity(4, 1).tolist() == [[1, 1, 0], [0, 0, 0], [2, 1, 0]]


def test_entropy_by_hand(hand):
    shares = [0.4, 0.4, 0.2]
    assert hand.entropy(1) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert hand.entropy(4) == pytest.approx(-(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)))


def test_reuse_distance_by_hand(hand):
    # layer 1 runs 0 1 | 1 2 | 0: expert 1 again at once (distance 0), expert 0 after 1 and 2 (distance 2)
    assert hand.reuse_distance(1).tolist() == [1, 0, 1, 3]
    # layer 4 runs 2 | 2; the dropped assignment touches no cache
    assert hand.reuse_distance(4).tolist() == [1, 0, 0, 1]


def test_tokens_for_display(hand):
    view = hand.tokens(0)
    assert view.token_BS.tolist() == [[7, 8, 9]]
    assert view.expert[1].tolist() == [[[0, 1], [1, 2], [0, 3]]]
    assert view.expert[4].tolist() == [[[2, 0], [-1, -1], [2, -1]]]
    assert view.kept[4].tolist() == [[[True, False], [False, False], [True, False]]]
    assert view.tags == [["prose"] * 3]
    with pytest.raises(TraceError, match="no sequence 1; the trace holds 1"):
        hand.tokens(1)


# -- twins by brute force ---------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """Some forwards over some layers: lists of (ids, valid, tags, {site: routing})."""
    experts, nulls = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    layers = draw(st.integers(1, 3))
    forwards = []
    for _ in range(draw(st.integers(1, 4))):
        rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        count = rows * width
        ids = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
        valid = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        tags = draw(st.lists(st.sampled_from(["a", "b", "ü"]), min_size=rows, max_size=rows))
        routings = []
        for _ in range(layers):
            chosen = draw(st.lists(st.lists(st.integers(0, experts + nulls - 1), unique=True, max_size=3),
                                   min_size=count, max_size=count))  # fmt: skip
            flat = draw(st.permutations([(t, e) for t, picks in enumerate(chosen) for e in picks]))
            kept = draw(st.lists(st.booleans(), min_size=len(flat), max_size=len(flat)))
            routings.append(
                Routing(
                    torch.tensor([t for t, _ in flat], dtype=torch.int64),
                    torch.tensor([e for _, e in flat], dtype=torch.int64),
                    torch.arange(len(flat), dtype=torch.float32) / 8,
                    count,
                    experts,
                    nulls,
                    kept_N=torch.tensor(kept, dtype=torch.bool),
                )
            )
        forwards.append((np.reshape(ids, (rows, width)), np.reshape(valid, (rows, width)), tags, routings))
    return forwards


def replay_by_hand(forwards):
    """Rows the slow way: (forward, sequence, position, id, tag, layer, rank, expert, weight, kept)."""
    rows, sequence = [], 0
    for number, (ids, valid, tags, routings) in enumerate(forwards):
        numbers = {}
        for row in range(len(ids)):
            if valid[row].any():
                numbers[row], sequence = sequence, sequence + 1
        for layer, routing in enumerate(routings):
            listed = list(zip(*(x.tolist() for x in (routing.token_N, routing.expert_N, routing.weight_N,
                                                     routing.kept_N)), strict=True))  # fmt: skip
            for token in range(ids.size):
                row, column = divmod(token, ids.shape[1])
                if not valid[row, column]:
                    continue
                mine = [(rank, *item[1:]) for rank, item in enumerate(x for x in listed if x[0] == token)]
                for rank, expert, weight, kept in mine or [(-1, -1, 0.0, False)]:
                    who = (number, numbers[row], column, int(ids[row, column]), tags[row])
                    rows.append((*who, layer, rank, expert, weight, kept))
    return rows


def record(forwards, path, row_group):
    with TraceWriter(path, row_group=row_group) as writer:
        for ids, valid, tags, routings in forwards:
            ctx = context(ids.tolist(), valid.tolist(), {"tag": tags})
            for layer, routing in enumerate(routings):
                writer.record(f"layers.{layer}.mlp", routing, ctx)
    return RoutingTrace.open(path)


@settings(max_examples=40)
@given(forwards=runs(), row_group=st.sampled_from([1, 7, 10_000]))
def test_round_trip_and_queries_equal_brute_force(forwards, row_group, tmp_path_factory):
    trace = record(forwards, tmp_path_factory.mktemp("t") / "x.trace", row_group)
    expected = replay_by_hand(forwards)
    names = ("forward", "sequence", "position", "token_id", "tag", "layer", "rank", "expert", "weight", "kept")
    read = pq.read_table(trace.path / "trace.parquet").to_pylist()
    assert [tuple(row[name] for name in names) for row in read] == expected
    experts = forwards[0][3][0].num_experts
    for layer in trace.layers:
        check_layer(trace, layer, [row for row in expected if row[5] == layer], experts)
        used = {key: tokens_of(expected, key, experts) for key in trace.layers}
        for other in trace.layers:
            both = Counter((i, j) for who, mine in used[layer].items() for i in mine for j in used[other][who])
            affinity = trace.affinity(layer, other)
            assert {(i, j): affinity[i, j].item() for i, j in affinity.nonzero().tolist()} == both
    assert trace.header.num_tokens == len({row[:3] for row in expected})


def tokens_of(rows, layer, experts):
    used = {}
    for row in rows:
        if row[5] == layer:
            mine = used.setdefault(row[:3], set())
            if 0 <= row[7] < experts:
                mine.add(row[7])
    return used


def check_layer(trace, layer, rows, experts):
    counted = Counter(row[7] for row in rows if row[7] >= 0)
    info = trace.layer(layer)
    assert trace.load(layer, nulls=True).tolist() == [counted[e] for e in range(info.num_choices)]
    for tag in trace.tags:
        mine = Counter(row[7] for row in rows if row[4] == tag)
        assert trace.load_by_tag(layer)[tag].tolist() == [mine[e] for e in range(experts)]
    pairs = Counter()
    for mine in tokens_of(rows, layer, experts).values():
        pairs.update((a, b) for a, b in combinations(sorted(mine), 2))
        pairs.update((a, a) for a in mine)
    together = trace.coactivation(layer)
    assert torch.equal(together, together.T)
    assert {(i, j): together[i, j].item() for i, j in together.triu().nonzero().tolist()} == pairs
    for per_sequence in (True, False):
        ran = [(row[1] if per_sequence else 0, row[7]) for row in rows if 0 <= row[7] < experts and row[9]]
        assert trace.reuse_distance(layer, per_sequence=per_sequence).tolist() == lru_distances(ran, experts)


def lru_distances(accesses, experts):
    """Move-to-front lists, one a cache."""
    histogram, stacks = [0] * (experts + 1), {}
    for owner, expert in accesses:
        stack = stacks.setdefault(owner, [])
        histogram[stack.index(expert) if expert in stack else experts] += 1
        if expert in stack:
            stack.remove(expert)
        stack.insert(0, expert)
    return histogram


@settings(max_examples=30)
@given(forwards=runs(), size=st.integers(1, 4))
def test_batches_hold_every_row_once(forwards, size, tmp_path_factory):
    trace = record(forwards, tmp_path_factory.mktemp("t") / "x.trace", 5)
    expected = Counter(
        (row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9])
        for row in replay_by_hand(forwards)
        if row[7] >= 0
    )
    found = Counter()
    for batch in trace.batches(size):
        for layer, expert_BSK in batch.expert.items():
            for row, column, slot in (expert_BSK >= 0).nonzero().tolist():
                assert batch.valid_BS[row, column]
                found[(batch.sequence_B[row].item(), batch.position_BS[row, column].item(),
                       batch.token_BS[row, column].item(), batch.tags[row][column], layer, slot,
                       expert_BSK[row, column, slot].item(), batch.weight[layer][row, column, slot].item(),
                       batch.kept[layer][row, column, slot].item())] += 1  # fmt: skip
    assert found == expected


# -- files ------------------------------------------------------------------------------------------------------


def test_memory_recording_answers_like_a_folder(hand):
    writer = TraceWriter(None)
    ctx = context([[7, 8, 9, 0]], [[1, 1, 1, 0]], {"tag": ["prose"]})
    for site, routing in zip(("layers.1.mlp", "layers.4.mlp"), hand_routings(), strict=True):
        writer.record(site, routing, ctx)
    header = writer.close()
    trace = RoutingTrace()
    trace._attach(pa.BufferReader(writer.buffer), header, None)
    assert torch.equal(trace.load(1), hand.load(1))
    assert torch.equal(trace.affinity(1, 4), hand.affinity(1, 4))
    assert trace.header.layers == hand.header.layers


def test_an_exception_leaves_nothing_behind(tmp_path):
    def interrupted():
        with TraceWriter(tmp_path / "x.trace", row_group=1) as writer:
            writer.record("layers.0.mlp", hand_routings()[0], context([[1, 2, 3, 4]]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_recording_is_refused_and_swept_up(tmp_path):
    target = tmp_path / "x.trace"
    code = f"""
import os, torch
from moestro.core.trace_writer import TraceWriter
TraceWriter({str(target)!r})
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [p.name.startswith("x.trace.unfinished-") for p in tmp_path.iterdir()] == [True]
    with pytest.raises(TraceError, match=r"x.trace is not finished: .* record it again"):
        RoutingTrace.open(target)
    with TraceWriter(target) as writer:
        writer.record("layers.0.mlp", hand_routings()[0], context([[1, 2, 3, 4]]))
    assert [p.name for p in tmp_path.iterdir()] == ["x.trace"]
    assert RoutingTrace.open(target).load(0).tolist() == [2, 2, 3]


def test_targets_are_not_overwritten(tmp_path, hand):
    with pytest.raises(TraceError, match="exists; remove it or give another name"):
        TraceWriter(hand.path)
    with TraceWriter(tmp_path / "y.trace"), pytest.raises(TraceError, match="is being recorded to in this process"):
        TraceWriter(tmp_path / "y.trace")
    assert RoutingTrace.open(tmp_path / "y.trace").header.num_rows == 0


def test_missing_and_half_traces_are_refused(tmp_path, hand):
    with pytest.raises(TraceError, match="no such trace"):
        RoutingTrace.open(tmp_path / "none.trace")
    (hand.path / "trace.parquet").unlink()
    with pytest.raises(TraceError, match=r"no finished trace: trace.parquet missing"):
        RoutingTrace.open(hand.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema"),
        ({"num_rows": 11}, "holds 10 rows, header.json says 11"),
        ({"layers": 3}, "layers"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_damaged_headers_are_refused_in_one_line(hand, change, message):
    path = hand.path / "header.json"
    values = json.loads(path.read_text())
    del values["digest"]  # a header without one is taken as it stands
    path.write_text(json.dumps(values | change))
    with pytest.raises(TraceError, match=message) as error:
        RoutingTrace.open(hand.path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\0"])
def test_headers_that_are_not_objects_are_refused(hand, text):
    (hand.path / "header.json").write_text(text)
    with pytest.raises(TraceError, match=r"header.json"):
        RoutingTrace.open(hand.path)


def test_cut_files_are_refused(hand):
    path = hand.path / "trace.parquet"
    whole = path.read_bytes()
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(TraceError, match="damaged") as error:
            RoutingTrace.open(hand.path).load(1)
        assert "\n" not in str(error.value)


def test_no_damage_gives_another_answer(hand):
    """Flipped, lost and repeated bytes anywhere: refused in one line, or the answers are what they were."""

    def answers():
        trace = RoutingTrace.open(hand.path)
        found = [trace.load(1), trace.load(4, ran=True), trace.affinity(1, 4), trace.reuse_distance(1)]
        return [answer.tolist() for answer in found] + [trace.tokens(0).weight[1].tolist()]

    expected, generator, refusals = answers(), random.Random(0), []
    for path in (hand.path / "trace.parquet", hand.path / "header.json"):
        whole = path.read_bytes()
        for _ in range(120):
            damaged = bytearray(whole)
            place, kind = generator.randrange(len(whole)), generator.random()
            if kind < 0.6:
                damaged[place] ^= 1 << generator.randrange(8)
            elif kind < 0.8:
                del damaged[place : place + generator.randrange(1, 9)]
            else:
                damaged[place:place] = damaged[: generator.randrange(1, 20)]
            path.write_bytes(damaged)
            try:
                assert answers() == expected
            except TraceError as error:
                refusals.append(str(error))
        path.write_bytes(whole)
    assert len(refusals) > 150
    assert not [text for text in refusals if "\n" in text]


def test_ids_outside_the_header_are_refused(hand):
    header = json.loads((hand.path / "header.json").read_text())
    header["layers"][0].update(num_experts=2, num_null=0)
    (hand.path / "header.json").write_text(json.dumps(header))
    with pytest.raises(TraceError, match="its digest does not fit its values"):
        RoutingTrace.open(hand.path)
    del header["digest"]
    (hand.path / "header.json").write_text(json.dumps(header))
    with pytest.raises(TraceError, match="layer 1 has expert ids 0 to 3 among 2 choices"):
        RoutingTrace.open(hand.path).load(1)


def test_wrong_columns_are_refused(hand):
    path = hand.path / "trace.parquet"
    pq.write_table(pq.read_table(path).drop(["expert"]), path)
    with pytest.raises(TraceError, match="no column 'expert'"):
        RoutingTrace.open(hand.path)


def test_routings_that_do_not_fit_are_refused(tmp_path):
    first, second = hand_routings()
    writer = TraceWriter(tmp_path / "x.trace")
    ctx = context([[7, 8, 9, 0]])
    writer.record("layers.1.mlp", first, ctx)
    with pytest.raises(TraceError, match="3 experts and 0 nulls now, 3 and 1 before"):
        writer.record("layers.1.mlp", second, context([[7, 8, 9, 0]]))
    with pytest.raises(TraceError, match="routing of 4 tokens in a forward of 3"):
        writer.record("layers.2.mlp", first, context([[7, 8, 9]]))
    with pytest.raises(TraceError, match="expert ids 0 to 9 in a routing of 3 choices"):
        writer.record("layers.3.mlp", second.replace(expert_N=torch.tensor([2, 0, 9, 1])), ctx)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_flat_while_recording(tmp_path):
    """What is buffered never exceeds a row group and one record."""
    routing = Routing.from_topk(torch.zeros(64, 2, dtype=torch.int64), torch.ones(64, 2), num_experts=3)
    with TraceWriter(tmp_path / "x.trace", row_group=1000) as writer:
        for _ in range(50):
            writer.record("layers.0.mlp", routing, context(np.zeros((4, 16), dtype=int).tolist()))
            assert writer._buffered < 1000
            assert sum(len(chunk["expert"]) for chunk in writer._chunks) == writer._buffered
    trace = RoutingTrace.open(tmp_path / "x.trace")
    assert trace.load(0).tolist() == [50 * 128, 0, 0]
    assert Path(trace.path / "trace.parquet").stat().st_size < 50 * 128 * 8


def test_a_recording_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moestro.core.trace_writer.pq.ParquetWriter", full)
    with pytest.raises(TraceError, match="No space left on device; nothing was written"):
        TraceWriter(tmp_path / "a.trace")
    assert list(tmp_path.iterdir()) == []
