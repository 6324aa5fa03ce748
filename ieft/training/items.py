"""Dataset splits as tensors: evaluation sets, and training items with negatives, augmentation and collation.

Every random choice is drawn from (seed, epoch, item), so that a batch is the same in any process and any worker, and
after resuming.
"""

import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch.utils.data import Dataset
from transformers import BertTokenizer

from ieft.evaluation.metrics import keep_unique_captions
from ieft.training.phrases import Phrases
from processing_ieft import to_rgb

MAX_CACHED_BYTES = 256 * 2**20  # resized images of collections up to this size are cached in memory
AUGMENTATIONS = ("randaugment", "turns", "crops", "none")
NEGATIVES = ("distinct", "uniform")
MIN_CROP_AREA = 0.5  # of the image
MAX_COLOUR_CHANGE = 0.3  # of brightness, contrast and saturation
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class SplitImages(Dataset):
    """The images of a split by row: `images[row]` is (3, image_size, image_size) float32 in [-1, 1]."""

    def __init__(self, split, processor):
        self.split = split.select_columns(["image"])
        self.image_processor = processor.image_processor
        small = len(split) * 3 * self.image_processor.image_size**2 <= MAX_CACHED_BYTES
        self._squares = {} if small else None

    def __len__(self):
        return len(self.split)

    def __getitem__(self, row):
        return torch.from_numpy(self.image_processor.scale_pixels(self.square(row)))

    def image(self, row):
        """The image of one row as stored, PIL RGB."""
        return to_rgb(self.split[int(row)]["image"])

    def square(self, row):
        """The image of one row, resized to the network's input size: uint8 (image_size, image_size, 3)."""
        if self._squares is None or row not in self._squares:
            pixels = np.asarray(self.image_processor.fit_square(self.image(row)))
            if self._squares is None:
                return pixels
            self._squares[row] = pixels
        return self._squares[row]


@dataclass
class EvaluationSet:
    """All images and captions of a split; a sentence repeated on one image is kept once.

    Attributes:
        images: the I images by row.
        captions: the C sentences.
        caption_tokens: their token ids.
        caption_image: (C,) row of the image that each caption was written for.
        caption_text_id: (C,) equal for equal sentences.
    """

    images: SplitImages
    captions: list[str]
    caption_tokens: list[list[int]]
    caption_image: np.ndarray
    caption_text_id: np.ndarray

    @classmethod
    def from_split(cls, split, processor):
        captions, caption_image, caption_text_id = keep_unique_captions(split["captions"])
        tokens = tokenize(captions, processor)
        return cls(SplitImages(split, processor), captions, tokens, caption_image, caption_text_id)


def tokenize(captions, processor):
    """Sentences as lists of token ids, truncated at the processor's limit, not padded."""
    return processor(text=list(captions), padding=False, return_tensors=None)["input_ids"] if len(captions) else []


def learn_tokenizer(captions, *, largest=30522):
    """A BERT tokenizer whose vocabulary is the words of the captions; other words are split into characters.

    The trainer of the `tokenizers` library is not used since it breaks ties at random: two runs on the same captions,
    or two processes of one run, would number their tokens differently.

    Args:
        captions: sentences, iterated once.
        largest: maximum size of the vocabulary, by default BERT's; rare words are dropped first.
    """
    special_tokens = BertTokenizer().all_special_tokens
    backend = BertTokenizer().backend_tokenizer
    counts = Counter(
        word
        for caption in captions
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
    )
    characters = sorted({character for word in counts for character in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))
    tokens = dict.fromkeys(["[PAD]", *special_tokens, *characters, *(f"##{each}" for each in characters), *words])
    return BertTokenizer(vocab={token: index for index, token in enumerate(list(tokens)[:largest])})


class TrainingItems(Dataset):
    """One item for each caption of a split: its image, the caption, and `num_negatives` captions of other images.

    Args:
        split: columns `image` and `captions`.
        num_negatives: captions drawn in addition to each item's own; 0 if the negatives come from the batch.
        negatives: "distinct" never draws a sentence that the image itself carries; "uniform", as published, draws
            from all other captions and therefore sometimes a matching one.
        augmentation: "randaugment" (two operations of magnitude 9, as published), "turns" (a random flip or quarter
            turn of the dihedral group, for images without a preferred orientation), "crops" (the same, with a random
            crop, brightness, contrast and saturation: for training from scratch on few images), or "none".
        phrase_probability: how often a caption is replaced by one of its phrases (`ieft.training.phrases`), so that
            short queries are learnt too. An image whose captions contain a phrase is no negative for it.

    Attributes:
        texts: all that a row of a batch can be: the captions, then the phrases.
        text_tokens, text_ids: their token ids, and a number that is equal for equal texts.

    Raises:
        ValueError: if some image has fewer than `num_negatives` captions to draw from.
    """

    def __init__(
        self, split, processor, *, num_negatives=15, negatives="distinct", augmentation="randaugment",
        phrase_probability=0.0, seed=0,
    ):  # fmt: skip
        _check_choice("negatives", negatives, NEGATIVES)
        _check_choice("augmentation", augmentation, AUGMENTATIONS)
        if not 0 <= phrase_probability <= 1:
            raise ValueError(f"phrase_probability must be from 0 to 1; got {phrase_probability}.")
        self.images = SplitImages(split, processor)
        captions, self.caption_image, self.caption_text_id = keep_unique_captions(split["captions"])
        self.captions = captions
        self.filenames = split["filename"] if "filename" in split.column_names else None
        self.caption_tokens = tokenize(captions, processor)
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.num_negatives = num_negatives
        self.negatives = negatives
        self.augmentation = augmentation
        self.seed = seed
        self.image_text_ids = _group_text_ids(self.caption_image, self.caption_text_id, len(split))
        self.texts, self.text_tokens, self.text_ids = self.captions, self.caption_tokens, self.caption_text_id
        self.phrase_probability = phrase_probability
        if phrase_probability:
            self._add_phrases(processor)
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # shared with persistent workers
        self._check_enough_negatives()

    def __len__(self):
        return len(self.caption_tokens)

    @property
    def epoch(self):
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch):
        """Set the epoch, from which augmentations and negatives are drawn."""
        self._epoch[0] = epoch

    def __getitem__(self, item):
        """`pixel_values` (3, S, S), `image` (row), `item`, and `captions` (1 + num_negatives,) rows of `texts`, of the
        own caption or a phrase of it first."""
        generator = np.random.default_rng([self.seed, self.epoch, item])
        image = int(self.caption_image[item])
        pixel_values = self._augmented(image, generator)
        rows = np.concatenate([[item], self._draw_negatives(item, image, generator)]).astype(np.int64)
        if self.phrase_probability:
            self._put_phrases(rows, image, generator)
        return {"pixel_values": pixel_values, "image": image, "item": int(item), "captions": rows}

    def collate(self, items):
        """A batch that contains each caption or phrase once.

        Returns:
            dict: `pixel_values` (I, 3, S, S); `input_ids` and `attention_mask` (C, L), padded to the longest;
            `candidates` (I, 1 + num_negatives) indices of captions, the own caption first; `is_match` (I, C), True if
            the image carries the caption's sentence. For gathering batches and for reports: `items` (I,) as they were
            asked for; `text_ids` (I,) of the own captions, equal for equal sentences; `image_text_ids` (I, T) of
            all sentences of each image, padded with -1.
        """
        own = np.array([item["captions"][0] for item in items])
        rows, columns = np.unique(np.stack([item["captions"] for item in items]), return_inverse=True)
        tokens = [torch.tensor(self.text_tokens[row]) for row in rows]
        input_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(caption) for caption in tokens])
        text_ids = self.text_ids[rows]
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "candidates": torch.from_numpy(columns.reshape(len(items), -1)),
            "is_match": torch.from_numpy(
                np.stack([np.isin(text_ids, self.image_text_ids[item["image"]]) for item in items])
            ),
            "items": torch.tensor([item["item"] for item in items]),
            "text_ids": torch.from_numpy(self.text_ids[own]),
            "image_text_ids": torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(self.image_text_ids[item["image"]]) for item in items],
                batch_first=True,
                padding_value=-1,
            ),
        }

    def describe(self, items):
        """Filename (or row) and caption of each given item, whose place a phrase of it may have taken."""
        images = [int(self.caption_image[item]) for item in items]
        names = [f"image {image}" if self.filenames is None else self.filenames[image] for image in images]
        return [{"filename": name, "caption": self.captions[item]} for name, item in zip(names, items, strict=True)]

    def _augmented(self, image, generator):
        if self.augmentation == "none":
            return self.images[image]
        if self.augmentation == "turns":
            square = turn(self.images.square(image), int(generator.integers(8)))
        elif self.augmentation == "crops":
            square = randomly_cropped(self.images.square(image), generator)
        else:
            square = self.images.image_processor.fit_square(
                randomly_augmented(self.images.image(image), int(generator.integers(2**32)))
            )
        return torch.from_numpy(self.images.image_processor.scale_pixels(np.asarray(square)))

    def _draw_negatives(self, item, image, generator):
        drawn = np.empty(0, dtype=np.int64)
        while len(drawn) < self.num_negatives:
            more = generator.choice(len(self), min(len(self), 2 * self.num_negatives + 1), replace=False)
            more = more[more != item]
            if self.negatives == "distinct":
                more = more[~np.isin(self.caption_text_id[more], self.image_text_ids[image])]
            drawn = np.concatenate([drawn, more[~np.isin(more, drawn)]])
        return drawn[: self.num_negatives]

    def _add_phrases(self, processor):
        """Phrases get rows and ids behind those of the captions; one that is some caption as a whole has its id."""
        phrases = Phrases.from_captions(self.captions, self.caption_image, len(self.image_text_ids))
        ids = {text.lower(): int(number) for text, number in zip(self.captions, self.caption_text_id, strict=True)}
        numbers = np.array([ids.setdefault(text, len(self) + row) for row, text in enumerate(phrases.texts)], int)
        self.caption_phrases = [len(self) + rows for rows in phrases.of_caption]
        self.image_text_ids = [
            np.union1d(own, numbers[rows]) for own, rows in zip(self.image_text_ids, phrases.of_image, strict=True)
        ]
        self.texts = self.captions + phrases.texts
        self.text_tokens = self.caption_tokens + tokenize(phrases.texts, processor)
        self.text_ids = np.concatenate([self.caption_text_id, numbers])

    def _put_phrases(self, rows, image, generator):
        """Replace some rows by a phrase of the caption, in place; negatives by one that the image does not carry."""
        for place in np.flatnonzero(generator.random(len(rows)) < self.phrase_probability):
            phrases = self.caption_phrases[rows[place]]
            if place:
                phrases = phrases[~np.isin(self.text_ids[phrases], self.image_text_ids[image])]
            phrases = phrases[~np.isin(phrases, rows)]
            if len(phrases):
                rows[place] = generator.choice(phrases)

    def _check_enough_negatives(self):
        if not self.num_negatives:
            return
        own = np.ones(len(self.image_text_ids), dtype=np.int64)
        if self.negatives == "distinct":
            counts = np.bincount(self.caption_text_id, minlength=1 + max(ids.max() for ids in self.image_text_ids))
            own = np.array([counts[ids].sum() for ids in self.image_text_ids])
        fewest = len(self) - int(own.max(initial=0))
        if fewest < self.num_negatives:
            raise ValueError(
                f"At least {self.num_negatives} captions of other sentences expected beside each image's own; the "
                f"training split has {fewest}. Lower --num_negatives or train on more images."
            )


def turn(square, which):
    """Flip or quarter turn of a (S, S, 3) array: element `which` (0 to 7) of the dihedral group of the square."""
    turned = np.rot90(square, which % 4)
    return np.ascontiguousarray(turned[:, ::-1] if which >= 4 else turned)


def randomly_cropped(square, generator):
    """A random crop of a (S, S, 3) array scaled to S again, flipped or turned, with other brightness, contrast and
    saturation. The crop has half to all of the area, and the three colour factors are within 0.3 of 1."""
    size = len(square)
    side = size * float(np.sqrt(generator.uniform(MIN_CROP_AREA, 1.0)))
    left, top = generator.uniform(0, size - side, 2)
    image = Image.fromarray(square)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    which = int(generator.integers(8))
    if which:
        image = image.transpose(Image.Transpose(which - 1))  # the other seven elements of the dihedral group
    brightness, contrast, saturation = generator.uniform(1 - MAX_COLOUR_CHANGE, 1 + MAX_COLOUR_CHANGE, 3)
    colours = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * np.array(LUMINANCE))
    offset = np.full((3, 1), 127.5 * (1 - contrast))  # contrast keeps the middle grey
    return np.asarray(image.convert("RGB", tuple(np.hstack([colours, offset]).ravel().tolist())))


def randomly_augmented(image, seed):
    """RandAugment with 2 operations of magnitude 9 (timm), from `seed`; the global generators keep their state."""
    with _seeded_globally(seed):
        return rand_augment_transform("rand-m9-n2-p1", {"interpolation": Image.Resampling.BICUBIC})(image)


@contextmanager
def _seeded_globally(seed):
    """timm draws from the global generators of `random` and numpy."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _group_text_ids(caption_image, caption_text_id, num_images):
    """The ids of the sentences of each image."""
    order = np.argsort(caption_image, kind="stable")
    starts = np.searchsorted(caption_image[order], np.arange(1, num_images))
    return np.split(caption_text_id[order], starts)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
