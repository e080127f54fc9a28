# SPDX-License-Identifier: Apache-2.0
"""Adaptive Computation Modules: a module is N small learners in a row, and a gate says how many of them a token gets.

Learner n adds to the sum of those before it, so a choice is a prefix: the units that run are the first k. Weights of all
learners lie side by side: `up [D, U]`, `bias [U]`, `down [U, E]`, learner n owning columns `n U / K` to `(n + 1) U / K`.

Shapes: B batch, N tokens, R rows, D features, E outputs, K learners, U hidden numbers of all learners, C choices, S modules.

Source: Wojcik et al. 2025, "Adaptive Computation Modules: Granular Conditional Computation for Efficient Inference".
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adaptive import ragged, relaxations
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet
from pallas_kernels import partition
from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS

_TINY = 1e-20


# --- Sizes --------------------------------------------------------------------------------------------------------


def mlp_width(hidden: int, learners: int) -> int:
    """Hidden width of one learner of a feed-forward layer, so that all of them together are as wide as the layer.

    Raises:
      ValueError: fewer than one learner, or a number that does not divide the width.
    """
    if learners < 1 or hidden % learners:
        near = [n for n in range(1, hidden + 1) if hidden % n == 0 and n <= 2 * max(learners, 1)]
        raise ValueError(
            f"{learners} learners do not divide a hidden width of {hidden}; choose one of {near}, or another mlp_dim"
        )
    return hidden // learners


def projection_width(inputs: int, outputs: int, learners: int) -> int:
    """Hidden width of one learner of a projection `[inputs, outputs]` with a bias, so that all cost what it costs.

    Raises:
      ValueError: so many learners that none has a hidden number.

    Source: Wojcik et al. 2025; for a square projection `(D^2 + D) / (N (2 D + 1))`, rounded.
    """
    whole = (inputs * outputs + outputs) / (inputs + outputs + 1)
    width = round(whole / learners) if learners > 0 else 0
    if width < 1:
        raise ValueError(
            f"{learners} learners are too many for a projection of {inputs} to {outputs}: at most {int(2 * whole)} have a "
            f"hidden number each, and at least one is needed"
        )
    return width


# --- The choice ---------------------------------------------------------------------------------------------------


def choose(logits: Float[Array, "... C"], key: Array | None = None, *, temperature: float = 0.8) -> Array:
    """One-hot choice `[..., C]`: the largest logit, or with a key a Gumbel-softmax sample with a straight-through gradient.

    Source: Wojcik et al. 2025; temperature from the public code.
    """
    if key is None:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return relaxations.gumbel_softmax(logits.astype(jnp.float32), key, temperature=temperature, hard=True)


def units(choice: Float[Array, "... C"], learners: int) -> Float[Array, "... K"]:
    """1 for each learner that runs under a one-hot choice, the sum of its tail; the gradient of every choice reaches it.

    Choices are 0 to K learners (C = K + 1), or where nothing may be left out 1 to K (C = K).

    Raises:
      ValueError: another number of choices.
    """
    if choice.shape[-1] not in (learners, learners + 1):
        raise ValueError(
            f"{learners} learners take {learners + 1} choices (0 to {learners}) or {learners} (1 to {learners}); "
            f"got {choice.shape[-1]}"
        )
    tails = jnp.flip(jnp.cumsum(jnp.flip(choice, axis=-1), axis=-1), axis=-1)
    return tails[..., -learners:]


@register(
    "acm",
    kind="width",
    paper="Adaptive Computation Modules: Granular Conditional Computation for Efficient Inference",
    citation="Wojcik et al. 2025, AAAI, arXiv:2312.10193",
    signals=("choice_logits",),
    trained="yes",
)
def acm(tokens: TokenSet, signals: Signals, *, least: int = 0, temperature: float = 0.8) -> Float[Array, "B N K"]:
    """The first k learners of each token, `[B, N, K]` of 0 and 1, k chosen by the gate; none in padding.

    Args:
      tokens: the token set; signals: `choice_logits [B, N, K + 1 - least]`, and `rng` to draw in training.
      least: fewest learners, 0 under a residual, 1 for projections; temperature: of the Gumbel-softmax.

    Raises:
      ValueError: `least` is neither 0 nor 1.

    Source: Wojcik et al. 2025.
    """
    if least not in (0, 1):
        raise ValueError(f"least must be 0 or 1 learners; got {least}")
    logits = signals.choice_logits
    learners = logits.shape[-1] - 1 + least
    if signals.rng is None:
        # What `units` makes of the largest logit, without the sums.
        chosen = (jnp.argmax(logits, axis=-1)[..., None] + least > jnp.arange(learners)).astype(jnp.float32)
    else:
        chosen = units(choose(logits, signals.rng, temperature=temperature), learners)
    return jnp.where(tokens.valid[..., None], chosen, 0.0)


# --- Outputs ------------------------------------------------------------------------------------------------------


def prefixes(
    rows: Float[Array, "R D"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    learners: int,
    *,
    activation: str,
    detach: bool = True,
) -> Float[Array, "R P E"]:
    """What the module gives with 0, 1, ... K learners: `[R, K + 1, E]`.

    With `detach` the gradient of prefix n reaches learner n alone, the sum of those before it being a constant.

    Source: Wojcik et al. 2025 (tail sum); `detach` is what runs in the public code.
    """
    hidden = ACTIVATIONS[activation](rows @ up + bias).reshape(rows.shape[0], learners, -1)
    single = jnp.einsum("rkh,khe->rke", hidden, down.reshape(learners, -1, down.shape[1]))
    single = jnp.pad(single, ((0, 0), (1, 0), (0, 0)))
    total = jnp.cumsum(single, axis=1)
    return relaxations.straight_through(total, single) if detach else total


def masked(
    rows: Float[Array, "R D"],
    chosen: Float[Array, "R K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
) -> Float[Array, "R E"]:
    """The module with every learner computed and those that are not chosen set to 0; for training, and to compare with."""
    hidden = ACTIVATIONS[activation](rows @ up + bias)
    return (hidden * jnp.repeat(chosen.astype(hidden.dtype), up.shape[1] // chosen.shape[1], axis=1)) @ down


def skipping(
    rows: Float[Array, "R D"],
    chosen: Float[Array, "R K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
    least: int = 0,
    implementation: str | None = None,
) -> Float[Array, "R E"]:
    """The same with learners that are not chosen skipped: rows sorted by how many they need, a prefix for each learner.

    The first `least` learners, which every row has, run on all rows where they stand. Over several devices each sorts its own
    rows.
    """
    run = functools.partial(_skipping, activation=activation, least=least, implementation=implementation)
    return partition.by_batch(run)(rows, chosen, whole=(up, bias, down))


def _skipping(
    rows: Array,
    chosen: Array,
    *,
    whole: tuple[Array, Array, Array],
    activation: str,
    least: int,
    implementation: str | None,
) -> Array:
    up, bias, down = whole
    used = least * up.shape[1] // chosen.shape[1]
    base = ACTIVATIONS[activation](rows @ up[:, :used] + bias[:used]) @ down[:used] if least else None
    if least == chosen.shape[1]:
        return base
    stairs = ragged.Staircase.create(jnp.sum(chosen[:, least:], axis=1).astype(jnp.int32), chosen.shape[1] - least)
    options = {"activation": activation, "base": base, "implementation": implementation}
    return ragged.ragged_prefix_mlp(rows, stairs, up[:, used:], bias[used:], down[used:], **options)


# --- Phases of training -------------------------------------------------------------------------------------------


def distillation_loss(outputs: Float[Array, "R P E"], target: Float[Array, "R E"]) -> Float[Array, ""]:
    """Mean squared error of all prefixes but the empty one, over rows, prefixes and features.

    Source: Wojcik et al. 2025 (module-wise distillation); the empty prefix, which the public code counts, is a constant.
    """
    return jnp.mean(jnp.square(outputs[:, 1:] - target[:, None]))


def errors(outputs: Float[Array, "R P E"], target: Float[Array, "R E"]) -> Float[Array, "R P"]:
    """Distance of each prefix from the target, `[R, K + 1]`."""
    return jnp.sqrt(jnp.sum(jnp.square(outputs - target[:, None]), axis=-1))


def gate_labels(distances: Float[Array, "R P"], tau: float) -> Int[Array, " R"]:
    """How many learners a gate should give each row: the first from the second on that leaves at least `tau` of the error.

    `[R]`, in 2..K, and K where every learner takes more than that away (1 with a single learner).

    Raises:
      ValueError: tau outside (0, 1].

    Source: Wojcik et al. 2025, gate pre-training: `min{n >= 2: d(n) / d(n - 1) >= tau}`, K if there is none.

    Differs: the public code gives K too when the first ratio of all, that of learner 1, is the one.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], the share of error that a learner has to leave; got {tau}")
    learners = distances.shape[1] - 1
    enough = distances[:, 2:] >= tau * distances[:, 1:-1]
    if learners < 2:
        return jnp.full(distances.shape[:1], learners, jnp.int32)
    first = jnp.argmax(enough, axis=1) + 2
    return jnp.where(jnp.any(enough, axis=1), first, learners).astype(jnp.int32)


def gate_loss(logits: Float[Array, "R C"], labels: Int[Array, " R"], learners: int) -> Float[Array, ""]:
    """Mean cross-entropy in nats of the gate's choice against labels in 0..K learners.

    Differs: the public code takes that of the Gumbel one-hot sample, whose logarithm is that of 0 or 1.
    """
    index = labels - (learners + 1 - logits.shape[-1])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), index[:, None], axis=-1))


def warn_if_degenerate(histograms: Mapping[str, np.ndarray], tau: float, *, limit: float = 0.99) -> None:
    """Warns of every module whose labels are nearly all the same, with their histogram; its gate would learn a constant.

    Args:
      histograms: name of a module to `[K + 1]` counts of labels; limit: share of one label that is too much.
    """
    for name, counts in histograms.items():
        shares = np.asarray(counts, np.float64) / max(float(np.sum(counts)), 1.0)
        if shares.max() < limit:
            continue
        listed = ", ".join(f"{k} learners: {share:.3f}" for k, share in enumerate(shares))
        advice = "lower" if shares.argmax() == len(shares) - 1 else "raise"
        warnings.warn(
            f"tau={tau} labels nearly every token of {name} alike ({listed}); {advice} tau so that labels differ",
            stacklevel=2,
        )


# --- Losses of the whole model ------------------------------------------------------------------------------------


def spent(chosen: Sequence[Array], costs: Sequence[float], weight: Float[Array, "B N"] | None = None) -> Array:
    """Share of all learners' cost that each example spends, `[B]` in 0..1.

    Args:
      chosen: `[B, N, K]` of each module, see `units`.
      costs: MACs of one learner of each module for one token.
      weight: `[B, N]`, 0 for padding; 1 everywhere when None.

    Raises:
      ValueError: numbers of modules and costs differ.
    """
    if len(chosen) != len(costs):
        raise ValueError(f"one cost a module is needed; got {len(costs)} for {len(chosen)} modules")
    total = sum(cost * jnp.sum(_per_example(c, weight), axis=-1) for c, cost in zip(chosen, costs, strict=True))
    return total / sum(cost * c.shape[-1] for c, cost in zip(chosen, costs, strict=True))


def budget_loss(share: Float[Array, " B"], target: float | Array) -> Float[Array, ""]:
    """Distance of the batch's mean share of cost from the target, 0 at best.

    Raises:
      ValueError: a Python target outside (0, 1] (a traced one cannot be checked).

    Source: Wojcik et al. 2025, L_b.
    """
    if isinstance(target, (int, float)):
        check_target(target)
    return jnp.abs(jnp.mean(share) - target)


def check_target(target: float) -> float:
    """`target` as it came.

    Raises:
      ValueError: outside (0, 1].
    """
    if not 0 < target <= 1:
        raise ValueError(f"the target budget must lie in (0, 1], a share of all learners' cost; got {target}")
    return target


def entropy_loss(
    chosen: Sequence[Array], weight: Float[Array, "B N"] | None = None, *, least: Sequence[int] | None = None
) -> Float[Array, ""]:
    """Negative entropy of the choices within an example, in -1 (all choices as frequent) to 0 (always the same).

    Args:
      chosen: `[B, N, K]` of each module; weight: as in `spent`; least: fewest learners of each module, 0 when None.

    Source: Wojcik et al. 2025, L_e.
    """
    least = [0] * len(chosen) if least is None else least
    return sum(_negative_entropy(c, weight, n) for c, n in zip(chosen, least, strict=True)) / len(chosen)


def _negative_entropy(chosen: Array, weight: Array | None, least: int) -> Array:
    tails = _per_example(chosen, weight)
    # The share that has exactly k learners is the share that has k, less the share that has k + 1.
    shares = jnp.pad(tails, ((0, 0), (1, 0)), constant_values=1.0) - jnp.pad(tails, ((0, 0), (0, 1)))
    shares = jnp.maximum(shares[:, least:], 0.0)
    return jnp.mean(jnp.sum(shares * jnp.log(shares + _TINY), axis=-1)) / np.log(shares.shape[-1])


def diversity_loss(chosen: Sequence[Array], weight: Float[Array, "B N"] | None = None) -> Float[Array, ""]:
    """Minus the mean distance of two examples' mean shares of learners, in -1..0; 0 when all examples spend alike.

    Source: Wojcik et al. 2025, L_d.

    Differs: the printed sign would make examples alike, so the sign is that of the public code, whose factor 2 and mean over
      K + 1 are left out.
    """
    share = sum(jnp.mean(_per_example(c, weight), axis=-1) for c in chosen) / len(chosen)
    return -jnp.mean(jnp.abs(share[:, None] - share[None, :]))


def _per_example(chosen: Float[Array, "B N K"], weight: Float[Array, "B N"] | None) -> Float[Array, "B K"]:
    """Share of an example's tokens that run each learner."""
    if weight is None:
        return jnp.mean(chosen, axis=1)
    total = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
    return jnp.einsum("bnk,bn->bk", chosen, weight / total)
