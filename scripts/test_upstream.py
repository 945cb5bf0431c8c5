"""Build llama.cpp's own tests against the installed, patched libraries, and run them: those that need no download.

    python scripts/test_upstream.py                 # all: about 10 minutes, the first time
    python scripts/test_upstream.py --memory        # those that exercise the cache, without LU-KV and with it
    python scripts/test_upstream.py NAME...         # by their names in ctest

The libraries are those of `pip show llama_cpp_python`. Sources and objects stay in the cache (upstream/ there), so that
only what has changed is built again. With LU-KV, the tests run on the same models with a table embedded; where upstream
asks for a model to download, a random one takes its place. Nothing in the tests is changed.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_llama_cpp import ROOT, build_key, cache_dir, fail, fetch_sdist, prepare
from filelock import FileLock

MEMORY = (
    "test-batch-alloc", "test-save-load-state", "plain-thread-safety", "plain-state-restore-fragmented",
    "lukv-save-load-state-all", "lukv-thread-safety", "lukv-state-restore-fragmented",
)  # fmt: skip
FIXTURES = ("test-generate-models", "lukv-tables")  # models that others need
DOWNLOADING = {  # a model, or asking a web site; some run on a random model instead, and are called plain-*
    "test-tokenizers-ggml-vocabs", "test-download-model", "test-thread-safety", "test-state-restore-fragmented",
    "test-autorelease", "test-model-load-cancel", "test-backend-sampler", "test-arg-parser",
}  # fmt: skip


def synchronise(source: Path, target: Path) -> None:
    """Make `target` equal to `source`, and touch only files that differ: the others need not be built again."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in [path for path in target.rglob("*") if path.is_file()]:
        if path.relative_to(target) not in wanted:
            path.unlink()
    for path in wanted:
        if not (target / path).exists() or not filecmp.cmp(source / path, target / path, shallow=False):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
            shutil.copymode(source / path, target / path)


def patched_source(folder: Path) -> Path:
    """The patched llama.cpp in `folder`, brought up to date."""
    target, key = folder / "llama.cpp", build_key([])
    stamp = folder / "source-key"
    if not stamp.exists() or stamp.read_text() != key:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            prepared = prepare(fetch_sdist(cache_dir() / "downloads"), Path(temporary), key)
            stamp.unlink(missing_ok=True)
            synchronise(prepared / "vendor" / "llama.cpp", target)
        stamp.write_text(key)
    return target


def registered_tests(build: Path) -> dict[str, Path]:
    """The program of each test that CMake registered."""
    files = [build / "CTestTestfile.cmake", build / "upstream" / "CTestTestfile.cmake"]
    found = [re.findall(r'^add_test\("?([^" ]+)"? "([^"]+)"', file.read_text(), re.M) for file in files]
    return {name: Path(program) for tests in found for name, program in tests}


def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], text=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="tests to run, by their names in ctest")
    parser.add_argument("--memory", action="store_true", help="only the tests that exercise the cache")
    parser.add_argument("--verbose", action="store_true", help="show what passing tests print, too")
    arguments = parser.parse_args()
    import llama_cpp

    programs = Path(sys.executable).parent
    libraries = Path(llama_cpp.__file__).parent / "lib"
    folder = cache_dir() / "upstream"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        source = patched_source(folder)
        tests, build = ROOT / "tests" / "upstream", folder / "build"
        settings = {"SOURCE": source, "LIBRARIES": libraries, "TABLES": tests / "embed_tables.py", "PYTHON": sys.executable}
        # fresh: the folder may have been configured for another checkout; objects stay
        configure = [programs / "cmake", "--fresh", "-S", tests, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", *(f"-D{name}={value}" for name, value in settings.items())]
        configured = run(configure, capture_output=True)
        if configured.returncode:
            fail(f"cmake cannot configure the tests: {configured.stderr.strip()}")

        programs_of = registered_tests(build)
        chosen = list(MEMORY if arguments.memory else arguments.names or programs_of.keys() - DOWNLOADING)
        for name in chosen:
            if name not in programs_of:
                fail(f"no test is called {name}; there are: {' '.join(programs_of)}")
        targets = {programs_of[name].name for name in [*chosen, *FIXTURES] if programs_of[name].parent == build / "bin"}
        built = run([programs / "ninja", "-C", build, *sorted(targets)], capture_output=True)
        if built.returncode:
            fail(f"the tests cannot be built:\n{built.stdout[-4000:]}")
        pattern = "^(" + "|".join(map(re.escape, chosen)) + ")$"
        command = [programs / "ctest", "--test-dir", build, "--timeout", 1200, "-R", pattern]
        command += ["--verbose" if arguments.verbose else "--output-on-failure"]
        # some run python3, with the packages of this environment
        sys.exit(run(command, env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}).returncode)


if __name__ == "__main__":
    main()
