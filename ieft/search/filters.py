"""User-written filters over the columns of a vector store: short SQL comparisons, checked before they run."""

import re

MAX_WHERE = 10_000  # characters
# What may stand before a bracket in a filter: no function that makes long strings, which would fill the memory.
WHERE_WORDS = frozenset(
    "abs and any between by cast ceil contains date date_part date_trunc else ends_with exists extract floor ilike in "
    "interval is length like lower not now or regexp_like round starts_with strpos then timestamp to_timestamp trim "
    "try_cast upper when".split()
)


def check_where(where):
    """The filter as it is, or None.

    Raises:
        ValueError: for anything that is not a short comparison of columns.
    """
    if where is None or where == "":
        return None
    if not isinstance(where, str) or len(where) > MAX_WHERE or is_not_text(where):
        raise ValueError(
            f"where must be an SQL expression of up to {MAX_WHERE:,} characters; got {ascii(where)[:200]}."
        )
    outside = re.sub(r"'(?:[^']|'')*'", "''", where)
    found = re.search(r"\\'|[;?$]|--|/\*|\|\||[\"`\]]\s*\(", outside if "\\'" not in where else "\\'")
    words = [word for word in re.findall(r"(\w+)\s*\(", outside) if word.lower() not in WHERE_WORDS]
    if found or words:
        wrong = words[0] if words else found.group()
        raise ValueError(
            f'where must be a comparison such as "width >= 256 AND north > 48", and {wrong!r} cannot stand in one. '
            f"Functions: {', '.join(sorted(WHERE_WORDS))}."
        )
    return where


def fetch(query, where, **options):
    """Rows of a LanceDB query as dicts.

    Args:
        where: as `check_where` gave it.
        options: of the query's `where`.

    Raises:
        ValueError: where the filter is at fault, with the filter.
    """
    if not where:
        return query.to_list()
    try:
        return query.where(where, **options).to_list()
    except OSError:
        raise
    except Exception as error:  # LanceDB's: ValueError, RuntimeError, a panic of its parser
        reason = re.split(r", \S+\.rs:\d+", str(error))[0][:500]  # where in LanceDB's own code
        raise ValueError(f"where={where[:200]!r} cannot filter: {reason}") from error


def is_not_text(text):
    """Whether it holds half a character, as the names of files that are not UTF-8 do."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
