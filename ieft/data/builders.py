"""Builds a prepared and cached `DatasetDict` from rows with usable images and captions, or from synthetic scenes.

This is a file of its own because the `datasets` library replaces functions for files and paths in the module of a
builder.
"""

import io
import logging
from dataclasses import dataclass

import datasets
import numpy as np

from ieft.data import hard_scenes, scenes
from ieft.data.images import is_plain, read_image

logger = logging.getLogger(__name__)

SCENES_SEED = 2023
FEATURES = {
    "image": datasets.Image(),
    "filename": datasets.Value("string"),
    "captions": datasets.List(datasets.Value("string")),
}


def make_example(row, *, bands=None):
    """A row as the library stores it, and whether its image had to be converted.

    Plain image files are referred to by absolute path. Others, which the library's decoding would distort or fail to
    read, are read by `read_image` and stored as 8-bit RGB PNG.
    """
    image, plain = row["image"], is_plain(row["image"], bands=bands)
    if not plain:
        encoded = io.BytesIO()
        read_image(image, bands=bands).save(encoded, "PNG")
        image = encoded.getvalue()
    image = {"path": None, "bytes": image} if isinstance(image, bytes) else str(image)
    return {"image": image, "filename": row["filename"], "captions": row["captions"]}, not plain


@dataclass
class CaptionRowsConfig(datasets.BuilderConfig):
    """`sources` is the fingerprint of the rows; as a field it becomes part of the cache key."""

    sources: str = ""


class CaptionRowsBuilder(datasets.GeneratorBasedBuilder):
    """Builds a dataset of the rows of a source; `bands` selects the bands of their images."""

    BUILDER_CONFIG_CLASS = CaptionRowsConfig
    rows: list[dict]
    bands: tuple | None = None

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(FEATURES))

    def _split_generators(self, dl_manager):
        present = {row["split"] for row in self.rows}
        names = [name for name in ("train", "validation", "test") if name in present]
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in names]

    def _generate_examples(self, split):
        count = 0
        for key, row in enumerate(row for row in self.rows if row["split"] == split):
            example, converted = make_example(row, bands=self.bands)
            count += converted
            yield key, example
        if count:
            logger.warning(
                "%s: %d images are stored as 8-bit RGB PNG of at most 2048 x 2048 pixels: they are larger, or have "
                "bands or bit depths that must be selected or stretched.", split, count,
            )  # fmt: skip


@dataclass
class ScenesConfig(datasets.BuilderConfig):
    """`scenes_seed` selects the scenes; `hard` selects hard scenes."""

    scenes_seed: int = SCENES_SEED
    hard: bool = False


class ScenesBuilder(datasets.GeneratorBasedBuilder):
    """Builds a dataset of synthetic aerial scenes."""

    VERSION = datasets.Version("1.0.1")  # increase it when scenes change, so that the cache is not reused
    BUILDER_CONFIG_CLASS = ScenesConfig

    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(FEATURES))

    def _split_generators(self, dl_manager):
        sizes = hard_scenes.SPLITS if self.config.hard else scenes.SPLITS
        starts = np.cumsum([0, *sizes.values()])
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"start": int(start), "count": count})
            for start, (name, count) in zip(starts, sizes.items(), strict=False)
        ]

    def _generate_examples(self, start, count):
        draw = hard_scenes.draw_twin if self.config.hard else scenes.draw_scene
        for index in range(start, start + count):
            scene = draw(self.config.scenes_seed, index)
            encoded = io.BytesIO()
            scene.image.save(encoded, "PNG")
            image = {"path": None, "bytes": encoded.getvalue()}
            yield index, {"image": image, "filename": f"scene_{index:05d}.png", "captions": scene.captions}
