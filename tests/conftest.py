"""Fixtures of all tests: no child process outlives the test run."""

import ctypes
import sys

import psutil
import pytest

PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl: grandchildren whose parent was killed become children of this process


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """Stop processes that the tests left: fork servers, and children of processes that were killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
