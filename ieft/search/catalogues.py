"""STAC catalogues as archives, and hits as a STAC ItemCollection.

A catalogue is a static one, an item collection, an item, or an API that is searched. Of each item one asset, an image,
is indexed, and properties of the item become columns. See https://stacspec.org.
"""

import hashlib
import json
import os
import posixpath
import re
from datetime import datetime, timezone
from pathlib import Path
from urllib.request import url2pathname

import pyarrow as pa

from ieft.data.storage import EXTRAS, is_address, read_file, suffix_of, tells_json
from ieft.search.archive_files import IMAGE_SUFFIXES
from ieft.search.filters import is_not_text, parse_interval, write_where
from ieft.search.geography import SIDES
from ieft.search.ingestion import takes_place
from ieft.search.tables import KEY, METADATA, any_of, columns_of_catalogues, retry

SUFFIXES = (".json", ".geojson")
CLOUD_COVER = "eo:cloud_cover"
STORAGE = {"http", "https", *EXTRAS}  # where a catalogue elsewhere may say that its images are
FILES_AT_ONCE = 500
VERSION = "1.0.0"


def is_catalogue(archive):
    """Whether an archive is a catalogue: a JSON file, or an address of which its server says that it is JSON."""
    archive = os.fspath(archive)
    if not is_address(archive):
        return Path(archive).suffix.lower() in SUFFIXES and Path(archive).is_file()
    suffix = suffix_of(archive)
    return suffix in SUFFIXES or suffix not in IMAGE_SUFFIXES and tells_json(archive)


def add_catalogue(
    index, place, *, asset=None, properties=(), collections=None, bbox=None, datetime=None, **options
):  # fmt: skip
    """Add the images of a catalogue to an `ImageIndex`.

    Args:
        place: path or address of the catalogue.
        asset: key of the asset that is the image; None where each item has one alone.
        properties: names of properties of the items that become columns, beside `eo:cloud_cover`; other signs than
            letters and digits become `_` in a column's name.
        collections: ids of the collections to take; None takes all.
        bbox, datetime: as in `ImageIndex.search`: only these items.
        options: of `ImageIndex.add`.

    Returns:
        dict: as `ImageIndex.add`; items without the image are among `unreadable`.
    """
    images, unreadable = read_catalogue(
        place, asset=asset, properties=properties, collections=collections, bbox=bbox, datetime=datetime,
        columns=columns_of_catalogues(index.table),
    )  # fmt: skip
    _add_columns(index, images.values())
    report = index.add(list(images), **options)
    set_columns(index, {file: columns for file, columns in images.items() if file not in report["unreadable"]})
    return report | {"unreadable": unreadable | report["unreadable"]}


def read_catalogue(place, *, asset=None, properties=(), collections=None, bbox=None, datetime=None, columns=()):
    """The images of a catalogue; arguments as `add_catalogue`.

    Args:
        columns: further columns to fill from properties, such as those of earlier runs.

    Returns:
        tuple: a dict of path or address -> columns; a dict of item -> reason why it has no image.

    Raises:
        ImportError: without pystac.
        FileNotFoundError: if no item passes the filters, or none has an image.
        ValueError: for what is no catalogue.
    """
    write_where(None, bbox, datetime)  # raises errors before any work
    place = os.fspath(place) if is_address(os.fspath(place)) else os.path.abspath(place)
    images, unreadable, number = {}, {}, 0
    for item in _read_items(place, collections, bbox, datetime):
        if not _passes(item, collections, bbox, datetime):
            continue
        number += 1
        try:
            file = _find_image(item, asset, place)
        except ValueError as error:
            unreadable[item.get_self_href() or item.id] = str(error)
            continue
        images[file] = _columns_of(item, properties, columns)
    if not images:
        why = f", such as: {next(iter(unreadable.values()))}" if unreadable else ""
        raise FileNotFoundError(
            f"Images expected in {place}: {number:,} items pass the filters, and none has one{why}."
        )
    return images, unreadable


def _read_items(place, collections, bbox, datetime):
    """The items of a catalogue, or those that an API finds."""
    try:
        import pystac
    except ImportError as error:
        raise ImportError("STAC catalogues need pystac: pip install 'ieft[stac]'.") from error

    class Reader(pystac.StacIO):
        """Reads from this machine, or from other storage; what is elsewhere cannot name files of this machine."""

        def read_text(self, source, *args, **kwargs):
            source = os.fspath(getattr(source, "get_absolute_href", lambda: source)())
            if is_address(source):
                return read_file(source).decode("utf-8")
            if is_address(place):
                raise ValueError(f"{place} refers to {source}, a file of this machine, which is not read.")
            return Path(source).read_text(encoding="utf-8")

        def write_text(self, *args, **kwargs):
            raise NotImplementedError

    try:
        content = json.loads(Reader().read_text(place))
        kind = content.get("type") if isinstance(content, dict) else None
        if kind == "FeatureCollection":
            found = pystac.ItemCollection.from_dict(content)
            yield from (_with_place(item, place) for item in found)
        elif kind == "Feature":
            yield _with_place(pystac.Item.from_dict(content), place)
        elif is_address(place) and (searches := _searches(content)):
            import pystac_client

            method = "POST" if "POST" in searches else "GET"
            client = pystac_client.Client.open(place)
            yield from client.search(method=method, collections=collections, bbox=bbox, datetime=datetime).items()
        elif kind in ("Catalog", "Collection"):
            catalogue = pystac.read_dict(content, href=place, stac_io=Reader())
            catalogue.set_self_href(place)
            yield from catalogue.get_items(recursive=True)
        else:
            raise ValueError("a catalogue, a collection or items expected")
    except (ImportError, OSError):
        raise
    except Exception as error:  # pystac and its client raise many kinds
        while error.__cause__ is not None:
            error = error.__cause__
        reason = str(error)[:500] or type(error).__name__
        raise ValueError(f"{place} cannot be read as a STAC catalogue: {reason}") from error


def _searches(content):
    """The methods by which an API, of which this is the landing page, can be searched."""
    links = content.get("links", ())
    return {str(link.get("method", "GET")).upper() for link in links if link.get("rel") == "search"}


def _with_place(item, place):
    if not item.get_self_href():
        item.set_self_href(place)
    return item


def _passes(item, collections, bbox, datetime):
    """Whether an item is one of those asked for; an API may have ignored what was asked."""
    if collections and item.collection_id not in collections:
        return False
    if bbox is not None:
        if not item.bbox:
            return False
        (west, south, east, north), of_item = bbox, _flat(item.bbox)
        spans = ((west, east),) if west <= east else ((west, 180), (-180, east))
        of_spans = ((of_item[0], of_item[2]),) if of_item[0] <= of_item[2] else ((of_item[0], 180), (-180, of_item[2]))
        touches = any(a <= d and b >= c for a, b in spans for c, d in of_spans)
        if not touches or of_item[1] > north or of_item[3] < south:
            return False
    if datetime is not None:
        start, end = parse_interval(datetime)
        first = item.datetime or item.common_metadata.start_datetime
        last = item.datetime or item.common_metadata.end_datetime
        return bool(first and last) and (end is None or first < end) and (start is None or last >= start)
    return True


def _flat(bbox):
    """A bounding box without heights."""
    return [bbox[0], bbox[1], bbox[3], bbox[4]] if len(bbox) == 6 else list(bbox)


def _find_image(item, asset, place):
    """The path or address of the image of an item.

    Raises:
        ValueError: if it has none, or several of which one must be chosen.
    """
    images = {key: each for key, each in item.assets.items() if _is_image(each)}
    if asset is None and len(images) != 1:
        keys = ", ".join(images or item.assets) or "none"
        raise ValueError(f"item {item.id}: one image expected, or --asset with the key of one; its assets: {keys}")
    chosen = item.assets.get(asset) if asset is not None else next(iter(images.values()))
    if chosen is None:
        raise ValueError(f"item {item.id} has no asset {asset!r}; it has {', '.join(item.assets) or 'none'}")
    file = _resolve(chosen.href, item.get_self_href() or place)
    kind = file.partition("://")[0].lower() if is_address(file) else None
    if is_address(place) and kind not in STORAGE or kind is not None and kind not in STORAGE:
        raise ValueError(f"item {item.id}: an image in other storage expected; got {file[:200]}")
    return file


def _is_image(asset):
    suffix = suffix_of(asset.href)
    if {"thumbnail", "overview", "metadata"} & set(asset.roles or ()):
        return False
    return (asset.media_type or "").startswith("image/") or suffix in IMAGE_SUFFIXES


def _resolve(href, base):
    """An address or path that may be relative to that of the file that names it."""
    if href.lower().startswith("file://"):
        return url2pathname(href[len("file://") :])
    if is_address(href) or os.path.isabs(href) and not is_address(base):
        return href
    if not is_address(base):
        return os.path.abspath(os.path.join(os.path.dirname(base), href))
    start, host, path = re.fullmatch(r"([^:]+://)([^/]*)(.*)", base, re.DOTALL).groups()
    return start + host + posixpath.normpath(posixpath.join("/", posixpath.dirname(path), href)).replace("//", "/")


def _columns_of(item, properties, others):
    """An item as columns of the index; what it does not tell is None, in the place of what it told before."""
    columns = dict.fromkeys(others) | {"item": item.id, "collection": item.collection_id}
    found = {_name_column(name): value for name, value in item.properties.items()}
    columns |= {name: _plain(found[name]) for name in others if name in found and name not in ("item", "collection")}
    columns |= {column_of(name): _plain(item.properties.get(name)) for name in (CLOUD_COVER, *properties)}
    when = item.datetime or item.common_metadata.start_datetime
    columns |= {"acquired": when} if when else {}
    if item.bbox and item.geometry:
        columns |= dict(zip(SIDES, map(float, _flat(item.bbox)), strict=True))
        columns["geometry"] = json.dumps(item.geometry)
    return columns


def column_of(name):
    """The name of the column of a property.

    Raises:
        ValueError: if it would be one that every index has.
    """
    column = _name_column(name)
    if column.lower() in {*METADATA, "vector", "state", "item", "collection"}:
        raise ValueError(f"The property {name!r} cannot become a column: every index has one of this name.")
    return column


def _name_column(name):
    column = re.sub(r"\W", "_", name, flags=re.ASCII)
    return column if re.match(r"[A-Za-z_]", column) else f"_{column}"


def _plain(value):
    """A value that a column can hold: lists and objects as JSON."""
    if value is None or isinstance(value, str | bool | datetime):
        return value
    return float(value) if isinstance(value, int | float) else json.dumps(value)


def _add_columns(index, items):
    """Add the columns that items fill and the index does not have.

    Args:
        items: a dict of columns for each.

    Raises:
        ValueError: if the values of a column are of several types, or of another one than in the index.
    """
    kinds = {}
    told = ((name, _kind_of(value)) for columns in items for name, value in columns.items() if value is not None)
    for name, kind in told:
        if name not in METADATA and kinds.setdefault(name, kind) != kind:
            raise ValueError(f"One type of values expected in {name}; got {kinds[name]} and {kind}.")
    retry(index.add_columns, [pa.field(name, kind) for name, kind in kinds.items()])
    for name, kind in kinds.items():
        if (there := index.table.schema.field(name).type) != kind:
            raise ValueError(f"The index has {there} in the column {name}; this is {kind}.")


def set_columns(index, values):
    """Set columns of images of an index to those of a catalogue.

    Args:
        values: path or address -> dict of columns, which the index has. Bounds are set where an image kept whole has
            no georeference.
    """
    asked = {name for columns in values.values() for name in columns} | {*SIDES, "geometry"}
    names = [name for name in index.table.schema.names if name in asked]
    by_name = {index.name_of(file): columns for file, columns in values.items()}
    listed = [name for name in by_name if not is_not_text(name)]
    for first in range(0, len(listed), FILES_AT_ONCE):
        rows = index.select(any_of(listed[first : first + FILES_AT_ONCE]), [*KEY, "tiling", "left", *names])
        changed = [row for row in rows if _update(row, by_name[row["file"]])]
        if changed:
            index.update([{name: row[name] for name in (*KEY, *names)} for row in changed])


def _update(row, columns):
    """Change a row by the columns of its file; returns whether anything is different."""
    before = dict(row)
    left_out = () if takes_place(row) else (*SIDES, "geometry")
    row.update({name: columns[name] for name in columns.keys() & row.keys() - {*left_out}})
    return row != before


def _kind_of(value):
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, datetime):
        return pa.timestamp("ms", "UTC")
    return pa.float64() if isinstance(value, float) else pa.string()


def to_item_collection(hits):
    """Rows or hits of the index as a STAC ItemCollection: one item each, with the image as the asset `image`.

    STAC wants a time of each: where none of acquisition is known, it is between 1970 and the last change of the file.
    """
    items = []
    for hit in hits:
        place = f"{hit['file']} {hit['col']} {hit['row']}"
        named = {name: value for name, value in hit.items() if name not in (*SIDES, "geometry", "limits", "acquired")}
        properties = {f"ieft:{name}": _as_json(value) for name, value in named.items() if value is not None}
        properties |= {"datetime": _as_json(hit["acquired"])}
        if hit.get("eo_cloud_cover") is not None:
            properties[CLOUD_COVER] = hit["eo_cloud_cover"]  # where catalogues have it
        if not hit["acquired"]:
            latest = hit["time"] or datetime.now(timezone.utc)
            properties |= {"start_datetime": "1970-01-01T00:00:00Z", "end_datetime": _as_json(latest)}
        item = {
            "type": "Feature",
            "stac_version": VERSION,
            "stac_extensions": [],
            "id": f"{Path(hit['file']).stem}-{hashlib.sha256(place.encode()).hexdigest()[:12]}",
            "geometry": json.loads(hit["geometry"]) if hit["geometry"] else None,
            "properties": properties,
            "links": [],
            "assets": {"image": {"href": hit["file"], "roles": ["data"]}},
        }
        if item["geometry"]:
            item["bbox"] = [hit[side] for side in SIDES]
        items.append(item)
    return {"type": "FeatureCollection", "features": items}


def _as_json(value):
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else value
