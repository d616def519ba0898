"""The cache folder: from SMALLM_CACHE, or in the home of the user, who may have none."""

from pathlib import Path

import pooch
import pytest

from smallm.errors import UserError
from smallm.runs.cache_folder import cache_folder


def test_a_tilde_stands_for_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("SMALLM_CACHE", "~/x")
    assert cache_folder() == tmp_path / "x"


@pytest.mark.parametrize("folder", ["", "/x/caches"])
def test_the_users_cache_folder_is_that_of_pooch(monkeypatch, folder):
    monkeypatch.delenv("SMALLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    assert cache_folder() == Path(pooch.os_cache("smallm"))


def test_other_systems(monkeypatch, tmp_path):
    monkeypatch.delenv("SMALLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "smallm"
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert cache_folder() == Path("/local/smallm/smallm/Cache")


def no_home(*_):
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_the_message_names_the_variable(monkeypatch):
    monkeypatch.delenv("SMALLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="has no home folder; set SMALLM_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("SMALLM_CACHE", "~nobody/x")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(UserError, match="SMALLM_CACHE=~nobody/x: there is no such home folder"):
        cache_folder()
