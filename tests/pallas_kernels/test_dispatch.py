# SPDX-License-Identifier: Apache-2.0
"""The choice of an implementation."""

import pytest

from pallas_kernels import dispatch


def _cannot(reason):
    def run(*args, **kwargs):
        raise NotImplementedError(reason)

    return run


def test_the_platform_comes_before_plain_jax_and_the_interpreter_is_never_chosen():
    assert dispatch.preference("tpu") == ("tpu", "xla")
    assert dispatch.preference("gpu") == ("gpu", "xla")
    assert dispatch.preference("cpu") == ("xla",)


def test_none_takes_the_first_that_can_and_hands_over_the_arguments(monkeypatch):
    monkeypatch.setattr(dispatch, "preference", lambda: ("tpu", "xla"))
    there = {"tpu": lambda x, *, y: ("tpu", x, y), "xla": lambda x, *, y: ("xla", x, y)}
    assert dispatch.call("op", there, None, 1, y=2) == ("tpu", 1, 2)
    assert dispatch.call("op", there | {"tpu": _cannot("head width 7")}, None, 1, y=2) == ("xla", 1, 2)
    assert dispatch.call("op", {"xla": there["xla"]}, None, 1, y=2) == ("xla", 1, 2)


def test_other_errors_are_not_swallowed(monkeypatch):
    monkeypatch.setattr(dispatch, "preference", lambda: ("tpu", "xla"))

    def broken():
        raise ValueError("a real mistake")

    with pytest.raises(ValueError, match="a real mistake"):
        dispatch.call("op", {"tpu": broken, "xla": lambda: 1}, None)


def test_every_reason_is_shown_when_none_can(monkeypatch):
    monkeypatch.setattr(dispatch, "preference", lambda: ("tpu", "xla"))
    with pytest.raises(NotImplementedError, match=r"op.*tpu: head width 7; xla: too long"):
        dispatch.call("op", {"tpu": _cannot("head width 7"), "xla": _cannot("too long")}, None)
    with pytest.raises(NotImplementedError, match=r"tpu: not there; xla: too long"):
        dispatch.call("op", {"xla": _cannot("too long")}, None)


def test_a_name_insists():
    there = {"xla": lambda: "xla", "interpret": _cannot("no such mask")}
    assert dispatch.call("op", there, "xla") == "xla"
    with pytest.raises(NotImplementedError, match="no such mask"):
        dispatch.call("op", there, "interpret")
    with pytest.raises(NotImplementedError, match=r"op has no 'tpu' implementation; there is 'xla', 'interpret'"):
        dispatch.call("op", there, "tpu")
    with pytest.raises(ValueError, match="implementation='cuda'"):
        dispatch.call("op", there, "cuda")


def test_what_is_compiled_for_another_platform_gets_its_implementation():
    implementations = {"tpu": lambda: "tpu", "xla": lambda: "xla"}
    with dispatch.compiled_for("tpu"):
        assert dispatch.call("op", implementations, None) == "tpu"
    assert dispatch.call("op", implementations, None) == "xla"
