"""leanserve.errors: who is to blame decides the class, and the class decides what happens."""

from __future__ import annotations

import pickle

import pytest

from leanserve import errors


def test_the_tree() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.LeanserveError) is (kind is not errors.ClientDisconnected), name
    assert issubclass(errors.SettingsError, ValueError)
    assert issubclass(errors.AppProtocolError, RuntimeError)


def test_a_client_that_left_is_an_oserror() -> None:
    """ASGI 2.4: send() "should raise ... an exception of a subclass of OSError"; frameworks catch that."""
    with pytest.raises(OSError):
        raise errors.ClientDisconnected("gone")
    assert not issubclass(errors.ClientDisconnected, errors.LeanserveError)


def test_a_peer_error_carries_its_answer() -> None:
    error = errors.RemoteProtocolError(
        "bad", status=426, close_code=1009, headers=[(b"upgrade", b"websocket")]
    )
    assert (error.reason, error.status, error.close_code) == ("bad", 426, 1009)
    assert error.headers == [(b"upgrade", b"websocket")]
    assert str(error) == "bad"
    plain = errors.RemoteProtocolError("bad")
    assert (plain.status, plain.close_code, list(plain.headers)) == (400, 1002, [])


@pytest.mark.parametrize("kind", [errors.SettingsError, errors.BootFailed, errors.ClientDisconnected])
def test_what_may_cross_a_process_keeps_its_message(kind: type[Exception]) -> None:
    assert str(pickle.loads(pickle.dumps(kind("one line")))) == "one line"
