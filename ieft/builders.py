"""Rows and synthetic scenes as splits of the `datasets` library, prepared once and kept.

In: rows with usable images and captions, or a seed of scenes. Out: a `DatasetDict`. It knows nothing of where rows
come from. A file of its own, since the library puts other functions for files and paths into the module of a builder.
"""

import io
from dataclasses import dataclass

import datasets
import numpy as np

from ieft import scenes, twins

SCENES_SEED = 2023
FEATURES = {
    "image": datasets.Image(),
    "filename": datasets.Value("string"),
    "captions": datasets.List(datasets.Value("string")),
}


@dataclass
class CaptionRowsConfig(datasets.BuilderConfig):
    """`sources` is the fingerprint of the rows: part of the cache's key, which the library would not make of it."""

    sources: str = ""


class CaptionRowsBuilder(datasets.GeneratorBasedBuilder):
    """Rows of a source. Image files stay where they are, referred to by absolute path."""

    BUILDER_CONFIG_CLASS = CaptionRowsConfig
    rows: list[dict]

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(FEATURES))

    def _split_generators(self, dl_manager):
        present = {row["split"] for row in self.rows}
        names = [name for name in ("train", "validation", "test") if name in present]
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in names]

    def _generate_examples(self, split):
        for key, row in enumerate(row for row in self.rows if row["split"] == split):
            image = {"path": None, "bytes": row["image"]} if isinstance(row["image"], bytes) else str(row["image"])
            yield key, {"image": image, "filename": row["filename"], "captions": row["captions"]}


@dataclass
class ScenesConfig(datasets.BuilderConfig):
    """`scenes_seed` chooses the scenes, `hard` those of near twins."""

    scenes_seed: int = SCENES_SEED
    hard: bool = False


class ScenesBuilder(datasets.GeneratorBasedBuilder):
    """Synthetic aerial scenes, drawn on the spot."""

    VERSION = datasets.Version("1.0.1")  # raise it when scenes change, so that no old ones come from the cache
    BUILDER_CONFIG_CLASS = ScenesConfig

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(FEATURES))

    def _split_generators(self, dl_manager):
        sizes = twins.SPLITS if self.config.hard else scenes.SPLITS
        starts = np.cumsum([0, *sizes.values()])
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"start": int(start), "count": count})
            for start, (name, count) in zip(starts, sizes.items(), strict=False)
        ]

    def _generate_examples(self, start, count):
        draw = twins.draw_twin if self.config.hard else scenes.draw_scene
        for index in range(start, start + count):
            scene = draw(self.config.scenes_seed, index)
            encoded = io.BytesIO()
            scene.image.save(encoded, "PNG")
            image = {"path": None, "bytes": encoded.getvalue()}
            yield index, {"image": image, "filename": f"scene_{index:05d}.png", "captions": scene.captions}
