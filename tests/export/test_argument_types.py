"""Arguments of the wrong type to `smallm.export` are a user's mistake: one line that says what to pass."""

import pytest

import smallm


@pytest.mark.parametrize("arguments", [{"run": 5}, {"out": 5}, {"precision": [8]}, {"kit": ["c"]}], ids=str)
def test_a_wrong_type_is_a_user_error(arguments):
    with pytest.raises(smallm.UserError, match=f"^({next(iter(arguments))} is|unknown) "):
        smallm.export(**arguments)
