"""Filters over the columns of a vector store, written by users: comparisons in SQL, checked word by word before the
store sees them."""

import math
import re
from datetime import datetime as Time
from datetime import timedelta, timezone

MAX_WHERE = 10_000  # characters
MAX_TERMS = 2_000  # words, numbers, strings and signs
# Comparisons and signs of arithmetic: a chain of 900 (1 + 1 + 1 ..., true = true = true ...) overflows the store's
# stack, which ends the process.
MAX_OPERATORS = 200
OPERATORS = frozenset("< <= > >= <> != = == + - * / % is like ilike in between".split())
MAX_DEPTH = 20  # brackets in brackets
# Whatever is not listed here is refused. No function makes text longer than its argument, and none repeats work.
FUNCTIONS = frozenset(
    "abs cast ceil contains date_part date_trunc ends_with floor length lower round starts_with strpos substr_index "
    "to_timestamp try_cast upper".split()
)
WORDS = frozenset(
    "and as between bigint boolean date double false float ilike in int is like not null or real timestamp true "
    "tinyint smallint".split()
)
WHERE_WORDS = FUNCTIONS | WORDS
TERM = re.compile(
    r"\s+|(?!--|/\*)(?:(?P<text>'(?:[^']|'')*')|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))"
    r"|(?P<name>[a-zA-Z_]\w*|`\w+`|\"\w+\")|(?P<sign><=|>=|<>|!=|==|[-+*/%=<>(),]))",
    re.ASCII,
)


def check_where(where, *, columns=None, longest=MAX_WHERE):
    """The filter as it is, or None where there is none.

    Args:
        columns: names that may stand in it; None leaves them to the store.
        longest: in characters.

    Raises:
        ValueError: for anything but comparisons of columns, of a bounded length, depth and number of terms; it says
            which word cannot stand there.
    """
    if where is None or where == "":
        return None
    if not isinstance(where, str) or len(where) > longest or is_not_text(where) or not where.strip():
        raise ValueError(f"where must be an SQL condition of up to {longest:,} characters; got {ascii(where)[:200]}.")
    depth = operators = 0
    terms = list(_split_terms(where))
    for (kind, term), (_, following) in zip(terms, [*terms[1:], ("", "")], strict=True):
        depth += (term == "(") - (term == ")")
        operators += term.lower() in OPERATORS
        if depth < 0 or depth > MAX_DEPTH:
            raise ValueError(f"where must have brackets in pairs, at most {MAX_DEPTH} deep; got {where[:200]!r}.")
        if kind == "name":
            _check_name(term, following == "(", columns)
    if depth or len(terms) > MAX_TERMS or operators > MAX_OPERATORS:
        raise ValueError(
            f"where must have brackets in pairs, at most {MAX_TERMS:,} words, numbers and signs, and at most "
            f"{MAX_OPERATORS} comparisons and calculations; it has {len(terms):,} and {operators:,}. Long lists are "
            f"shorter as: width IN (1, 2, 3). Got {where[:200]!r}."
        )
    return where


def write_where(where=None, bbox=None, datetime=None):
    """Conditions as one SQL filter; None where there is none.

    Args:
        where: an SQL condition, checked by `check_where`.
        bbox: west, south, east, north in degrees; what touches this box passes. West is above east in a box across
            the antimeridian.
        datetime: what was acquired then passes: a time of RFC 3339, a year, month or day such as "2021-06", or two of
            them with a slash between, of which one may be "..".

    Raises:
        ValueError: for anything else.
    """
    where = check_where(where)
    conditions = [f"({where})"] if where else []
    if bbox is not None:
        conditions.append(_touches(*_check_bbox(bbox)))
    if datetime is not None:
        start, end = parse_interval(datetime)
        conditions += [f"acquired >= timestamp '{start:%Y-%m-%d %H:%M:%S.%f}'"] if start else []
        conditions += [f"acquired < timestamp '{end:%Y-%m-%d %H:%M:%S.%f}'"] if end else []
        conditions += [] if start or end else ["acquired IS NOT NULL"]
    return " AND ".join(conditions) or None


def _check_bbox(bbox):
    try:
        west, south, east, north = (float(side) for side in bbox)
    except (TypeError, ValueError):
        west = math.nan
    if math.isnan(west) or not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise ValueError(
            "bbox must be west, south, east and north in degrees, south at most north, such as 7.5 47.1 8.9 47.9; got "
            f"{str(bbox)[:100]}."
        )
    return west, south, east, north


def _touches(west, south, east, north):
    spans = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
    spans += [(-edge, -edge) for edge in (-180.0, 180.0) if edge in (west, east)]  # one meridian of two names
    across = "(west <= east AND west <= {1} AND east >= {0} OR west > east AND (west <= {1} OR east >= {0}))"
    return f"south <= {north} AND north >= {south} AND ({' OR '.join(across.format(*span) for span in spans)})"


INSTANT = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6})\d*)?)?(Z|[+-]\d\d:?\d\d)?)?)?)?", re.I
)


def parse_interval(text):
    """A time or an interval, as in `write_where` -> (start, end) in UTC, the end not included; None where it is open.

    Raises:
        ValueError: for anything else.
    """
    parts = str(text).strip().split("/")
    try:
        (start, _), (_, end) = _parse_time(parts[0]), _parse_time(parts[-1])
        if len(parts) <= 2 and (start is None or end is None or start < end) and (len(parts) == 2 or start):
            return start, end
    except (OverflowError, ValueError):
        pass
    raise ValueError(
        "datetime must be a time such as 2021-06-01T10:30:00Z, a year, month or day such as 2021-06, or an interval "
        f"such as 2021-06/2021-08 or 2021-06-15/..; got {str(text)[:100]!r}."
    )


def _parse_time(text):
    """A time, or a year, month or day -> its start and its end; (None, None) for an open one."""
    if text.strip() in ("", ".."):
        return None, None
    found = INSTANT.fullmatch(text.strip())
    if not found:
        raise ValueError(text)
    *numbers, fraction, zone = found.groups()
    year, month, day, hour, minute, second = (None if number is None else int(number) for number in numbers)
    start = Time(year, month or 1, day or 1, hour or 0, minute or 0, second or 0, int((fraction or "").ljust(6, "0")))
    start = start.replace(tzinfo=timezone.utc)
    if month is None:
        return start, start.replace(year=year + 1)
    if day is None:
        return start, start.replace(year=year + month // 12, month=month % 12 + 1)
    if hour is None:
        return start, start + timedelta(days=1)
    if zone and zone.upper() != "Z":
        sign, digits = (-1 if zone[0] == "-" else 1), zone[1:].replace(":", "")
        start -= sign * timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return start, start + timedelta(milliseconds=1)  # the index keeps milliseconds


def _split_terms(where):
    """(kind, term) of a filter in order, without blanks."""
    place = 0
    while place < len(where):
        found = TERM.match(where, place)
        # Some dialects read a backslash before a quote as part of the text, so that the text would end elsewhere.
        if not found or "\\'" in found.group() or "\0" in found.group():
            raise _refusal(where[place : place + 20].split("\n")[0])
        if found.lastgroup:
            yield found.lastgroup, found.group()
        place = found.end()


def _check_name(name, is_called, columns):
    word = name.strip('`"').lower()
    if is_called:
        if word not in WHERE_WORDS or name[0] in '`"':
            raise _refusal(name)
    elif word in FUNCTIONS or word in WORDS:
        return
    elif columns is not None and word not in {column.lower() for column in columns}:
        raise ValueError(f"where must compare these columns: {', '.join(columns)}; there is no {name[:50]!r}.")


def _refusal(part):
    return ValueError(
        f'where must be a comparison such as "width >= 256 AND north > 48", and {part[:50]!r} cannot stand in one. '
        f"Functions: {', '.join(sorted(FUNCTIONS))}."
    )


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
        reason = without_place_in_code(error)
        hint = " Times are written as: acquired >= timestamp '2021-06-01'." if "Timestamp" in reason else ""
        raise ValueError(f"where={where[:200]!r} cannot filter: {reason}{hint}") from error


def without_place_in_code(error):
    """The message of an error of LanceDB, shortened, without the line of its own code that it names."""
    return re.split(r",? (?:at )?/\S+\.rs:\d+", str(error))[0][:500]


def is_not_text(text):
    """Whether it holds half a character, as the names of files that are not UTF-8 do."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
