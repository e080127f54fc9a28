# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM: each feed-forward layer has a small and a big module, and a token takes one of them or skips both.

Attention is shared and always runs. A path is the choice of a token at every layer: 0 skip, 1 small, 2 big.

Shapes: B batch, N tokens, L layers, R rows, D features, K = 3 choices (2 modules where a method says which run).

Source: Alizadeh et al. 2024, "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
arXiv:2410.10846.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive import ragged
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet

CHOICES = ("skip", "small", "big")
SKIP, SMALL, BIG = range(3)

# A module as a function of its parameters and rows, with its parameters.
Unit = tuple[Callable[[Any, Float[Array, "T D"]], Float[Array, "T D"]], Any]


def random_paths(key: Array, shape: tuple[int, ...], shares: Sequence[float]) -> Int[Array, "..."]:
    """Choices of `shape`, each drawn by itself: the first stage of training, after which every path is a valid model.

    Args:
      shape: such as `[B, N, L]`.
      shares: probabilities of skip, small and big.

    Raises:
      ValueError: the shares are not three probabilities with sum 1.

    Source: Alizadeh et al. 2024, stage 1: small and big with probability 0.5 each, for each token at each layer.
    """
    check_shares(shares)
    return jax.random.choice(key, len(CHOICES), shape, p=jnp.asarray(shares, jnp.float32)).astype(jnp.int32)


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares as floats.

    Raises:
      ValueError: they are not three probabilities with sum 1.
    """
    shares = tuple(float(share) for share in shares)
    if len(shares) != len(CHOICES) or min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(f"shares are probabilities of {', '.join(CHOICES)} with sum 1; got {shares}")
    return shares


def router_shares(
    logits: Float[Array, "... K"], sharpness: float | Array = 1.0, *, prior: Sequence[float] = (0.0, 0.5, 0.5)
) -> Float[Array, "... K"]:
    """`softmax(sharpness * logits + log prior)` in float32: the prior for undecided routers, harder as the sharpness grows.

    Args:
      logits: of skip, small and big.
      sharpness: factor of the logits.
      prior: shares of undecided routers; a module whose share is 0 is not allowed. With the budget as the share of big, a
        router starts within its budget, so that training need not first close all layers alike.

    Raises:
      ValueError: a Python sharpness that is not positive, a prior that does not sum to 1, or logits of another number.

    Source: Alizadeh et al. 2024, stage 3.

    Differs: the text prints `exp(logit) / tau` with a rising tau; this is a softmax whose factor rises (a reconstruction). The
    prior is ours.
    """
    if logits.shape[-1] != len(CHOICES):
        raise ValueError(f"a router has one logit for each of {CHOICES}; got {logits.shape[-1]}")
    if isinstance(sharpness, (int, float)) and sharpness <= 0:
        raise ValueError(f"the sharpness of a router must be positive; got {sharpness}")
    offset = jnp.log(jnp.asarray(check_shares(prior), jnp.float32))
    return jax.nn.softmax(sharpness * logits.astype(jnp.float32) + offset, axis=-1)


def prior_of(budget: float, *, allow_skip: bool) -> tuple[float, float, float]:
    """The shares of undecided routers within a budget: big as it says, and what is left for small, or small and skip alike.

    Raises:
      ValueError: the budget does not lie between 0 and 1: there is nothing to decide.
    """
    if not 0.0 < budget < 1.0:
        raise ValueError(f"routers decide where the budget lies between 0 and 1; got {budget}")
    rest = 1.0 - budget
    return (rest / 2, rest / 2, budget) if allow_skip else (0.0, rest, budget)


def sharpness_at(step: Any, steps: int, first: float, last: float) -> Any:
    """The factor of the logits at a step: geometric from `first` to `last` over `steps`.

    Differs: the paper gives no schedule; this one is a reconstruction.
    """
    done = jnp.clip(step / max(steps - 1, 1), 0.0, 1.0)
    return first * (last / first) ** done


def budget_loss(shares: Float[Array, "B N L K"], budget: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum, count)` over tokens of `(mean over layers of the share of big - budget)^2`: one budget for all layers together.

    Args:
      shares: of the routers of all layers.
      budget: mean share of big, in 0..1.

    Raises:
      ValueError: the budget lies outside 0..1.

    Source: Alizadeh et al. 2024, stage 3; alpha, its weight, is not given there.
    """
    check_budget(budget)
    excess = jnp.mean(shares[..., BIG], axis=-1) - budget
    return jnp.sum(jnp.square(excess)), jnp.float32(excess.size)


def check_budget(budget: float) -> float:
    """The budget, a mean share of big.

    Raises:
      ValueError: it lies outside 0..1.
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"a budget is the mean share of big modules, in 0..1; got {budget}")
    return budget


def big_score(logits: Float[Array, "... K"], *, allow_skip: bool = True) -> Float[Array, "..."]:
    """By how much the logit of big exceeds the best other one; a router takes big where it is above a threshold, usually 0."""
    rest = logits[..., SKIP:BIG] if allow_skip else logits[..., SMALL:BIG]
    return (logits[..., BIG] - jnp.max(rest, axis=-1)).astype(jnp.float32)


def decide(
    logits: Float[Array, "... K"], threshold: float | Array = 0.0, *, allow_skip: bool = True
) -> Int[Array, "..."]:
    """Hard choices of a router: big above the threshold of `big_score`, else the better one of the others."""
    other = jnp.where(logits[..., SKIP] > logits[..., SMALL], SKIP, SMALL) if allow_skip else SMALL
    return jnp.where(big_score(logits, allow_skip=allow_skip) > threshold, BIG, other).astype(jnp.int32)


@register(
    "duo_llm",
    kind="width",
    paper="Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    citation="Alizadeh et al. 2024. arXiv:2410.10846",
    signals=("choice_logits",),
    trained="yes",
)
def duo_llm(
    tokens: TokenSet, signals: Signals, *, threshold: float = 0.0, allow_skip: bool = True
) -> Float[Array, "B N K"]:
    """The module of each token, small or big, `[B, N, 2]` of 0 and 1; none where it skips, and in padding.

    Args:
      tokens: the token set; signals: `choice_logits [B, N, 3]` of the router, for skip, small and big.
      threshold: of `big_score`; allow_skip: whether a token may take neither.

    Source: Alizadeh et al. 2024, stage 3.
    """
    choice = decide(signals.choice_logits, threshold, allow_skip=allow_skip)
    taken = choice[..., None] == jnp.asarray((SMALL, BIG))
    return jnp.where(taken & tokens.valid[..., None], 1.0, 0.0)


def calibrate(scores: Float[Array, "..."], budget: float) -> Float[Array, ""]:
    """The threshold of `big_score` above which a share `budget` of the scores lies: never at 0, always at 1.

    Raises:
      ValueError: the budget lies outside 0..1.
    """
    check_budget(budget)
    if budget in (0.0, 1.0):
        return jnp.float32(jnp.inf if budget == 0.0 else -jnp.inf)
    return jnp.quantile(scores.reshape(-1), 1.0 - budget)


def mixture(outputs: Sequence[Float[Array, "... D"]], shares: Float[Array, "... K"]) -> Float[Array, "... D"]:
    """`sum over modules of share * output`; `outputs` are those of small and big, as skipping adds nothing.

    Source: Alizadeh et al. 2024, stage 3.
    """
    small, big = outputs
    shares = shares.astype(small.dtype)
    return shares[..., SMALL, None] * small + shares[..., BIG, None] * big


def masked(outputs: Sequence[Float[Array, "... D"]], choice: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The output of each token's choice where both modules ran for all: the form of training, and the check of `compacted`."""
    small, big = outputs
    choice = choice[..., None]
    return jnp.where(choice == BIG, big, jnp.where(choice == SMALL, small, jnp.zeros_like(small)))


def compacted(small: Unit, big: Unit, rows: Float[Array, "R D"], choice: Int[Array, " R"], *, tile: int = 128) -> Array:
    """`[R, D]`: each row's chosen module run on its rows alone, zeros where it skips.

    Rows are sorted, big ones first; each module then runs on a run of rows, in tiles whose number is known on the device only.

    Args:
      small, big: `(function, parameters)`; a function works on each row by itself.
      tile: rows a step.
    """
    stairs = ragged.Staircase.create(choice, BIG)
    chosen, bigs = stairs.counts[0], stairs.counts[1]
    in_order = stairs.sort(rows)
    out = ragged.ragged_prefix(*big, in_order, bigs, tile=tile)
    # The small module's rows follow those of the big one: turned to the front, and back.
    turned = ragged.ragged_prefix(*small, jnp.roll(in_order, -bigs, axis=0), chosen - bigs, tile=tile)
    return stairs.unsort(out + jnp.roll(turned, bigs, axis=0))
