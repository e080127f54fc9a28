# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules and optimisers, built by name from plain values, and one update of a train state.

A step count `n` is the number of optimiser updates already made, so the first update uses `n = 0`.
Every optimiser is the same chain, read left to right: clip the gradient, precondition it, add decoupled weight decay,
multiply by minus the learning rate. An update adds gradient accumulation, the moving average and the guard against
values that are not finite.

Shapes: B batch. A batch is a dict of arrays with leading axis B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from experiments import parallel

SCHEDULES = ("cosine", "rsqrt", "linear", "constant")
OPTIMIZERS = ("adamw", "sgd", "adafactor")

# The axis that `nn.scan` adds when it stacks the parameters of equal layers; it does not make a vector a matrix.
LAYERS_AXIS = "layers"


def schedule(
    name: str = "cosine",
    *,
    peak: float,
    warmup: int,
    steps: int,
    end: float = 0.0,
    timescale: int = 0,
    cooldown: int = 0,
) -> optax.Schedule:
    """A learning rate for each update: linear warmup from 0 to `peak`, then the named decay.

    Args:
      name: "cosine" and "linear" fall to `end * peak` at `steps`; "rsqrt" falls as
        `peak * sqrt(timescale / (timescale + n - warmup))`; "constant" stays.
      peak: the highest rate, > 0.
      warmup: updates of linear warmup, 0 for none.
      steps: updates in the whole run.
      end: fraction of `peak` that is left at `steps`, in [0, 1]; cosine and linear only.
      timescale: rsqrt only; 0 means `max(warmup, 1)`, which gives T5's `peak * sqrt(warmup / n)`.
      cooldown: rsqrt and constant only; the rate is multiplied by a line that falls from 1 to 0 over the last updates.

    Raises:
      ValueError: an unknown name, or a number outside the range above.

    Source: cosine: Loshchilov & Hutter 2017, eq. 5, without restarts. rsqrt and its cooldown: Zhai et al. 2022,
      sec. 3.5; with the default timescale it is the T5 schedule, Raffel et al. 2020, sec. 3.1.2.
    """
    _check_schedule(name, peak, warmup, steps, end, timescale, cooldown)
    decay_steps = max(steps - warmup, 1)
    if name == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=end)
    elif name == "linear":
        decay = optax.linear_schedule(peak, peak * end, decay_steps)
    elif name == "rsqrt":
        decay = _rsqrt(peak, timescale or max(warmup, 1))
    else:
        decay = optax.constant_schedule(peak)
    if warmup:
        decay = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])
    return _with_cooldown(decay, steps, cooldown) if cooldown else decay


def _rsqrt(peak: float, timescale: int) -> optax.Schedule:
    """`peak * sqrt(timescale / (timescale + n))`."""
    return lambda n: peak * jnp.sqrt(timescale / (timescale + jnp.asarray(n, jnp.float32)))


def _with_cooldown(base: optax.Schedule, steps: int, cooldown: int) -> optax.Schedule:
    """`base` times a line from 1 at `steps - cooldown` to 0 at `steps`."""
    return lambda n: base(n) * jnp.clip((steps - jnp.asarray(n, jnp.float32)) / cooldown, 0.0, 1.0)


def _check_schedule(name, peak, warmup, steps, end, timescale, cooldown) -> None:
    """Raises ValueError for a schedule that would not do what its numbers say."""
    if name not in SCHEDULES:
        raise ValueError(f"optimizer.schedule is {name!r}; known schedules: {', '.join(SCHEDULES)}.")
    if peak <= 0:
        raise ValueError(f"optimizer.peak is {peak}; the peak learning rate must be above 0.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; a schedule needs at least 1 step.")
    if not 0 <= warmup <= steps:
        raise ValueError(f"optimizer.warmup is {warmup} with steps={steps}; it must lie in [0, steps]. Lower it.")
    if not 0.0 <= end <= 1.0:
        raise ValueError(f"optimizer.end is {end}; it is a fraction of the peak and must lie in [0, 1].")
    if end and name not in ("cosine", "linear"):
        raise ValueError(f"optimizer.end={end} has no meaning for schedule {name!r}; use 0, or cosine or linear.")
    if timescale < 0 or (timescale and name != "rsqrt"):
        raise ValueError(f"optimizer.timescale is {timescale} for schedule {name!r}; only rsqrt takes one (>= 0).")
    if not 0 <= cooldown <= steps - warmup:
        raise ValueError(
            f"optimizer.cooldown is {cooldown}; with steps={steps} and warmup={warmup} it must lie in "
            f"[0, {steps - warmup}]."
        )
    if cooldown and name not in ("rsqrt", "constant"):
        raise ValueError(f"optimizer.cooldown={cooldown} has no meaning for schedule {name!r}, which already decays.")


def build_schedule(config: Mapping[str, Any], steps: int) -> optax.Schedule:
    """The schedule that `config.optimizer` describes; see `schedule`."""
    return schedule(
        config["schedule"],
        peak=config["peak"],
        warmup=config["warmup"],
        steps=steps,
        end=config.get("end", 0.0),
        timescale=config.get("timescale", 0),
        cooldown=config.get("cooldown", 0),
    )


def build(config: Mapping[str, Any], steps: int, *, mask: Any = None) -> optax.GradientTransformation:
    """The optimiser that `config.optimizer` describes.

    Args:
      config: keys `name`, `schedule`, `peak`, `warmup`, `weight_decay`, `clip` (global norm, 0: off), and optionally
        `b1`, `b2`, `eps` (adamw), `momentum` (sgd), `end`, `timescale`, `cooldown` (see `schedule`).
      steps: updates in the whole run.
      mask: which parameters decay, a tree of bool or a function of the parameters; see `decay_mask`. None: every
        parameter of rank 2 or more.

    Raises:
      ValueError: an unknown optimiser, or a negative clip or weight decay.

    Source: adamw: Loshchilov & Hutter 2019, algorithm 2. adafactor: Shazeer & Stern 2018, algorithm 4.
    Differs: weight decay is decoupled and scaled by the learning rate for all three.
    """
    if config["weight_decay"] < 0:
        raise ValueError(f"optimizer.weight_decay is {config['weight_decay']}; it must be 0 (off) or above.")
    if config["clip"] < 0:
        raise ValueError(f"optimizer.clip is {config['clip']}; it is a gradient norm: 0 (off) or above.")
    parts = [_preconditioner(config)]
    if config["clip"]:
        parts.insert(0, optax.clip_by_global_norm(config["clip"]))
    if config["weight_decay"]:
        parts.append(optax.add_decayed_weights(config["weight_decay"], _rank_mask if mask is None else mask))
    parts.append(optax.scale_by_learning_rate(build_schedule(config, steps)))
    return optax.chain(*parts)


def _preconditioner(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """What stands between the clipped gradient and the learning rate."""
    name = config["name"]
    if name == "adamw":
        b1, b2 = config.get("b1", 0.9), config.get("b2", 0.999)
        return optax.scale_by_adam(b1=b1, b2=b2, eps=config.get("eps", 1e-8))
    if name == "sgd":
        momentum = config.get("momentum", 0.9)
        return optax.trace(decay=momentum) if momentum else optax.identity()
    if name == "adafactor":
        # Steps in proportion to each parameter's size: T5, which does not scale its attention logits, learns to look
        # things up by attention several times sooner than with equal steps.
        return optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
    raise ValueError(f"optimizer.name is {name!r}; known optimisers: {', '.join(OPTIMIZERS)}.")


def _rank_mask(params: Any) -> Any:
    """True for parameters of rank 2 or more."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def decay_mask(boxed_params: Any) -> Any:
    """True for each parameter that weight decay applies to: matrices, but no biases and no norm scales.

    Boxes are needed because shapes alone mislead: `nn.scan` over layers turns a norm scale [D] into [L, D], and a
    projection's bias is [H, K]. So the rank is counted without the "layers" axis, and leaves named "bias" or "scale"
    are left out whatever their rank.

    Args:
      boxed_params: `variables["params"]` as flax returns it from `init`, boxed (or plain) arrays or shapes.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        names = leaf.names if isinstance(leaf, meta.Partitioned) else ()
        rank = len(meta.unbox(leaf).shape) - sum(name == LAYERS_AXIS for name in names)
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else ""
        return rank > 1 and name not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, boxed_params, is_leaf=parallel.is_box)


# ---- One update -------------------------------------------------------------------------------------------------------

# The state stores raw key data, which checkpoints like any array; so the generator is named rather than the default.
RNG = "threefry2x32"

# Names that the trainer itself writes for every step, beside the metrics of the task.
OWN_METRICS = ("loss", "grad_norm", "learning_rate")


@flax.struct.dataclass
class TrainState:
    """All that changes while training, apart from the position in the data."""

    step: jax.Array  # int32 []: updates made
    params: Any
    opt_state: Any
    ema: Any  # moving average of params, or None
    extra: Any  # what the task carries from step to step, such as a controller
    rng: jax.Array  # uint32 [2]: constant

    @property
    def average(self) -> Any:
        """The parameters to evaluate: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def make_train_step(
    task: Any,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    mesh: jax.sharding.Mesh,
    *,
    accumulate: int,
    ema: float,
) -> Any:
    """`(state, batch, healthy) -> (state, healthy, outputs)`: one optimiser update, to be jitted.

    `healthy` turns False at the first loss or gradient norm that is not finite, and stays so: from that step on the
    state comes back as it was, however many steps the host has sent before it looks.
    `outputs` has the scalars of OWN_METRICS and "metrics", the task's sums and counts.

    Source: the moving average's decay starts low, `min(ema, (1 + n) / (10 + n))`, as in TensorFlow's
      `ExponentialMovingAverage(num_updates=)`, so that short runs do not average in the initial parameters.
    """

    def train_step(state: TrainState, batch: Any, healthy: jax.Array) -> tuple[TrainState, jax.Array, dict[str, Any]]:
        (loss, task_metrics), grads = accumulated_gradients(task, state, batch, mesh, accumulate)
        norm = optax.tree.norm(grads)
        healthy = healthy & jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=jax.tree.map(lambda old, p: decay * old + (1.0 - decay) * p, state.ema, params) if ema else None,
            extra=task.update_extra(state.extra, task_metrics, state.step),
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        new = jax.tree.map(lambda fresh, old: jnp.where(healthy, fresh, old), new, state)
        own = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate(state.step)}
        return new, healthy, {**own, "metrics": task_metrics}

    return train_step


def accumulated_gradients(
    task: Any, state: TrainState, batch: Any, mesh: jax.sharding.Mesh, accumulate: int
) -> tuple[tuple[jax.Array, Any], Any]:
    """`((loss, metrics), gradients)` of a batch, computed in `accumulate` microbatches one after the other.

    Exact: losses, metrics and gradients of microbatches are divided by normalizers of the whole batch, so they add up.
    """
    normalizers = task.normalizers(batch)
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=RNG), state.step)

    def loss_fn(params: Any, microbatch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        loss, task_metrics = task.loss(
            params, microbatch, rng=rng, step=state.step, extra=state.extra, normalizers=normalizers, train=True
        )
        taken = sorted(set(task_metrics) & set(OWN_METRICS))
        if taken:
            raise ValueError(f"the task's training metrics use {taken}, which the trainer writes itself; rename them.")
        return loss, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), task_metrics)

    loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return loss_and_grad(state.params, batch, jax.random.fold_in(rng, 0))

    def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        microbatch, index = part
        return jax.tree.map(
            jnp.add, total, loss_and_grad(state.params, microbatch, jax.random.fold_in(rng, index))
        ), None

    parts = parallel.split_microbatches(mesh, batch, accumulate)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss_and_grad, state.params, first, rng))
    return jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))[0]
