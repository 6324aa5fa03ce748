"""Reads tables of captions: CSV in the dialects of Excel, pandas and the csv module, JSON lines, lists in a cell.

A table is read with exactly the rows that were written, or refused with its file, line and remedy.
"""

import ast
import csv
import io
import json
import re
import sys

from ieft.data.invalid_examples import show

DELIMITERS = (",", ";", "\t", "|")
# Byte order mark -> encoding. UTF-32 comes first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
LIST_OF_STRINGS = re.compile(rf"\s*{QUOTED}(?:(?:\s*,\s*|\s+){QUOTED})*\s*,?\s*", re.DOTALL)
SPACE_AND_QUOTES = re.compile(r"[ ]+\".*\"\s*", re.DOTALL)
MAX_CELL_LIST = 1_000_000  # characters of a list in a cell


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 if it has a byte order mark.

    Raises:
        ValueError: for other encodings; names the line and the remedy.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and content[:4096].count(0) > len(content[:4096]) // 4:
        raise ValueError(f"{path} looks like UTF-16 without a byte order mark: save it as UTF-8.")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not valid {encoding.removesuffix('-sig').upper()} (byte "
            f'0x{content[error.start]:02x}). Save it as UTF-8: in Excel as "CSV UTF-8", or with '
            f"iconv -f WINDOWS-1252 -t UTF-8."
        ) from error


def read_json_lines(path):
    """The records of a file with one JSON object per line; only line feeds separate lines."""
    return [record for _, record in number_json_lines(path)]


def number_json_lines(path):
    """Pairs of the number of a line and its record, as `read_json_lines`."""
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                records.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} cannot be read as a table: line {number} is not JSON: {error}.") from error
    return records


def read_csv(path, known_names, check_names):
    """The records of a CSV file with any delimiter and quoting.

    Args:
        known_names: lower-case names of columns; the delimiter is the one that finds most of them in the first line.
        check_names: is given the names of the columns of a table that cannot be read, to say first what else is wrong.

    Raises:
        ValueError: for a line with more fields than the first line has names, quotes that do not close, or a name
            that stands twice.
    """
    return [record for _, record in number_csv(path, known_names, check_names)]


def number_csv(path, known_names, check_names):
    """Pairs of the number of a line and its record, as `read_csv`."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text, first_line, forced = read_text(path), 1, None
    hint = re.match(r"\ufeff?\"?sep=(.)\"?(\r\n|\n|\r)", text)  # the first line of Excel
    if hint:
        text, first_line, forced = text[hint.end() :], 2, hint.group(1)
    if not text.strip():
        return []
    delimiter = forced or _find_delimiter(path, text, known_names)
    try:
        header, *rows = _parse(path, text, delimiter, first_line)
    except ValueError:
        check_names(next(csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter)))
        raise
    names = _check_header(path, header)
    return [(line, dict(zip(names, row + [None] * (len(names) - len(row)), strict=True))) for line, row in rows]


def _find_delimiter(path, text, known_names):
    """The delimiter that splits the first line into the most known names, then into the most fields."""
    usual = ("\t", ",", ";", "|") if path.suffix.lower() == ".tsv" else DELIMITERS

    def merit(delimiter):
        try:
            fields = next(row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row)
        except (csv.Error, StopIteration):
            return 0, 0
        return sum(field.strip().lower() in known_names for field in fields), len(fields)

    return max(usual, key=merit)  # the first one if equal


def _parse(path, text, delimiter, first_line):
    """(line, fields) of each row that is not blank, the first line's names first.

    Quotes are doubled, as Excel and the csv module write them. Only where that cannot be read are they looked for
    escaped by a backslash, after blanks, or, between tabs, as letters like others.
    """
    plain, fault = _try(text, delimiter, first_line, doublequote=True)
    if plain and any(SPACE_AND_QUOTES.fullmatch(field) for _, row in plain for field in row):
        plain = _without_outer_quotes(plain, _try(text, delimiter, first_line, skipinitialspace=True)[0])
    if '\\"' in text or (fault and "\\" in text):
        escaped, _ = _try(text, delimiter, first_line, doublequote=False, escapechar="\\")
        if plain and escaped and plain != escaped:
            if _is_even(plain) == _is_even(escaped):
                raise ValueError(
                    f'{path}: its quotes could be escaped by a backslash (\\") or doubled (""), and the two readings '
                    "differ. Save it again with doubled quotes, as Excel, pandas and the csv module do."
                )
            plain = escaped if _is_even(escaped) else plain
        plain = plain or escaped
    if not plain:
        plain, _ = _try(text, delimiter, first_line, skipinitialspace=True)
    if not plain and delimiter == "\t":
        plain, _ = _try(text, delimiter, first_line, quoting=csv.QUOTE_NONE)
    if not plain:
        raise ValueError(f"{path}, {fault}")
    return plain


def _without_outer_quotes(plain, spaced):
    """The rows, where a field that is quoted after a blank (`a.png, "a river"`) is what stands in its quotes."""
    if not spaced or [len(row) for _, row in plain] != [len(row) for _, row in spaced]:
        return spaced or plain
    return [
        (line, [other if SPACE_AND_QUOTES.fullmatch(own) else own for own, other in zip(row, others, strict=True)])
        for (line, row), (_, others) in zip(plain, spaced, strict=True)
    ]


def _is_even(rows):
    """Whether all rows have as many fields as the first."""
    return len({len(row) for _, row in rows}) == 1


def _try(text, delimiter, first_line, **dialect):
    """The rows in a dialect, or None and the first fault with its line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **dialect)
    rows, line = [], first_line
    try:
        for row in reader:
            if any(field.strip() for field in row):
                rows.append((line, row))
                if len(row) > len(rows[0][1]) and any(field.strip() for field in row[len(rows[0][1]) :]):
                    named = {"\t": "tab"}.get(delimiter, repr(delimiter))
                    return None, (
                        f"line {line}: {len(row)} fields where the first line names {len(rows[0][1])} columns. A "
                        f"caption that holds the separator ({named}) must stand in double quotes: quote it, or save "
                        "the table with another separator."
                    )
                rows[-1] = (line, row[: len(rows[0][1])])
            line = first_line + reader.line_num
    except csv.Error as error:
        return None, (
            f"line {line}: the quotes of this row do not match ({error}). A field that holds quotes must stand in "
            'double quotes, with its own quotes doubled ("").'
        )
    return rows, None


def _check_header(path, header):
    """The names of the columns; duplicates are numbered as in pandas, `caption`, `caption.1`."""
    line, fields = header
    names = [field.strip().lstrip("\ufeff") for field in fields]
    while names and not names[-1]:
        names.pop()
    names += [""] * (len(fields) - len(names))
    for place, name in enumerate(names):
        if name in names[:place] and name:
            if not re.fullmatch(r"captions?|sentences?|text|raw", name.lower()):
                raise ValueError(f"{path}, line {line}: the column {name!r} stands twice. Rename or delete one.")
            names[place] = f"{name}.{names[:place].count(name) + sum(n.startswith(f'{name}.') for n in names[:place])}"
    return [name or f"column {place}" for place, name in enumerate(names, start=1)]


# Lists in a cell ---------------------------------------------------------------------------------------------------


def parse_cell(text):
    """Parse a list that was written as text; other text is returned unchanged.

    Read are JSON (`["a", "b"]`), Python (`['a', 'b']`, also of `{'raw': ...}`) and numpy (`['a' 'b']`).

    Raises:
        ValueError: for what begins as such a list and cannot be read.
    """
    body = re.sub(r"^array\((.*?)(,\s*dtype=[\w.<>'\"]+)?\)$", r"\1", text.strip(), flags=re.DOTALL)
    body = re.sub(rf"\bnp\.str_\(({QUOTED})\)", r"\1", body, flags=re.DOTALL)  # the repr of strings in numpy 2
    if not re.match(r"""[\[(]\s*['"{\]]""", body) or body[-1:] != {"[": "]", "(": ")"}[body[0]]:
        return text
    if body == "[]" or not body[1:-1].strip():
        return []
    if len(body) > MAX_CELL_LIST:
        raise ValueError(f"a list of {len(body):,} letters in one cell")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, list):
        return content
    if LIST_OF_STRINGS.fullmatch(body[1:-1]):
        if body[0] == "(" and "," not in re.sub(QUOTED, "", body):
            return text  # one quoted sentence in brackets
        return [ast.literal_eval(each) for each in re.findall(QUOTED, body[1:-1], re.DOTALL)]
    if re.match(r"\[\s*\{", body):
        try:
            content = ast.literal_eval(body)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            content = None
        if isinstance(content, list):
            return content
    if body[0] == "(":
        return text
    raise ValueError(f"a list that cannot be read, {show(text)}: write it as JSON, or one caption a row")
