"""Tests of indexing on a cluster: two nodes of a real Ray cluster on this machine, one of which is killed."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image
from test_index import archive, checkpoint, loaded, scene  # noqa: F401
from test_ingestion import create, table_of

ray = pytest.importorskip("ray", reason="needs the extra `cluster`")
pytest.importorskip("lance", reason="needs the extra `cluster`")

from ray.cluster_utils import Cluster  # noqa: E402

from ieft.search import cluster as clusters  # noqa: E402
from ieft.search import ingestion, read_ahead  # noqa: E402
from ieft.search.archive_files import find_images  # noqa: E402

# ruff: noqa: F811


@pytest.fixture
def nodes(monkeypatch):
    """A node without processors, on which this process is, and two that work."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parent}{os.pathsep}{here}")  # of their workers
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}
    fewer = {"include_dashboard": False, "include_log_monitor": False}  # processes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon} | fewer)
    for _ in range(2):
        cluster.add_node(num_cpus=1, include_log_monitor=False)
    clusters.connect(cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_an_address_without_a_cluster_is_named_at_once(monkeypatch):
    with socket.socket() as taken:  # by nobody who answers
        taken.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*taken.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        for given in (address, "auto"):
            with pytest.raises(ConnectionError, match=f"A Ray cluster expected at {given}: .*refused"):
                clusters.connect(given)


def rows_by_key(index):
    rows = table_of(index)
    count = Counter((row["file"], row["col"], row["row"]) for row in rows)
    assert not [key for key, number in count.items() if number > 1], "doubled rows"
    return sorted(rows, key=lambda row: (row["file"], row["row"], row["col"]))


def assert_same_rows(index, other):
    rows, others = rows_by_key(index), rows_by_key(other)
    vectors = [np.array([row.pop("vector") for row in some]) for some in (rows, others)]
    assert rows == others
    np.testing.assert_allclose(*vectors, atol=1e-5)


def kill_when_written(node, index):
    """Kill all processes of a node as soon as a fragment is written, by whichever."""
    while not list(Path(index.table.uri).glob("data/*.lance")):
        time.sleep(0.05)
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_rows_are_those_of_one_process_though_a_node_is_killed(tmp_path, loaded, archive, scene, nodes, monkeypatch):
    (archive / "cut.png").write_bytes(find_images(archive)[0].read_bytes()[:600])
    images = [np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8) for number in range(24)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(archive / f"more {number}.png")
    files = [*find_images(archive), scene]
    monkeypatch.chdir(tmp_path)  # where the nodes are not
    one, many = create("one", loaded), create("many", loaded)
    expected = one.add(files, tile=32, progress=False)
    monkeypatch.setattr(clusters, "FILES_PER_TASK", 2)
    monkeypatch.setattr(clusters, "ROWS_PER_FRAGMENT", 16)
    monkeypatch.setattr(clusters, "SECONDS_PER_COMMIT", 0)
    node = next(iter(nodes.worker_nodes))
    killer = threading.Thread(target=kill_when_written, args=(node, many))
    killer.start()
    report = many.add(files, tile=32, batch_size=8, progress=False, cluster=nodes.address)
    killer.join(1)
    assert not killer.is_alive() and node.any_processes_alive() is False
    assert report == expected
    assert_same_rows(many, one)


def test_columns_that_another_process_adds_meanwhile_are_empty(tmp_path, loaded, archive):
    one, many = create(tmp_path / "one", loaded), create(tmp_path / "many", loaded)
    one.add(find_images(archive)[:2], progress=False)
    rows = one.table.to_arrow()
    rows = rows.append_column(clusters.REPORT, pa.nulls(len(rows), pa.string()))
    many.add_columns([pa.field("platform", pa.string())])
    (part,) = clusters._write(rows, uri=many.uri, storage_options=None)["part"].to_pylist()
    clusters._append(many, json.loads(part)["fragments"])
    assert {row.pop("platform") for row in many.table.to_arrow().to_pylist()} == {None}
    assert [row["file"] for row in table_of(many)] == [row["file"] for row in table_of(one)]


def die_of_a_file(jobs):
    """`read_files`, of which a file ends the process."""
    if any("killer" in job.name for job in jobs):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_ahead.read_files(jobs)


def read_with_a_killer(files, **options):
    """`clusters._read` with `die_of_a_file`, also where it is imported anew."""
    ingestion.read_files = die_of_a_file
    yield from READ(files, **options)


READ = clusters._read


@pytest.mark.soak
def test_a_file_that_ends_its_process_is_named_and_costs_no_other(tmp_path, loaded, archive, nodes, monkeypatch):
    files = find_images(archive)
    Image.new("RGB", (48, 48)).save(archive / "killer.png")
    one, many = create(tmp_path / "one", loaded), create(tmp_path / "many", loaded)
    expected = one.add(files, progress=False)
    monkeypatch.setattr(clusters, "_read", read_with_a_killer)
    report = many.add([*files, archive / "killer.png"], progress=False, cluster=nodes.address)
    assert list(report["unreadable"]) == [str(archive / "killer.png")]
    assert "the process that read it died" in report["unreadable"][str(archive / "killer.png")]
    assert (report["added"], report["unchanged"]) == (expected["added"], 0)
    assert_same_rows(many, one)
    again = many.add(files, progress=False, cluster=nodes.address)  # a changed image replaces its row
    assert (again["added"], again["unchanged"]) == (0, len(files))
    Image.new("RGB", (48, 48), "red").save(files[0])
    assert many.add(files, progress=False, cluster=nodes.address)["added"] == 1
    one.add(files, progress=False)
    assert_same_rows(many, one)
