"""The cache folder: from SMALLM_CACHE, or in the home of the user, who may have none."""

from pathlib import Path

import pooch
import pytest

from smallm.errors import UserError
from smallm.training.cache import cache_folder


def test_a_tilde_stands_for_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("SMALLM_CACHE", "~/x")
    assert cache_folder() == tmp_path / "x"


def no_home(*_):
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_the_message_names_the_variable(monkeypatch):
    monkeypatch.delenv("SMALLM_CACHE", raising=False)
    monkeypatch.setattr(pooch, "os_cache", no_home)
    with pytest.raises(UserError, match="has no home folder; set SMALLM_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("SMALLM_CACHE", "~nobody/x")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(UserError, match="SMALLM_CACHE=~nobody/x: there is no such home folder"):
        cache_folder()
