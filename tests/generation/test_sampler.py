"""The sampler: the rule that turns logits and u into an id, by hand and by counting, and the generator of u."""

import json
import math

import make_golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ranked

from smallm.errors import UserError
from smallm.generation.logits_processors import apply_repetition_penalty
from smallm.generation.rng import Rng, mix
from smallm.generation.sampler import cumulative_weights, log_probability, pick, sample
from smallm.model_file.sampling import Sampling

LAST_U = 1 - 2.0**-24
PROBABILITIES = np.array([0.1, 0.4, 0.3, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
PLAIN = {"temperature": 1.0}
GOLDEN = json.loads(make_golden.FILE.read_text(encoding="utf-8"))  # for hosts in other languages too


def distribution(logits, **options):
    """id -> probability."""
    ids, weights = ranked(np.asarray(logits, np.float32), Sampling(**options))
    return dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))


def take(logits, u, **options):
    return sample(np.asarray(logits, np.float32), u, Sampling(**options))


# -- which ids may be taken, and how likely


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: 0.4, 2: 0.3, 3: 0.2, 0: 0.1}),
        ({"temperature": 0.5}, {1: 16 / 30, 2: 9 / 30, 3: 4 / 30, 0: 1 / 30}),
        ({"temperature": 0}, {1: 1.0}),
        ({"temperature": 1e9}, {1: 0.25, 2: 0.25, 3: 0.25, 0: 0.25}),
        ({"temperature": 1e-9}, {1: 1.0, 2: 0.0, 3: 0.0, 0: 0.0}),
        ({"temperature": 5e-324}, {1: 1.0, 2: 0.0, 3: 0.0, 0: 0.0}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_k": 4}, {1: 0.4, 2: 0.3, 3: 0.2, 0: 0.1}),
        ({"top_k": 99}, {1: 0.4, 2: 0.3, 3: 0.2, 0: 0.1}),
        ({"top_p": 1e-9}, {1: 1.0}),
        ({"top_p": 0.39}, {1: 1.0}),
        ({"top_p": 0.41}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.71}, {1: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        ({"top_p": 0.99}, {1: 0.4, 2: 0.3, 3: 0.2, 0: 0.1}),
        ({"min_p": 0.26}, {1: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        ({"min_p": 0.51}, {1: 4 / 7, 2: 3 / 7}),
        ({"min_p": 1.0}, {1: 1.0}),
        # top_p counts what top_k left: 0.4 of 0.9 is less than half, 0.7 of 0.9 is more
        ({"top_k": 3, "top_p": 0.5}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_k": 2, "top_p": 0.5}, {1: 1.0}),
        ({"top_k": 3, "min_p": 0.7}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.99, "min_p": 0.7}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.41, "min_p": 0.26}, {1: 4 / 7, 2: 3 / 7}),
        # temperature comes before top_p and min_p: 16, 9, 4, 1 of 30
        ({"temperature": 0.5, "top_p": 0.8}, {1: 16 / 25, 2: 9 / 25}),
        ({"temperature": 0.5, "min_p": 0.5}, {1: 16 / 25, 2: 9 / 25}),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.99, "min_p": 0.2}, {1: 16 / 29, 2: 9 / 29, 3: 4 / 29}),
    ],
)
def test_distribution(options, expected):
    found = distribution(LOGITS, **(PLAIN | options))
    assert list(found) == list(expected)  # also the order, likeliest first
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_equal_logits_are_ordered_by_id():
    logits = [1.0, 2.0, 1.0, 2.0]
    assert list(distribution(logits, **PLAIN)) == [1, 3, 0, 2]
    assert list(distribution(logits, temperature=1.0, top_k=3)) == [1, 3, 0]
    assert list(distribution(logits, temperature=1.0, min_p=1.0)) == [1, 3]
    assert take(logits, 0.0, temperature=0) == take(logits, LAST_U, temperature=0) == 1
    assert [take([0.0] * 4, u, **PLAIN) for u in (0.0, 0.25, 0.5, LAST_U)] == [0, 1, 2, 3]


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=300), st.floats(0, LAST_U))
def test_temperature_zero_is_argmax_for_every_u(logits, u):
    assert take(logits, u, temperature=0) == int(np.argmax(np.float32(logits)))
    assert take(logits, u, temperature=0, top_k=3, top_p=0.5) == int(np.argmax(np.float32(logits)))


def test_extreme_temperatures_are_finite_and_right():
    assert take([0.0, 1.0, 0.999], LAST_U, temperature=1e-9) == 1
    assert take([1e30, -1e30], LAST_U, temperature=1e-9) == 0
    assert [take([0.0, 50.0, 9.0], u, temperature=1e9) for u in (0.0, 0.5, LAST_U)] == [0, 1, 2]  # by id, not by rank


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.3}])
def test_u_at_both_ends_of_its_range(options):
    kept = sorted(distribution(LOGITS, **PLAIN, **options))
    assert take(LOGITS, 0.0, **PLAIN, **options) == kept[0]
    assert take(LOGITS, LAST_U, **PLAIN, **options) == kept[-1]
    assert take([3.0], LAST_U, **PLAIN, **options) == 0
    # ids of no weight are never taken, not even by the last u
    assert take([0.0, -2000.0, -2000.0], LAST_U, **PLAIN) == 0
    assert take([-2000.0, 0.0, -2000.0], 0.0, **PLAIN) == 1


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.85}, {"min_p": 0.4}, {"top_k": 3, "top_p": 0.6}]
)
def test_frequencies_over_a_grid_of_u_are_the_probabilities(options):
    options, n = PLAIN | options, 10_000
    counts = np.bincount([take(LOGITS, i / n, **options) for i in range(n)], minlength=4)
    expected = distribution(LOGITS, **options)
    for id in range(4):  # an interval of length p holds p n grid points, give or take one
        assert abs(counts[id] - n * expected.get(id, 0.0)) <= 1


@settings(max_examples=200)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60),
    st.floats(0, LAST_U),
    st.floats(0.05, 5),
    st.integers(0, 70),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_agrees_with_a_naive_reading_of_the_definition(logits, u, temperature, top_k, top_p, min_p):
    logits = [float(np.float32(x)) for x in logits]
    kept = make_golden.first_kept(logits, temperature, top_k, top_p, min_p)
    ids, weights = ranked(np.float32(logits), Sampling(temperature, top_k, top_p, min_p))
    assert weights[0] == 1.0
    if ids.tolist() == list(kept):
        cumulative = np.cumsum([kept[id] for id in sorted(kept)])
        close = np.abs(cumulative - u * cumulative[-1]).min() < 1e-12 * cumulative[-1]
        found = take(logits, u, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert close or found == make_golden.take(kept, u)
    else:  # a sum stands within rounding of a bound
        all_weights = list(make_golden.first_kept(logits, temperature, top_k, 1.0, 0.0).values())
        total = sum(all_weights)
        bounds = [abs(w - min_p) for w in all_weights] + list(np.abs(np.cumsum(all_weights) - top_p * total))
        assert min(bounds) < 1e-12 * total


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, -math.inf, 3.0]), min_size=1, max_size=80),
    st.floats(0, LAST_U),
    st.integers(0, 90),
    st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.0, 0.2]),
)
def test_sample_follows_the_ranking_with_ties(logits, u, top_k, top_p, min_p):
    logits, sampling = np.float32(logits), Sampling(0.7, top_k, top_p, min_p)
    if logits.max() == -math.inf:
        return
    ids, weights = ranked(logits, sampling)
    places = np.argsort(ids)
    cumulative = np.cumsum(weights[places])
    assert sample(logits, u, sampling) == ids[places[np.flatnonzero(cumulative > u * cumulative[-1])[0]]]


@settings(max_examples=300)
@given(
    st.lists(st.lists(st.sampled_from([-math.inf, -2.5, 0.0, 0.5, 3.0]) | st.floats(-9, 9, width=32), min_size=7,
                      max_size=7), min_size=1, max_size=5),
    st.floats(0, LAST_U),
    st.sampled_from([0.3, 0.8, 1e9]),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.05, 1.0]),
)  # fmt: skip
def test_rows_together_give_the_probabilities_of_single_rows(rows, u, temperature, top_k, min_p):
    logits, sampling = np.float32(rows), Sampling(temperature, top_k, min_p=min_p)
    weights = cumulative_weights(logits, sampling)
    if weights is None:  # ties at the edge of top_k, or only minus infinity
        edges = np.sort(logits, axis=1)[:, ::-1]
        assert (edges == -math.inf).all(axis=1).any() or (edges[:, top_k - 1] == edges[:, top_k]).any()
    else:
        assert [pick(row, u) for row in weights] == [sample(row, u, sampling) for row in logits]


def test_rows_with_filters_are_processed_one_by_one():
    rows = np.float32([[1, 2, 3], [2, 1, 2]])
    assert cumulative_weights(rows, Sampling(temperature=0)) is None
    assert cumulative_weights(rows, Sampling(top_p=0.9)) is None
    assert cumulative_weights(rows, Sampling(top_k=1)) is None  # which of the equal ones?
    assert cumulative_weights(rows, Sampling(top_k=2)) is not None
    for bad in (math.nan, math.inf):
        assert cumulative_weights(np.float32([[1, 2, 3], [1, bad, 2]]), Sampling()) is None


@settings(max_examples=200)
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=60, unique=True),
    st.sampled_from([{}, {"top_k": 6}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 7, "top_p": 0.99}]),
    st.integers(0, 10**9),
)
def test_a_swap_of_ranks_by_rounding_changes_nothing(logits, options, seed):
    """As between hosts, whose logits differ in the seventh digit. Both are well inside of what is kept."""
    rng = np.random.default_rng(seed)
    one, other = rng.choice(len(logits), 2, replace=False)
    logits = np.float32(logits)
    logits[[one, other]] = 5, 5 + 2.0**-20  # the likeliest two, 1e-6 apart, and then the other way round
    swapped = logits.copy()
    swapped[[one, other]] = logits[[other, one]]
    sampling = Sampling(temperature=1.0, **options)
    (before, weights), (after, _) = ranked(logits, sampling), ranked(swapped, sampling)
    assert list(before[:2]) == list(after[1::-1]) == [other, one]
    assert len(before) == len(after)
    edges = np.cumsum(weights[np.argsort(before)]) / weights.sum()
    for u in rng.integers(0, 1 << 24, 30) / 2.0**24:
        assert sample(logits, u, sampling) == sample(swapped, u, sampling) or np.abs(edges - u).min() < 2e-6


def test_the_logits_are_not_modified():
    logits = np.array(LOGITS)
    for options in ({}, {"top_k": 2}, {"temperature": 0}, {"top_p": 0.5, "min_p": 0.1}):
        take(logits, 0.5, **PLAIN | options)
        apply_repetition_penalty(logits, [0, 1], 2.0)
        log_probability(logits, 1)
    assert (logits == LOGITS).all()


@pytest.mark.parametrize(
    ("ids", "penalty", "expected"),
    [
        ([], 2.0, [2.0, -1.0, 0.0, -math.inf]),
        ([0], 2.0, [1.0, -1.0, 0.0, -math.inf]),
        ([0, 0, 0], 2.0, [1.0, -1.0, 0.0, -math.inf]),  # once, however often it occurs
        ([0, 1, 2, 3], 4.0, [0.5, -4.0, 0.0, -math.inf]),
        ([1, 0], 0.5, [4.0, -0.5, 0.0, -math.inf]),
        ([0, 1], 1.0, [2.0, -1.0, 0.0, -math.inf]),
    ],
)
def test_repetition_penalty(ids, penalty, expected):
    found = apply_repetition_penalty(np.float32([2.0, -1.0, 0.0, -math.inf]), ids, penalty)
    assert found.dtype == np.float32
    assert found.tolist() == expected


def test_repetition_penalty_is_in_single_precision():
    assert apply_repetition_penalty(np.float32([3.0]), [0], 1.1)[0] == np.float32(3) / np.float32(1.1)
    assert apply_repetition_penalty(np.float32([-3e38]), [0], 100.0)[0] == -math.inf


def test_log_probability():
    assert log_probability(LOGITS, 2) == pytest.approx(math.log(0.3), rel=1e-6)
    assert log_probability(np.float32([3e38, -3e38]), 0) == 0
    assert log_probability(np.float32([0, -math.inf]), 1) == -math.inf


@pytest.mark.parametrize("case", GOLDEN["ids"], ids=str)
def test_golden_ids(case):
    """Twelve steps, with Rng(7), a repetition window of 8, and nothing before them."""
    rng, ids = Rng(7), []
    sampling = Sampling(case["temperature"], case["top_k"], case["top_p"], case["min_p"])
    for step in range(12):
        logits = np.float32(make_golden.golden_logits(step % 3))
        logits = apply_repetition_penalty(logits, ids[-8:], case["repetition_penalty"])
        ids.append(sample(logits, rng.uniform(), sampling))
    assert ids == case["ids"]


def test_golden_json_equals_the_output_of_its_script():
    text = make_golden.FILE.read_text(encoding="utf-8")
    assert make_golden.content(json.loads(text)) == text


# -- mistakes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 1}])
def test_logits_that_are_not_finite(bad, place, options):
    logits = [1.0, 2.0, 3.0]
    logits[place] = bad
    for broken in (logits, [bad] * 3, [-math.inf] * 3):
        with pytest.raises(UserError, match="not finite"):
            take(broken, 0.5, **options)
        with pytest.raises(UserError, match="not finite"):
            distribution(broken, **options)


def test_a_logit_of_minus_infinity_is_a_probability_of_zero():
    logits = [-math.inf, 1.0, -math.inf, 1.0]
    assert distribution(logits, temperature=0.5) == {1: 0.5, 3: 0.5, 0: 0.0, 2: 0.0}
    assert take(logits, LAST_U, temperature=0.5) == 3
    assert take(logits, LAST_U, temperature=0) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_k", -1), ("top_k", 2.5), ("top_k", math.nan), ("top_k", None),
        ("top_p", 0), ("top_p", 1.01), ("top_p", -1), ("top_p", math.nan), ("top_p", [0.5]),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan), ("min_p", "a"),
    ],
)  # fmt: skip
def test_options_out_of_range(name, value):
    with pytest.raises(UserError, match=f"^{name} = .* is (out of range|not a (whole )?number); it must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (1 << 32, 0), (1.5, 0), ("a", 0), (0, -1), (0, 1 << 32)])
def test_seeds_out_of_range(seed, stream):
    with pytest.raises(UserError, match=r"(rng_seed|stream_number) = .* is (out of range|not a whole number)"):
        Rng(seed, stream)


def test_numpy_numbers_are_accepted():
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.float32(0.1)).top_k == 3
    assert Rng(np.uint32(4294967295), np.int64(1)).uniform() == Rng(4294967295, 1).uniform()


def test_given_options_override_the_defaults():
    given_, defaults = {"temperature": 0, "top_k": None}, {"temperature": 0.7, "top_k": 5, "unknown": 1}
    assert Sampling.resolve(given_, defaults) == Sampling(temperature=0, top_k=5, top_p=1.0, min_p=0.0)
    assert Sampling.resolve({}, {}) == Sampling()


# -- the generator


@pytest.mark.parametrize("case", GOLDEN["draws"], ids=str)
def test_golden_draws(case):
    seed, stream = case["rng_seed"], case["stream_number"]
    rng = Rng(seed, stream)
    assert [rng.uniform() for _ in range(5)] == [(x >> 8) / 16777216 for x in case["x"]]
    assert rng.draws == 5
    assert numpy_draws(seed, stream, 5).tolist() == case["x"]


def numpy_mix(x):
    """lowbias32 in numpy's uint32 arithmetic, which is modulo 2**32."""
    x = np.atleast_1d(x).astype(np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def numpy_draws(seed, stream, n):
    key = numpy_mix(numpy_mix(np.uint32(seed)) + np.uint32(stream))
    return numpy_mix(key + np.arange(1, n + 1, dtype=np.uint32) * np.uint32(0x9E3779B9))


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_draws_agree_with_32_bit_arithmetic(seed, stream):
    rng = Rng(seed, stream)
    assert [rng.uniform() * 2**24 for _ in range(8)] == (numpy_draws(seed, stream, 8) >> 8).tolist()


@given(st.integers(-(1 << 40), 1 << 40))
def test_mix_takes_its_argument_modulo_two_to_the_32(x):
    assert mix(x) == mix(x % (1 << 32)) == int(numpy_mix(np.uint32(x % (1 << 32)))[0])


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 0), (1, 1), (123456789, 7)])
def test_draws_are_uniform(seed, stream):
    rng = Rng(seed, stream)
    draws = np.array([rng.uniform() for _ in range(20_000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / math.sqrt(12 * len(draws))  # four standard deviations
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    expected = len(draws) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)  # chi-square, 63 degrees of freedom
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / math.sqrt(len(draws))


def test_streams_and_seeds_are_uncorrelated():
    rngs = [Rng(seed, stream) for seed in (0, 1, 2) for stream in (0, 1, 2)]
    draws = np.array([[rng.uniform() for _ in range(4000)] for rng in rngs])
    correlations = np.corrcoef(draws)[np.triu_indices(len(rngs), 1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(4000)
