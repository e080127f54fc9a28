# SPDX-License-Identifier: Apache-2.0
"""The registry: names, records, and clear errors for what is not there."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.reduction import select
from adaptive.tokens import Reduction, Signals, TokenSet


@contextlib.contextmanager
def registered(name, function, **arguments):
    """A method that is in the registry inside the context only."""
    try:
        yield registry.register(name, **arguments)(function)
    finally:
        registry._RECORDS.pop(name, None)


def first_tokens(tokens, signals, budget, *, sharpness=2.0, order="rising"):
    """Keeps the first tokens.

    Source: nobody.

    Differs: it is
    made up for a test.
    """
    scores = -jnp.arange(tokens.mass.shape[1], dtype=jnp.float32) * sharpness
    return select.prune(jnp.broadcast_to(scores, tokens.mass.shape), tokens, signals, budget)


def test_a_registered_method_is_described_listed_and_callable():
    entry = dict(kind="reduction", paper="A paper", citation="Somebody. 2020.", signals=("keys",), trained="optional")
    assert "first_tokens" not in registry.names()
    with registered("first_tokens", first_tokens, **entry) as returned:
        assert returned is first_tokens
        assert "first_tokens" in registry.names() and "first_tokens" in registry.names("reduction")
        assert "first_tokens" not in registry.names("deletion")
        record = registry.describe("first_tokens")
        assert {name: getattr(record, name) for name in entry} == entry
        assert record.hyper == {"sharpness": 2.0, "order": "rising"}
        assert record.differs == "it is made up for a test."
        assert record.function is first_tokens and not record.removes_half
        tokens = TokenSet.create(jnp.arange(8.0).reshape(1, 4, 2))
        got = registry.get("first_tokens")(tokens, Signals(keys=tokens.features), 2, sharpness=3.0).apply(tokens)
        np.testing.assert_array_equal(got.features, tokens.features[:, :2])
    assert "first_tokens" not in registry.names()


def test_a_name_is_taken_once():
    before = registry.describe("tome")
    with pytest.raises(ValueError, match=r"'tome' is registered already \(adaptive.reduction.tome\)"):
        registry.register("tome", kind="reduction")(first_tokens)
    assert registry.describe("tome") is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "deduction"}, r"unknown kind 'deduction' for 'new'; one of \[.*'deletion', .*'reduction'.*\]"),
        ({"kind": "reduction", "trained": "maybe"}, "trained='maybe' for 'new'; one of 'no', 'optional', 'yes'"),
        (
            {"kind": "reduction", "signals": ("keys", "key")},
            r"'new' asks for unknown signals \['key'\]; Signals has .*keys",
        ),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        registry.register("new", **arguments)
    assert "new" not in registry.names()


def test_an_unknown_name_gets_the_nearest_ones():
    for ask in (registry.get, registry.describe):
        with pytest.raises(
            KeyError, match=r"no method is registered as 'tomee'; did you mean 'tome'.*\? Registered: .*evit"
        ):
            ask("tomee")


def test_an_unknown_name_like_no_other_gets_the_list():
    with pytest.raises(KeyError, match=r"no method is registered as 'zzzzzz'\. Registered: .*tome"):
        registry.get("zzzzzz")


def test_names_are_sorted_and_divided_by_kind():
    everything = registry.names()
    assert list(everything) == sorted(everything)
    parts = [registry.names(kind) for kind in registry.KINDS]
    assert sorted(sum(parts, ())) == list(everything)
    assert {"tome", "evit", "class_attention", "random"} <= set(registry.names("reduction"))
    assert {"mrt5", "random_deletion", "fixed_deletion", "no_deletion"} <= set(registry.names("deletion"))
    with pytest.raises(ValueError, match="unknown kind 'reductions'; one of"):
        registry.names("reductions")


def test_records_say_what_the_papers_say():
    record = registry.describe("tome")
    assert (record.kind, record.signals, record.trained, record.removes_half) == (
        "reduction",
        ("keys",),
        "optional",
        True,
    )
    assert "2210.09461" in record.citation and "Your ViT But Faster" in record.paper
    gate = registry.describe("mrt5")
    assert (gate.kind, gate.signals, gate.trained) == ("deletion", ("gate_logits",), "yes")
    assert gate.hyper == {"scale": -30.0, "gumbel": False} and "2410.20771" in gate.citation


def test_get_keeps_the_name_and_the_documentation():
    assert registry.get("tome").__name__ == "tome"
    assert registry.get("tome").__doc__ == registry.describe("tome").function.__doc__


def test_a_false_class_token_is_a_missing_signal():
    with registered("needs_class", first_tokens, kind="reduction", signals=("cls_token",)):
        tokens = TokenSet.create(jnp.zeros((1, 4, 2)))
        with pytest.raises(ValueError, match="needs_class needs the signal 'cls_token'"):
            registry.get("needs_class")(tokens, Signals(), 2)
        assert registry.get("needs_class")(tokens, Signals(cls_token=True), 2).num_slots == 2


@pytest.mark.parametrize("budget", [6, np.int64(6), np.int32(6)])
def test_keeping_everything_is_the_identity_whatever_integer_says_so(budget):
    tokens = TokenSet.create(jax.random.normal(jax.random.key(0), (1, 6, 4)))
    out = registry.get("tome")(tokens, Signals(keys=tokens.features), budget)
    assert isinstance(out, Reduction) and not out.merges
    np.testing.assert_array_equal(out.slots, [[0, 1, 2, 3, 4, 5]])


def test_a_fraction_of_a_token_is_no_budget():
    tokens = TokenSet.create(jnp.zeros((1, 6, 4)))
    with pytest.raises(TypeError, match=r"truncate: a budget is a whole number of tokens; got 4\.5"):
        registry.get("truncate")(tokens, Signals(), 4.5)


def test_errors_come_at_trace_time():
    with pytest.raises(ValueError, match="tome needs the signal 'keys'"):
        jax.eval_shape(
            lambda features: registry.get("tome")(TokenSet.create(features), Signals(), 3).assign, jnp.zeros((1, 6, 4))
        )
