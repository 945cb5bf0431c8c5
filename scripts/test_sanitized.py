"""Build llama.cpp with AddressSanitizer and UndefinedBehaviorSanitizer, and run the native tests under them (Linux, GCC).

    python scripts/test_sanitized.py [options of pytest]        # by default TESTS below, without real models

For every night rather than every change: the first build takes about 15 minutes on 2 cores, the tests about five times
as long as usual. Sources and objects stay in the cache (upstream/, sanitized/ there). An error of AddressSanitizer ends
the tests; reports of UndefinedBehaviorSanitizer are collected, and those about files of native/ are failures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from build_llama_cpp import ROOT, cache_dir, fail
from filelock import FileLock
from test_upstream import patched_source

TESTS = ("tests/test_native.py", "tests/test_native_metrics.py", "tests/test_sequences.py")  # the last with any operations
SANITIZERS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1", "-g1")
OPTIONS = [
    "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    *(f"-DCMAKE_{language}_FLAGS_RELWITHDEBINFO={' '.join(SANITIZERS)}" for language in ("C", "CXX")),
    "-DBUILD_SHARED_LIBS=ON",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
    "-DLLAMA_OPENSSL=OFF",
]


def build(folder: Path) -> Path:
    """Build what is not built yet, and return the folder of the libraries and of test-ragged-ops."""
    programs = Path(sys.executable).parent
    (folder / "upstream").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "upstream" / "lock"):
        source, target = patched_source(folder / "upstream"), folder / "sanitized"
        configure = [programs / "cmake", "--fresh", "-S", source, "-B", target, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}"]
        for command in ([*configure, *OPTIONS], [programs / "ninja", "-C", target, "llama"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                fail(f"the build failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        libraries = target / "bin"
        ops = ["c++", "-std=c++17", *SANITIZERS, f"-I{source / 'ggml' / 'include'}"]
        ops += [ROOT / "tests" / "native" / "test-ragged-ops.cpp", f"-L{libraries}", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}", "-o", libraries / "test-ragged-ops"]
        subprocess.run(ops, check=True)
    return libraries


def undefined_behaviour(reports: list[Path]) -> tuple[set[str], set[str]]:
    """The distinct places of UndefinedBehaviorSanitizer's reports: in files of native/, and elsewhere."""
    ours = {path.name for path in (ROOT / "native").rglob("*") if path.is_file()}
    lines = {line for path in reports for line in path.read_text(errors="replace").splitlines() if "runtime error:" in line}
    found = {line for line in lines if re.sub(r":\d.*", "", line.partition(": runtime error:")[0]).rpartition("/")[2] in ours}
    return found, lines - found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, options = parser.parse_known_args()
    libraries = build(cache_dir())
    # Python is not sanitized, so the sanitizers have to be there first; so must libstdc++, whose exceptions they watch
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    preloaded = [subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip() for name in names]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder}/asan",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder}/ubsan",
        }
        ops = subprocess.run([libraries / "test-ragged-ops"], env=environment)
        options = options or [*TESTS, "-m", "not real_model", "-k", "not damaged"]  # those run programs
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        python = {"LD_PRELOAD": " ".join(preloaded), "LLAMA_CPP_LIB_PATH": str(libraries)}
        python["LUKV_TEST_EXAMPLES"] = os.environ.get("LUKV_TEST_EXAMPLES", "10")  # others each time
        tests = subprocess.run(command, cwd=ROOT, env=environment | python)
        reports = sorted(Path(folder).iterdir())
        for report in reports:
            if "ERROR: AddressSanitizer" in report.read_text(errors="replace"):
                print(report.read_text(errors="replace"))
        ours, others = undefined_behaviour(reports)
    for line in sorted(others):
        print(f"in llama.cpp: {line}")
    for line in sorted(ours):
        print(f"in native/: {line}")
    print(f"test-ragged-ops: {ops.returncode}, pytest: {tests.returncode}, undefined behaviour in native/: {len(ours)}")
    sys.exit(bool(ops.returncode or tests.returncode or ours))


if __name__ == "__main__":
    main()
