# SPDX-License-Identifier: Apache-2.0
"""Published schedules against the published counts, and what fills their rows."""

import io
import types

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from flax.core import meta
from PIL import Image

from adaptive.rates.schedules import Schedule
from experiments import tasks
from experiments.bench.diffrate import schedule_of
from experiments.rundir import apply_overrides
from experiments.studies import plots
from experiments.studies.diffrate import compare, published
from experiments.studies.diffrate.runs import Setup
from experiments.studies.graft import graft
from experiments.studies.study import Context
from layers import hf
from layers.vit import ViT


@pytest.mark.parametrize("name", published.SCHEDULES)
def test_multiply_adds_of_published_schedules_are_the_published_ones(name):
    assert published.gmacs(name) == pytest.approx(published.MACS[name], rel=1e-3)


def test_the_schedule_of_the_shapes_spends_the_budget_half_on_pruning():
    model = published.model_of("DeiT-B 11.5")
    schedule = schedule_of(model, 0.6)
    dense = sum(model.spec().macs().values())
    share = sum(model.spec().macs(counts=schedule.counts).values()) / dense
    assert 0.598 < share <= 0.6
    before = (197, *schedule.counts[:-1])
    for entering, alive, left in zip(before, schedule.prune, schedule.merge, strict=True):
        assert abs((entering - alive) - (alive - left)) <= 1


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set of the name and the features of ImageNet, a few small pictures."""

    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(100), "validation": self._generate_examples(6)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(count)
        for index in range(count):
            # Encoded here: TFDS would do it by TensorFlow.
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)).save(file, format="png")
            file.seek(0)
            yield str(index), {"image": file, "label": index, "file_name": f"{index}.png"}


TINY = ViT(16, 8, 2, 2, 16, num_classes=1000, image_size=(48, 48))


def test_images_and_a_checkpoint_fill_the_rows_of_its_family(tmp_path, monkeypatch):
    # The names of published schedules, for a model of two layers and ten tokens.
    monkeypatch.setattr(published, "SCHEDULES", dict.fromkeys(("DeiT-Ti 0.8", "DeiT-S 2.9"), Schedule((9, 4), (7, 3))))
    monkeypatch.setattr(published, "model_of", lambda name: TINY)
    monkeypatch.setattr(published, "EVALUATION_BATCH", 8)
    Imagenet2012(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    shapes = meta.unbox(jax.eval_shape(TINY.init, jax.random.key(0), np.zeros((1, 48, 48, 3), np.float32)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes["params"])
    hf.save(tmp_path / "checkpoints" / "deit-tiny-patch16-224", TINY, {"params": params})
    folders = {"imagenet": str(tmp_path / "tfds"), "imagenet_checkpoints": str(tmp_path / "checkpoints")}
    places = [epath.Path(tmp_path) / name for name in ("results", "runs")]
    said = []
    context = Context("diffrate", "test", {"batches": 1}, *places, said.append, folders)
    made = published.run(context)
    assert made == ["imagenet/DeiT-Ti dense", "imagenet/DeiT-Ti 0.8"]
    table = (places[0] / "imagenet_summary.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "not run" not in lines["DeiT-Ti 0.8"] and lines["DeiT-S 2.9"].count("not run") == 2
    # A second run evaluates nothing again.
    before = list(said)
    assert published.run(context) == made and said == before


def test_queries_of_cropr_start_anew_on_the_trained_backbone():
    """What `Runs.tuned` trains on: the schedule's own parameters are new, all others are those of the dense model."""
    config = Context.config("diffrate/digits.py", "runlocal")
    dense = tasks.build(config).model
    pixels = np.zeros((1, *dense.image_size, dense.channels), np.float32)
    shapes = meta.unbox(jax.eval_shape(dense.init, jax.random.key(0), pixels))["params"]
    trained = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    changed = apply_overrides(config, Setup("cropr", (40, 20, 10)).overrides)
    params = graft(changed, trained)
    assert sorted(set(params) - set(trained)) == ["hooks_0"] and np.ptp(params["hooks_0"]["layer_0"]["queries"]) > 0
    jax.tree.map(np.testing.assert_array_equal, {name: params[name] for name in trained}, trained)


def test_without_images_no_row_is_measured(tmp_path):
    context = Context("diffrate", "test", {"batches": 1}, *[epath.Path(tmp_path)] * 2, print, {})
    assert published.run(context) == []
    table = (epath.Path(tmp_path) / "imagenet_summary.md").read_text()
    assert table.count("not run") == 2 * len(published.SCHEDULES)


def test_the_table_at_equal_compute_counts_the_seeds_that_are_better_than_tome(tmp_path):
    def row(method, accuracy, cross_entropy):
        found = {"target": 50.0, "macs_share": 50.0, "accuracy": accuracy, "cross_entropy": cross_entropy}
        return {"group": method, "method": method, **found}

    learned = [row("diffrate_density, learned", accuracy, loss) for accuracy, loss in ((70.0, 0.9), (69.0, 0.8))]
    plain = [*learned, row("diffrate_density", 68.0, 0.85), row("tome", 69.5, 0.85), row("evit", 99.0, 0.1)]
    context = types.SimpleNamespace(results=epath.Path(tmp_path))
    settings = {"orders": ("density",), "budgets": (0.5, 0.4), "whole": True}
    compare._equal(types.SimpleNamespace(settings=settings, context=context, name="x"), plain)
    lines = (tmp_path / "x_equal_summary.md").read_text().splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]
    assert [line[0] for line in cells] == ["diffrate_density, learned", "diffrate_density", "tome"]
    assert [line[3] for line in cells] == ["1 of 2", "0 of 1", "-"]
    # An equal cross-entropy is not below.
    assert [line[5] for line in cells] == ["1 of 2", "0 of 1", "-"]


def test_seeds_of_a_budget_share_a_colour_and_a_name_in_the_plot_by_layer():
    figure = plots.by_layer({"left": {"85 %": [(9, 7), (9, 6)], "50 %": [(5, 3)]}, "pruned": {"85 %": [(1, 0)]}})
    lines = figure.axes[0].lines
    assert [line.get_xdata().tolist() for line in lines] == [[1, 2]] * 3
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["85 %", "50 %"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["left", "pruned"]
