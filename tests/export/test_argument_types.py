"""Arguments of the wrong type to `smallm.export` are a user's mistake: one line that says what to pass."""

import pytest

import smallm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": 5}, "run = 5 is not a path; pass a string or a Path"),
        ({"out": 5}, "out = 5 is not a path; pass a string or a Path"),
        ({"precision": [8]}, "unknown precision"),
        ({"kit": ["c"]}, "unknown kit"),
        ({"precison": "int8"}, "there is no option precison; did you mean precision?"),
    ],
)
def test_a_wrong_argument_is_a_user_error(arguments, message):
    with pytest.raises(smallm.UserError) as caught:
        smallm.export(**arguments)
    assert str(caught.value).startswith(message)
