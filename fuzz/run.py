"""Coverage-guided fuzzing of everything that reads files and words of others.

    python fuzz/run.py --seconds 60
    python fuzz/run.py --seconds 300 --targets archives images --findings findings

In: how long, which targets of `targets.py`. Out: a table, then one JSON line: executions, edges covered, findings; each
finding as the file that brings it about. Every target runs in a process of its own with limits on memory and time. It
knows nothing of what is fuzzed. Needs the extra `fuzz` (atheris).
"""

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS_SPACE = 24 * 2**30  # torch reserves much and uses little; what is really used is held by RSS_MB
RSS_MB = 3072
SECONDS_EACH = 20  # for one input
FILE_BYTES = 2**30
MAX_LEN = 65536
INSTRUMENTED = [
    "ieft", "configuration_ieft", "processing_ieft", "convert_checkpoint", "run_retrieval", "PIL", "tarfile", "zipfile",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--targets", nargs="+", help="names of functions in targets.py; all")
    parser.add_argument("--findings", default="findings", help="a folder for the inputs that broke something")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args, of_libfuzzer = parser.parse_known_args()
    if args.child:
        return run_child(args.child, of_libfuzzer)
    if of_libfuzzer:
        parser.error(f"unrecognized arguments: {' '.join(of_libfuzzer)}")
    results = {}
    print(f"{'target':<14}{'executions':>12}{'edges':>8}{'findings':>10}")
    for name in args.targets or target_names():
        results[name] = fuzz(name, args.seconds, Path(args.findings))
        print(f"{name:<14}{results[name]['executions']:>12,}{results[name]['edges']:>8,}"
              f"{len(results[name]['findings']):>10}", flush=True)  # fmt: skip
    print(json.dumps({"seconds": args.seconds, "python": platform.python_version(), "targets": results}))
    return any(result["findings"] for result in results.values())


def target_names():
    listed = re.search(r"\nTARGETS = \{(.*?)\}", (ROOT / "fuzz/targets.py").read_text(encoding="utf-8"), re.DOTALL)
    return re.findall(r"(\w+): _seed_", listed.group(1))


def fuzz(name, seconds, findings):
    """Run one target: executions, edges covered, and the files that broke it.

    Raises:
        RuntimeError: where it did not begin.
    """
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    with tempfile.TemporaryDirectory() as corpus:
        command = [
            sys.executable, __file__, "--child", name, corpus, f"-max_total_time={seconds}", f"-rss_limit_mb={RSS_MB}",
            f"-timeout={SECONDS_EACH}", f"-max_len={MAX_LEN}", "-print_final_stats=1", "-verbosity=1",
            f"-artifact_prefix={findings.resolve()}/{name}-",
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    executions = re.search(r"stat::number_of_executed_units:\s+(\d+)", ended.stderr)
    edges = re.findall(r"\bcov: (\d+)", ended.stderr)
    found = sorted(path.name for path in set(findings.iterdir()) - before)
    if not edges or (ended.returncode and not found):
        raise RuntimeError(f"{name} ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
    if found:
        print((ended.stdout + ended.stderr)[-3000:], file=sys.stderr)
    return {"executions": int(executions.group(1)) if executions else 0, "edges": int(edges[-1]), "findings": found}


def run_child(name, arguments):
    """One target under atheris; does not return."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path[:0] = [str(ROOT), str(ROOT / "fuzz")]
    import atheris

    for module in ("tarfile", "zipfile"):
        sys.modules.pop(module, None)  # imported already, and not instrumented then
    with atheris.instrument_imports(include=INSTRUMENTED):
        from targets import TARGETS, call

    import logging
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")
    logging.disable()
    Image.MAX_IMAGE_PIXELS = 2**20  # as in use, but so small that an input takes milliseconds
    target, seeds = TARGETS[name]
    for number, seed in enumerate(seeds()):
        (Path(arguments[0]) / f"seed_{number}").write_bytes(seed)
    atheris.Setup([__file__, *arguments], lambda data: call(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
