"""GenerationConfig: one definition of every option, from which arguments, flags, help and the table are made."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
from toys import manifest_of, random_model

from smallm import GenerationConfig, LanguageModel, UserError
from smallm.cli import infer
from smallm.generation.config import GenerationOptions, options_table

NAMES = [f.name for f in fields(GenerationConfig)]
METHODS = (LanguageModel.generate, LanguageModel.generate_many, LanguageModel.stream, LanguageModel.stream_many)


def test_the_types_for_checkers_are_those_of_the_dataclass():
    expected = get_type_hints(GenerationConfig)
    assert get_type_hints(GenerationOptions) == {name: expected[name] for name in NAMES if name != "max_length"}


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_every_option(method):
    parameters = inspect.signature(method).parameters
    assert set(NAMES) < set(parameters)
    assert "options" not in parameters
    for each in GenerationConfig.options():
        assert f"\n    {each.name}: {each.help} Default: {each.shown_default}.\n" in method.__doc__ + "\n"
        assert each.name == "max_length" or parameters[each.name].default == each.default
    assert ">>> " in method.__doc__
    assert "UserError" in method.__doc__ or "errors as for `" in method.__doc__


def test_every_option_has_a_flag_and_a_row_in_the_table():
    flags = infer._parser()._option_string_actions
    for each in GenerationConfig.options():
        assert f"| `{each.name}` |" in options_table()
        if each.flag:
            assert flags[f"--{each.flag}"].dest == flags[f"--{each.flag.replace('-', '_')}"].dest == each.name
    assert {each.name for each in GenerationConfig.options() if not each.flag} == {"stream_number"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 3}, "there is no option topk; did you mean top_k?"),
        ({"max_lenght": 5}, "there is no option max_lenght; did you mean max_length?"),
        ({"zzz": 1}, "there is no option zzz; there are: max_length, min_length, "),
        ({"stop": None}, "stop = None is not a string; it must be a string or a list of strings"),
        ({"stop": [1]}, "stop = 1 is not a string"),
        ({"stop": b"x"}, "stop = 120 is not a string"),
        ({"temperature": "hot"}, "temperature = 'hot' is not a number; it must be 0 or more"),
        ({"top_k": True}, "top_k = True is not a whole number"),
        ({"overflow": "bogus"}, "overflow = 'bogus' is unknown; it must be 'crop', 'shift' or 'slide'"),
        ({"min_length": None}, "min_length = None is not a whole number"),
        ({"rng_seed": "1"}, "rng_seed = '1' is not a whole number; it must be from 0 to 4294967295"),
    ],
)
def test_wrong_names_and_types(options, message):
    with pytest.raises(UserError) as caught:
        GenerationConfig(**options)
    assert str(caught.value).startswith(message)


def test_resolved_for_a_model():
    config = GenerationConfig(top_k=5, stop=["a", ""]).resolve(manifest_of(random_model()))
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.7, 5, 0.95, 0.01)
    assert (config.repetition_window, config.overflow, config.stop, config.allowed) == (16, "shift", ("a",), None)
    assert 0 <= config.rng_seed < 1 << 32
    assert GenerationConfig().resolve(manifest_of(random_model(window=6))).overflow == "slide"
