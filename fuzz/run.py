"""Coverage-guided fuzzing of all code that reads untrusted files and text.

    python fuzz/run.py --seconds 60
    python fuzz/run.py --seconds 300 --targets archives images --findings findings

Each target of `targets.py` runs in its own process with limits on memory and time. Prints a table, then one JSON line:
executions, edges covered, findings; the input of each finding is saved as a file. Needs the extra `fuzz` (atheris).
"""

import argparse
import json
import logging
import os
import platform
import re
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
ADDRESS_SPACE = 24 * 2**30  # torch reserves much more than it uses; RSS_MB limits what it uses
RSS_MB = 3072
SECONDS_EACH = 20  # per input
FILE_BYTES = 2**30
MAX_LEN = 65536
INSTRUMENTED = [
    "ieft", "configuration_ieft", "processing_ieft", "convert_checkpoint", "run_retrieval", "PIL", "tarfile",
    "zipfile",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="time for each target")
    parser.add_argument("--targets", nargs="+", help="names of functions in targets.py (default: all)")
    parser.add_argument("--findings", default="findings", help="folder for the inputs of findings")
    args = parser.parse_args()
    targets = load_targets()
    results = {}
    print(f"{'target':<14}{'executions':>12}{'edges':>8}{'findings':>10}", flush=True)
    for name in args.targets or targets:
        results[name] = fuzz(name, *targets[name], args.seconds, Path(args.findings))
        print(f"{name:<14}{results[name]['executions']:>12,}{results[name]['edges']:>8,}"
              f"{len(results[name]['findings']):>10}", flush=True)  # fmt: skip
    print(json.dumps({"seconds": args.seconds, "python": platform.python_version(), "targets": results}))
    return 1 if any(result["findings"] for result in results.values()) else 0


def load_targets():
    """Name -> target and its seeds, with instrumented modules."""
    sys.path[:0] = [str(ROOT), str(ROOT / "fuzz")]
    for module in ("tarfile", "zipfile"):
        sys.modules.pop(module, None)  # imported without instrumentation
    warnings.filterwarnings("ignore", message="lancedb fork support")  # it is first used after the fork
    with atheris.instrument_imports(include=INSTRUMENTED):
        from targets import TARGETS
    return TARGETS


def fuzz(name, target, seeds, seconds, findings):
    """Run one target in a process of its own: executions, edges covered, and files of findings.

    Raises:
        RuntimeError: where it did not begin.
    """
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        corpus, log = Path(folder) / "corpus", Path(folder) / "log"
        corpus.mkdir()
        for number, seed in enumerate(seeds()):
            (corpus / f"seed_{number}").write_bytes(seed)
        child = os.fork()
        if child == 0:
            run_target(target, log, [
                str(corpus), f"-max_total_time={seconds}", f"-rss_limit_mb={RSS_MB}", f"-timeout={SECONDS_EACH}",
                f"-max_len={MAX_LEN}", "-print_final_stats=1", f"-artifact_prefix={findings.resolve()}/{name}-",
            ])  # fmt: skip
        status = os.waitpid(child, 0)[1]
        said = log.read_text(encoding="utf-8", errors="replace")
    executions = re.search(r"stat::number_of_executed_units:\s+(\d+)", said)
    edges = re.findall(r"\bcov: (\d+)", said)
    found = sorted(path.name for path in set(findings.iterdir()) - before)
    if not edges or (status and not found):
        raise RuntimeError(f"{name} ended with {status}:\n{said[-4000:]}")
    if found:
        print(said[-4000:], file=sys.stderr)
    return {"executions": int(executions.group(1)) if executions else 0, "edges": int(edges[-1]), "findings": found}


def run_target(target, log, arguments):
    """Run in the child: set limits and start the fuzzer; does not return."""
    from PIL import Image
    from targets import call

    for kind, limit in (("AS", ADDRESS_SPACE), ("FSIZE", FILE_BYTES), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (limit, limit))
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    warnings.simplefilter("ignore")
    logging.disable()
    Image.MAX_IMAGE_PIXELS = 2**20  # lower than in use, so that an input takes milliseconds
    try:
        atheris.Setup([__file__, *arguments], lambda data: call(target, data))
        atheris.Fuzz()
    finally:  # a finding is an exception; the child must not remove the parent's folders
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
