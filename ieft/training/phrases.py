"""Short phrases of captions, for training on queries as people type them.

A caption is split into runs of words at punctuation and function words, as RAKE finds its candidate keywords (Rose et
al., "Automatic Keyword Extraction from Individual Documents", in Text Mining: Applications and Theory, 2010). In
English these are mostly noun phrases. Phrases are the runs and their parts: "there are white storage tanks beside a
river" has "white storage tanks", "storage tanks", "tanks", "river" and four more.
"""

import re
from dataclasses import dataclass

import numpy as np

MAX_WORDS = 4  # of a phrase
# The closed classes of English: determiners and quantifiers, pronouns, prepositions and adverbs, conjunctions,
# auxiliaries. Number words stay in phrases, and so does "lot", as in "parking lot".
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither both all any some no none such same other others another
    many much more most several few fewer less least enough plenty various
    i you he she it its itself we they them their theirs themselves his her our your my who whom whose which what
    there here where when while how why
    of in on at by for with without within to from into onto off out up down over under above below beneath beside
    besides between among amongst amid around about along alongside across through throughout near nearby next
    behind before after against toward towards beyond inside outside via upon per than as like
    and or but nor so yet if because since although though whether also too very quite rather just only even not then
    is are was were be been being am has have had having do does did done can could may might must shall should will
    would
    """.split()
)
PARTS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")  # words, or single signs that end a run


def split_runs(caption):
    """The runs of words between punctuation and function words, in lower case: a list of lists of words."""
    runs = [[]]
    for part in PARTS.findall(caption.lower()):
        if part in FUNCTION_WORDS or not part[0].isalnum():
            runs.append([])
        else:
            runs[-1].append(part)
    return [run for run in runs if run]


def find_phrases(caption):
    """The phrases of a caption, each once: its runs and their parts, of up to four words."""
    return list(
        dict.fromkeys(
            " ".join(run[start:stop])
            for run in split_runs(caption)
            for start in range(len(run))
            for stop in range(start + 1, min(start + MAX_WORDS, len(run)) + 1)
        )
    )


@dataclass
class Phrases:
    """The phrases of a collection.

    Attributes:
        texts: the P distinct phrases.
        of_caption: for each caption, the rows of its phrases.
        of_image: for each image, the rows of the phrases of all of its captions. Such an image shows what the phrase
            says, whichever image it was taken from, and is no negative for it.
    """

    texts: list[str]
    of_caption: list[np.ndarray]
    of_image: list[np.ndarray]

    @classmethod
    def from_captions(cls, captions, caption_image, num_images):
        """The phrases of C captions.

        Args:
            caption_image: (C,) row of the image of each caption.
        """
        rows = {}
        of_caption = [[rows.setdefault(phrase, len(rows)) for phrase in find_phrases(each)] for each in captions]
        of_image = [set() for _ in range(num_images)]
        for phrases, image in zip(of_caption, caption_image, strict=True):
            of_image[image].update(phrases)
        as_rows = [[np.array(sorted(each), dtype=np.int64) for each in lists] for lists in (of_caption, of_image)]
        return cls(list(rows), *as_rows)
