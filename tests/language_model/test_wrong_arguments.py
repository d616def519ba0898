"""Every public method and every parameter: a wrong name, number, type or value is one line that says what is wrong."""

import inspect

import numpy as np
import pytest
from toys import random_model, save_onnx

from smallm import GenerationConfig, LanguageModel, TextStream, UserError

GOOD = {"seed": "a", "seeds": ["a"], "text": "abc", "ids": np.array([[1]]), "max_length": 3, "rng_seed": 1}
WRONG = [object(), [None], b"x", float("nan"), lambda: 0, (1, "a"), -3, "\ud800", True, None, 2.5, "x"]
WRONG_EVERYWHERE = WRONG[:5]
METHODS = [
    member
    for cls in (LanguageModel, TextStream)
    for name, member in inspect.getmembers(cls, callable)
    if not name.startswith("_")
]
CALLS = [(method, name) for method in [*METHODS, GenerationConfig] for name in inspect.signature(method).parameters]
CALLS = [(method, name) for method, name in CALLS if name != "self"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_onnx(random_model(), tmp_path_factory.mktemp("wrong") / "toy.onnx")


@pytest.fixture(scope="module")
def bound(path):
    """A function that binds a method to an object."""
    lm = LanguageModel.load(path)

    def bind(method):
        if method is GenerationConfig or inspect.ismethod(method):
            return method
        owner = lm if "LanguageModel" in method.__qualname__ else lm.stream("a", 5)
        return getattr(owner, method.__name__)

    return bind


def required(function, path) -> dict:
    """Right arguments of the parameters without a default, and few characters."""
    known = inspect.signature(function).parameters
    return {
        name: value
        for name, value in {**GOOD, "path": path}.items()
        if name in known and (known[name].default is inspect.Parameter.empty or name in ("max_length", "rng_seed"))
    }


def test_all_methods_are_found():
    assert {method.__name__ for method in METHODS} == {
        "load", "close", "generate", "generate_many", "stream", "stream_many", "next_characters", "logits", "score",
        "perplexity", "branch",
    }  # fmt: skip


@pytest.mark.parametrize(("method", "name"), CALLS, ids=lambda part: getattr(part, "__qualname__", part))
def test_wrong_values(bound, path, method, name):
    function = bound(method)
    for value in WRONG:
        arguments = {**required(function, path), name: value}
        try:
            function(**arguments)
            message = ""
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 220
        assert message or not any(value is wrong for wrong in WRONG_EVERYWHERE), value


@pytest.mark.parametrize("method", [*METHODS, GenerationConfig], ids=lambda method: method.__qualname__)
def test_wrong_names_and_numbers(bound, path, method):
    function = bound(method)
    arguments = required(function, path)
    with pytest.raises(UserError, match=r"^there is no option nonsense; "):
        function(**arguments, nonsense=1)
    with pytest.raises(UserError, match=f"^{method.__qualname__}: too many positional arguments; see help"):
        function(*[1] * 30)
    if set(arguments) - {"max_length", "rng_seed"}:
        with pytest.raises(UserError, match=f"^{method.__qualname__}: missing a required argument: "):
            function()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: LanguageModel.load("x", thread=2), "there is no option thread; did you mean threads?"),
        (lambda lm: LanguageModel.load("x", speculative=1), "speculative = 1 is not a truth value; it must be True or"),
        (lambda lm: LanguageModel("x"), "open a model with LanguageModel.load(path)"),
        (lambda lm: lm.stream("a", logprobs="yes"), "logprobs = 'yes' is not a truth value; it must be True or False"),
        (lambda lm: lm.stream("a").branch(stream_number=-1), "stream_number = -1 is out of range; it must be from 0"),
        (lambda lm: lm.stream("a").branch(True), "rng_seed = True is not a whole number; it must be from 0 to"),
        (lambda lm: lm.next_characters("a", None), "n = None is not a whole number; it must be 0 or more"),
        (lambda lm: lm.perplexity("abc", strides=3), "there is no option strides; did you mean stride?"),
        (lambda lm: lm.generate("a", 5, {}), "LanguageModel.generate: too many positional arguments; see help("),
    ],
)
def test_messages(path, call, message):
    with pytest.raises(UserError) as caught:
        call(LanguageModel.load(path))
    assert str(caught.value).startswith(message)


def test_a_type_error_within_a_call_stays_a_type_error(path):
    def pieces():
        yield len(5)

    with pytest.raises(TypeError, match="has no len"):
        LanguageModel.load(path).perplexity(pieces())


def test_without_speculative_decoding(exported):
    """The same text, since the weights are float32, from a model that ignores the draft table."""
    lm, plain = LanguageModel.load(exported), LanguageModel.load(exported, speculative=False)
    assert lm._draft_table is not None
    assert plain._draft_table is None
    assert plain.generate("a", 50, rng_seed=1) == lm.generate("a", 50, rng_seed=1)
