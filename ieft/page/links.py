"""Links that reopen a search: what was asked as the query of an address, such as `?sentence=ships&top_k=24`."""

import re
from urllib.parse import urlencode

from ieft.search.queries import UNWANTED_WEIGHT

# What a visitor may set -> what it is where nothing is set; in the order in which the page and its API take it.
SETTINGS = {
    "top_k": 12, "rerank_top_k": 32, "width": 0, "height": 0, "name": "", "placed": False, "where": "", "bbox": "",
    "acquired_from": "", "acquired_to": "", "image_weight": 1.0, "unwanted_weight": UNWANTED_WEIGHT,
    "min_probability": 0.0,
}  # fmt: skip
ASKED = {"sentence": "", "without": "", "examples": ()}  # an uploaded image is in no link
NUMBERS = {int: r"[0-9]{1,9}", float: r"[0-9]{1,3}(\.[0-9]{1,3})?"}
LONGEST_LINK = 4000  # characters


def write_link(asked):
    """The query of an address for what was asked, a dict of `ASKED` and `SETTINGS`; what is not set is left out."""
    defaults = ASKED | SETTINGS
    given = {name: value for name, value in asked.items() if value not in (None, "", [], defaults[name])}
    if not any(given.get(name) for name in ASKED):
        return ""
    given = {name: "1" if value is True else value for name, value in given.items()}
    link = "?" + urlencode(given, doseq=True)
    return link if len(link) <= LONGEST_LINK else ""


def read_link(parameters):
    """What an address asks, with what is not set; None where it asks nothing.

    Args:
        parameters: (name, value) pairs, as they stand in the address; others than those of `write_link` are ignored.
    """
    asked = ASKED | SETTINGS | {"examples": []}
    known = [(name, value) for name, value in parameters if name in asked]
    for name, value in known:
        kind = type(SETTINGS.get(name))
        if name == "examples":
            asked[name].append(value)
        elif kind is bool:
            asked[name] = {"1": True, "0": False}.get(value, value)
        elif kind in (int, float):
            asked[name] = kind(value) if re.fullmatch(NUMBERS[kind], value) else value
        else:
            asked[name] = value
    return asked if known else None
