"""Speculative decoding: for any draft table, the text equals that of decoding id by id, in fewer passes."""

import math
import tracemalloc
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TOY_VOCABULARY, random_model, save_onnx

from smallm import LanguageModel
from smallm.cli import main as cli
from smallm.export.draft_table import MIN_SEEN, distil, write_draft_table
from smallm.export.folder import export_checkpoint
from smallm.generation.draft_table import ALTERNATIVES, CONTEXT, DRAFT_TABLE_FILE, NONE, ROW, STEP, DraftTable, pack
from smallm.generation.rng import Rng
from smallm.generation.speculative import SpeculativeDecoder, drafts_per_pass
from smallm.inference.kv_cache import KVCache
from smallm.training.checkpoint.manager import best_checkpoint

V = TOY_VOCABULARY.size
DRAFTS = drafts_per_pass("fp32", 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Random weights, a context of 64 ids."""
    return save_onnx(random_model(block_size=64), tmp_path_factory.mktemp("draft_table") / "model.onnx")


@pytest.fixture(scope="module")
def lm(path) -> LanguageModel:
    return LanguageModel.load(path)


def with_table(lm: LanguageModel, table: DraftTable) -> LanguageModel:
    return LanguageModel(lm._session, table)


def rows(*entries: tuple[list[int], dict[int, int]]) -> DraftTable:
    """(context, {id: nats}) … -> a table."""
    table = np.zeros(len(entries), ROW)
    table["nats"] = NONE
    for row, (context, likely) in zip(table, entries, strict=True):
        row["context"] = pack(context)
        row["ids"][: len(likely)] = sorted(likely)
        row["nats"][: len(likely)] = [likely[id] for id in sorted(likely)]
    return DraftTable(np.sort(table, order="context"))


# -- the table


def test_the_draft_table_uses_the_longest_known_context():
    table = rows(([], {9: 0}), ([1], {2: 0}), ([2], {3: 0}), ([1, 2], {4: 0}), ([7, 7, 1, 2], {5: 0}))
    assert table.drafter(1.0).propose([7, 7, 1, 2], [0.5]) == [5]
    assert table.drafter(1.0).propose([0, 7, 7, 1, 2], [0.5]) == [5]
    assert table.drafter(1.0).propose([8, 7, 1, 2], [0.5]) == [4]
    assert table.drafter(1.0).propose([2], [0.5]) == [3]
    assert table.drafter(1.0).propose([8], [0.5]) == [9]
    assert table.drafter(1.0).propose([8, 1], [0.5] * 3) == [2, 4, 9]  # after 8 1, after 1 2, after 2 4
    assert rows().drafter(1.0).propose([1], [0.5, 0.5]) == [0, 0]


def test_drafts_are_sampled_like_the_ids_of_the_model():
    table = rows(([], {3: 32, 5: 0, 8: 16, 9: 64}))
    for temperature in (0.5, 1.0, 2.0, 1e9):
        shares = np.cumsum([math.exp(-n * STEP / temperature) for n in (32, 0, 16, 64)])
        for u in np.linspace(0, 1 - 2**-24, 101):
            expected = (3, 5, 8, 9)[bisect_right(shares, u * shares[-1])]
            assert table.drafter(temperature).propose([1], [u]) == [expected]
    for temperature in (0, 1e-9, 1e-300):
        assert table.drafter(temperature).propose([1], [0.0, 1 - 2**-24]) == [5, 5]


def test_peeked_draws_are_the_next_ones():
    rng = Rng(3, 4)
    rng.uniform()
    assert rng.peek(5) == [rng.uniform() for _ in range(5)]


# -- the text


@st.composite
def tables(draw) -> DraftTable:
    ids = st.integers(0, V - 1)
    likely = st.dictionaries(ids, st.integers(1, NONE - 1), max_size=ALTERNATIVES - 1)
    entries = draw(st.dictionaries(st.lists(ids, max_size=CONTEXT).map(tuple), st.tuples(likely, ids), max_size=20))
    return rows(*((list(context), {**more, best: 0}) for context, (more, best) in entries.items()))


@settings(max_examples=60)
@given(
    tables(),
    st.integers(0, 1000),
    st.fixed_dictionaries(
        {"max_length": st.integers(0, 90), "temperature": st.sampled_from([0, 0.3, 0.8, 1.5])},
        optional={
            "top_k": st.sampled_from([1, 3, 40]),
            "top_p": st.just(0.9),
            "min_p": st.just(0.05),
            "repetition_penalty": st.just(1.3),
            "banned": st.just("eé\n"),
            "stop": st.just(["a", "qu"]),
        },
    ),
)
def test_no_table_changes_the_text(lm, table, seed, options):
    options |= {"rng_seed": seed, "overflow": "shift"}
    assert with_table(lm, table).generate("Zoë", **options) == lm.generate("Zoë", **options)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Ids of each pass through the model."""
    found, push, read = [], KVCache.decode_one, KVCache.verify
    monkeypatch.setattr(KVCache, "decode_one", lambda self, id: (found.append(1), push(self, id))[1])
    monkeypatch.setattr(KVCache, "verify", lambda self, ids: (found.append(len(ids)), read(self, ids))[1])
    return found


def test_accepted_drafts_save_passes(lm, passes):
    stream = lm.stream("The owl", 40, temperature=0)
    text, ids, plain = "".join(stream), stream._state.history, len(passes)
    passes.clear()
    followed = {tuple(ids[at - CONTEXT : at]): ids[at] for at in range(7, len(ids))}
    right = rows(*((list(context), {id: 0}) for context, id in followed.items()))
    assert "".join(with_table(lm, right).stream("The owl", 40, temperature=0)) == text
    assert len(passes) < plain / 2
    assert set(passes) <= {1, 1 + DRAFTS}


def test_logits_are_not_computed_twice(lm, passes):
    """A stop within a pass, and the end: neither more ids than wanted nor a pass more."""
    certain = rows(([], {97: 0}))
    for length in range(1, 10):
        passes.clear()
        assert with_table(lm, certain).generate("x", length, allowed="a", temperature=0) == "x" + "a" * length
        assert len(passes) == -(-(length - 1) // (1 + DRAFTS))
    assert with_table(lm, certain).generate("x", 9, allowed="a", stop="aaaaa", min_length=2) == "xaa"


def test_a_draft_table_with_a_low_acceptance_rate_is_not_used(lm, passes):
    wrong = rows(([], {0: 0}))
    model = with_table(lm, wrong)
    for piece in model.stream("x", 1000, banned="\0", overflow="shift"):
        assert "\0" not in piece
    late = passes[-500:]
    assert late.count(1) > 0.7 * len(late)
    assert late.count(1 + DRAFTS) > 0  # now and then it is tried again


def test_fewer_drafts_where_a_longer_pass_costs_more(lm, passes):
    assert [drafts_per_pass(p, 10**7) for p in ("fp32", "int8", "int4")] == [5, 3, 0]
    assert {drafts_per_pass(p, 10**5) for p in ("fp32", "int8", "int4")} == {5}
    state = lm.stream("x", 9, temperature=0)._state
    for table, count in ((rows(([], {97: 0})), 0), (None, 3), (rows(([], {97: 0})), 3)):
        SpeculativeDecoder(KVCache(lm._session), table, count, 0.0).predict(state)
    assert passes == [1, 1, 4]


def test_log_probabilities(lm):
    models = (lm, with_table(lm, rows(([], {97: 0}))))
    streams = [model.stream("The", 40, logprobs=True, rng_seed=2) for model in models]
    found = [[nats for _ in stream for nats in stream.logprobs] for stream in streams]
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert len(found[0]) == 40


def test_a_pass_of_several_ids(lm):
    ids = np.random.default_rng(1).integers(0, V, 12)
    whole = lm.logits(ids[None])[0]
    decoder = KVCache(lm._session)
    decoder.prefill(ids[:4])
    assert np.abs(decoder.verify([*ids[4:6], 1, 2])[:2] - whole[4:6]).max() < 1e-4
    decoder.truncate(2)
    assert decoder.lengths.tolist() == [6]
    assert np.abs(decoder.verify(ids[6:10].tolist()) - whole[6:10]).max() < 1e-4
    assert np.abs(decoder.decode_one(ids[10]) - whole[10]).max() < 1e-4
    assert decoder.snapshot().shape[2] == decoder.longest == 11


# -- made at the export


def test_the_draft_table_holds_mean_probabilities(lm):
    ids = np.tile(np.random.default_rng(4).integers(97, 101, 37), 12)
    table = distil(lm, ids)
    assert table.table["context"].tolist() == sorted(table.table["context"].tolist())
    found = {row["context"].item(): row for row in table.table}
    size, seen = lm.block_size, {}
    for start in range(0, len(ids), size):
        row = ids[start : start + size]
        logits = lm.logits(row[None])[0].astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for t in range(CONTEXT - 1, len(row)):
            chances[t][np.argsort(chances[t])[:-ALTERNATIVES]] = 0
            for length in range(CONTEXT + 1):
                seen.setdefault(pack(row[t + 1 - length : t + 1].tolist()), []).append(chances[t])
    assert found.keys() == {context for context, each in seen.items() if len(each) >= MIN_SEEN}
    for context, row in found.items():
        mean = np.mean(seen[context], axis=0)
        best = np.sort(np.argsort(-mean, kind="stable")[:ALTERNATIVES])
        kept = row["nats"] < NONE
        assert set(row["ids"][kept]) <= set(best.tolist())
        assert row["ids"][kept].tolist() == sorted(row["ids"][kept].tolist())
        nats = np.log(mean.max() / mean[row["ids"][kept]])
        assert np.abs(row["nats"][kept] * STEP - nats).max() < STEP


def test_the_draft_table_of_an_export(tiny_run, tmp_path, passes):
    export_checkpoint(best_checkpoint(tiny_run), tmp_path / "export")
    model = LanguageModel.load(tmp_path / "export")
    options = {"temperature": 0.8, "rng_seed": 1, "overflow": "shift", "max_length": 300}
    plain = LanguageModel(model._session).generate("an old owl", **options)
    alone = len(passes)
    passes.clear()
    text = model.generate("an old owl", **options)
    assert text == plain
    assert len(passes) < 0.7 * alone
    assert (tmp_path / "export" / DRAFT_TABLE_FILE).stat().st_size < 400_000
    passes.clear()
    assert model.generate_many(["an old owl"], **options) == [plain]  # as infer.py does
    assert len(passes) < 0.7 * alone


def test_no_draft_table_without_a_validation_text(tmp_path):
    path = save_onnx(random_model(block_size=2), tmp_path / "model.onnx")
    write_draft_table(path, "some text")
    assert not (tmp_path / DRAFT_TABLE_FILE).exists()
    assert len(LanguageModel.load(path).generate("a", 9)) == 10


def test_the_old_name_of_the_file_is_still_read(tmp_path):
    path = save_onnx(random_model(), tmp_path / "model.onnx")
    write_draft_table(path, "")
    (tmp_path / DRAFT_TABLE_FILE).rename(tmp_path / "guesses.npy")
    assert len(LanguageModel.load(path)._draft_table.table) > 0


# -- bad input


DAMAGES = [
    "empty", "no npy", "zip", "cut", "longer", "another type", "two dimensions", "pickle", "header", "tokens", "shape",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_left_aside_with_a_warning(tmp_path, damage):
    path = save_onnx(random_model(), tmp_path / "model.onnx")
    write_draft_table(path, "")
    file = tmp_path / DRAFT_TABLE_FILE
    table, whole = np.load(file), file.read_bytes()
    if damage in ("another type", "two dimensions", "pickle"):
        other = {"another type": table["nats"], "two dimensions": table[None], "pickle": np.array([{}])}[damage]
        np.save(file, other)
    elif damage == "zip":
        with file.open("wb") as stream:
            np.savez(stream, table=table)
    else:
        shape = f"({len(table)},)".encode()
        contents = {
            "empty": b"", "no npy": b"draft_table", "cut": whole[:-5], "longer": whole + b"x",
            "tokens": whole.replace(b"{", b"[", 1),
            "header": b"\x93NUMPY\1\0\xff\xff{(", "shape": whole.replace(shape, b"(1099511627776,)"),
        }  # fmt: skip
        file.write_bytes(contents[damage])
    tracemalloc.start()
    with pytest.warns(UserWarning, match=r"draft_table.npy is damaged; export the model again") as caught:
        model = LanguageModel.load(path)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert len(caught) == 1
    file.unlink()
    assert model.generate("a", 20, rng_seed=1) == LanguageModel.load(path).generate("a", 20, rng_seed=1)


@pytest.mark.parametrize("field", ["ids", "nats"])
def test_the_table_of_another_model(tmp_path, field):
    path = save_onnx(random_model(), tmp_path / "model.onnx")
    write_draft_table(path, "")
    table = np.load(tmp_path / DRAFT_TABLE_FILE)
    table[field][3] = {"ids": V, "nats": 1}[field]
    np.save(tmp_path / DRAFT_TABLE_FILE, table)
    with pytest.warns(UserWarning, match=r"draft_table.npy belongs to another model; export the model again"):
        assert LanguageModel.load(path).generate("a", 5)


def test_the_command_line_warns_of_a_damaged_table_in_one_line(tmp_path, capsys):
    path = save_onnx(random_model(), tmp_path / "model.onnx")
    (tmp_path / DRAFT_TABLE_FILE).write_bytes(b"PK\3\4")
    assert cli.run(cli.infer, ["--model", str(path), "--seed", "a", "--max-length", "5", "--rng-seed", "1"]) == 0
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / DRAFT_TABLE_FILE} is damaged; export the model again, or delete the file; "
        "texts are the same without it, and come more slowly\n"
    )
