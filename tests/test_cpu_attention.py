"""Tests of the compiled CPU attention against attention written out."""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranking import make_model, make_sides

from ieft.cpu import attention as compiled
from ieft.cpu.attention import compiled_for, cpu_attention
from ieft.cpu.prepacked import can_prepack
from ieft.evaluation.ranking import score_matrix

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = ["native", "-mno-avx512f", "-mno-avx"] if platform.machine() in ("x86_64", "AMD64") else ["native"]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def cache_of_tests(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def as_a_new_process(monkeypatch, cache_of_tests):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_of_tests))
    monkeypatch.setattr(compiled, "_failures", [])
    compiled_for.cache_clear()
    yield
    compiled_for.cache_clear()


def draw(*shape, dtype=torch.float32):
    """Query, key and value (B, H, S, E), as views of projections (B, S, H, E)."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3)]


def written_out(query, key, value):
    logits = query.double() @ key.double().transpose(2, 3) * query.shape[-1] ** -0.5
    return (logits.softmax(-1) @ value.double()).transpose(1, 2)  # (B, S, H, E)


def attend(query, key, value, mask=None):
    context, probabilities = cpu_attention(None, query, key, value, mask, query.shape[-1] ** -0.5)
    assert probabilities is None
    return context


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("batch, tokens, heads, width", [(1, 1, 1, 1), (2, 7, 3, 8), (1, 33, 2, 12), (3, 160, 2, 64)])
def test_it_is_attention(batch, tokens, heads, width, instructions, monkeypatch):
    """Any size with any registers: fewer tokens than a register holds, and one more."""
    if instructions != "native":
        monkeypatch.setattr(compiled, "OPTIONS", (*compiled.OPTIONS, instructions))
    sides = draw(batch, tokens, heads, width)
    monkeypatch.setattr(compiled.F, "scaled_dot_product_attention", None)  # which is not called
    torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=3e-6, rtol=0)


@needs_compiler
def test_channel_attention_in_bfloat16_computes_in_float32():
    sides = draw(2, 768, 3, 12, dtype=torch.bfloat16)
    context = attend(*sides)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.double(), written_out(*sides), atol=1e-3, rtol=2**-8)  # as rounded at the end


@needs_compiler
def test_heads_may_lie_in_memory_in_any_order():
    sides = [x.contiguous() for x in draw(2, 20, 3, 12)]
    torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=3e-6, rtol=0)


@needs_compiler
@pytest.mark.parametrize("scale", [6.0, 30.0, -200.0])  # exponentials of all sizes; some infinite; all of them 0
def test_logits_of_any_size(scale):
    query, key, value = draw(2, 40, 3, 8)
    sides = (query * scale, key, value) if scale > 0 else (query.abs() * scale, key.abs(), value)
    torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=1e-4, rtol=0)


@needs_compiler
def test_one_query_of_large_logits_among_others():
    query, key, value = draw(1, 40, 2, 8)
    query[:, :, 0] *= 500
    torch.testing.assert_close(attend(query, key, value).double(), written_out(query, key, value), atol=1e-4, rtol=0)


def weigh_two(logits):
    """The weight (N,) of the first of two tokens whose logits are `logits` (N,) and 0."""
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    query, key, value = (
        torch.stack(both, dim=1)[:, None, :, None]  # (N, 1, 2, 1)
        for both in ((logits, zeros), (ones, zeros), (ones, zeros))
    )
    return attend(query, key, value)[:, 0, 0, 0]


@needs_compiler
def test_exponentials_are_as_exact_as_float32(monkeypatch):
    monkeypatch.setattr(compiled.F, "scaled_dot_product_attention", None)
    logits = torch.linspace(-2, 2, 4001)
    torch.testing.assert_close(weigh_two(logits).double(), logits.double().sigmoid(), rtol=4e-7, atol=0)


@needs_compiler
@pytest.mark.parametrize("logit", [-355.0, -88.0, -30.0, 30.0, 41.0, 42.0, 88.0, 355.0])
def test_exponentials_beyond_float32(logit):
    logits = torch.tensor([logit])
    torch.testing.assert_close(weigh_two(logits), logits.sigmoid(), rtol=1e-5, atol=1e-30)


@needs_compiler
@pytest.mark.parametrize("side", [0, 1, 2])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(side, wrong):
    sides = draw(1, 20, 2, 8)
    sides[side][0, 1, 5, 3] = wrong
    expected = torch.nn.functional.scaled_dot_product_attention(*sides).transpose(1, 2)
    torch.testing.assert_close(attend(*sides), expected, equal_nan=True, atol=3e-6, rtol=0)


@pytest.mark.parametrize("masked, queries", [(True, 9), (False, 1)])
def test_masks_and_fewer_queries_are_left_to_pytorch(masked, queries):
    query, key, value = draw(2, 9, 3, 8)
    mask = torch.arange(9).expand(2, 1, queries, 9) < 6 if masked else None
    seen = 6 if masked else 9
    expected = written_out(query[:, :, :queries], key[:, :, :seen], value[:, :, :seen])
    torch.testing.assert_close(attend(query[:, :, :queries], key, value, mask).double(), expected, atol=3e-6, rtol=0)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    sides = draw(2, 50, 3, 12)
    threads = torch.get_num_threads()
    try:
        contexts = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            contexts.append(attend(*sides))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(context, contexts[0]) for context in contexts)


@pytest.mark.skipif(not can_prepack(make_model(), None), reason="this machine has no oneDNN")
@pytest.mark.parametrize(
    "compiler", ["no-such-compiler", "false", "true x", "'c++"]
)  # absent, failing, giving nothing
def test_without_a_compiler_scores_are_the_same(compiler, monkeypatch, caplog):
    model, (images, captions) = make_model(), make_sides()
    expected = score_matrix(model, images, captions, progress=False)
    compiled_for.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING, "ieft.cpu.attention"):
        scores = score_matrix(model, images, captions, progress=False)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert caplog.text.count("PyTorch's attention") == 1  # though heads of several widths ask for it


@needs_compiler
def test_the_compiler_may_be_named_with_more_words(monkeypatch):
    monkeypatch.setenv("CXX", "env c++ -O2")
    assert compiled_for(4) is not None
    monkeypatch.setenv("CXX", "'c++")  # an unfinished quotation
    assert compiled_for(5) is None


def libraries(folder):
    return sorted((folder / "ieft").glob("*"))


def compiles(width, monkeypatch):
    """Whether attention of this width is right in a new process, and how often that process called a compiler."""
    calls = []
    run = subprocess.run
    monkeypatch.setattr(compiled.subprocess, "run", lambda *args, **kwargs: calls.append(args) or run(*args, **kwargs))
    compiled_for.cache_clear()
    sides = draw(1, 9, 2, width)
    with monkeypatch.context() as patch:
        patch.setattr(compiled.F, "scaled_dot_product_attention", None)  # which is not called
        torch.testing.assert_close(attend(*sides).double(), written_out(*sides), atol=3e-6, rtol=0)
    monkeypatch.setattr(compiled.subprocess, "run", run)
    return len(calls)


@needs_compiler
def test_it_is_compiled_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert [compiles(width, monkeypatch) for width in (4, 4, 6, 4)] == [1, 0, 1, 0]
    kept = libraries(tmp_path / "new")
    assert [path.suffix for path in kept] == [".so", ".so"]  # and nothing beside them
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (*kept, kept[0].parent))
    monkeypatch.setenv("CXX", "c++ -O2")
    assert compiles(4, monkeypatch) == 1
    monkeypatch.setattr(compiled, "_cpu_model", lambda: "another CPU")
    assert compiles(4, monkeypatch) == 1


ONE_PROCESS = "import sys; from ieft.cpu.attention import compiled_for; sys.exit(compiled_for(5) is None)"


@needs_compiler
def test_processes_may_compile_at_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", ONE_PROCESS], cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert len(libraries(tmp_path)) == 1


def truncate(library):
    library.write_bytes(library.read_bytes()[:100])


def let_others_write(library):
    library.chmod(0o722)


def let_others_write_the_folder(library):
    library.parent.chmod(0o777)


def point_elsewhere(library):
    library.rename(library.with_suffix(".other"))
    library.symlink_to(library.with_suffix(".other"))


def give_away(library):
    os.chown(library, 12345, 12345)


@needs_compiler
@pytest.mark.parametrize("harm", [truncate, let_others_write, let_others_write_the_folder, point_elsewhere, give_away])
def test_a_library_of_others_is_never_loaded(harm, cache_of_tests, tmp_path, monkeypatch):
    compiles(4, monkeypatch)
    copied = shutil.copytree(cache_of_tests, tmp_path / "copy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(copied))
    assert compiles(4, monkeypatch) == 0
    copied = shutil.copytree(cache_of_tests, tmp_path / "harmed")  # which this process has not loaded yet
    monkeypatch.setenv("XDG_CACHE_HOME", str(copied))
    command = ["c++", *compiled.OPTIONS, "-DWIDTH=4"]
    library = copied / "ieft" / f"attention-{compiled._digest(command)}.so"
    try:
        harm(library)
    except PermissionError:
        pytest.skip("only root may give a file away")
    loaded = []
    load = ctypes.CDLL
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda path: loaded.append(Path(path).stat().st_ino) or load(path))
    harmed = library.stat().st_ino
    assert compiles(4, monkeypatch) == 1
    assert harm is truncate or harmed not in loaded
    if harm is not let_others_write_the_folder:
        assert compiles(4, monkeypatch) == 0  # since it was replaced


@needs_compiler
@pytest.mark.parametrize("cache", ["a-file", "relative"])
def test_a_cache_that_cannot_be_written_is_done_without(cache, tmp_path, monkeypatch):
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache if cache == "relative" else str(tmp_path / cache))
    assert [compiles(4, monkeypatch) for _ in range(2)] == [1, 1]
    assert os.listdir(tmp_path) == ["a-file"]


def test_the_source_is_in_the_wheel(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "outputs", "*.egg-info", "build"))
    subprocess.run([*command, str(tmp_path), str(tmp_path / "clone")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "ieft/cpu/attention.cpp" in zipfile.ZipFile(wheel).namelist()


def test_padded_captions_are_embedded_as_without_padding():
    """transformers leaves out the mask for an attention that names none."""
    from test_modeling import tiny_config

    from ieft.cpu.prepacked import prepack
    from modeling_ieft import IeftForImageTextRetrieval

    torch.manual_seed(0)
    model = IeftForImageTextRetrieval(tiny_config(initializer_range=0.3)).eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        padded = prepack(model).get_text_features(tokens, mask)
        alone = model.get_text_features(tokens[1:, :2])
    torch.testing.assert_close(padded[1:], alone, atol=1e-5, rtol=1e-5)
