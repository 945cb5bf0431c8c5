"""Build the patched llama-cpp-python wheel, or take it from the cache. Prints the path of the wheel.

The wheel holds the Python package llama_cpp, its libraries (llama_cpp/lib) and the programs (llama_cpp/bin). It is
cached by content: the key covers the source archive, patches/, native/, this script, the options, the compiler and, as
the code is built for this processor, its features. A wheel enters the cache by a rename, once it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SDIST = "llama-cpp-python==0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

PROGRAMS = ["llama-cli", "llama-server", "llama-bench", "llama-perplexity", "llama-completion", "ggml-rpc-server"]
CMAKE_OPTIONS = [
    "-DLLAVA_BUILD=OFF",  # mtmd comes with the tools
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # would be downloaded
    "-DLLAMA_TOOLS_INSTALL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_RPC=ON",
]
TARGETS = ["llama", "mtmd", *PROGRAMS]


def cache_dir() -> Path:
    """Where builds and downloads are kept: $LUKV_CACHE, else the user's cache."""
    if "LUKV_CACHE" in os.environ:
        return Path(os.environ["LUKV_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lukv-gguf"


def fail(message: str) -> None:
    sys.exit(f"build_llama_cpp: error: {message}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources() -> list[Path]:
    return sorted(p for folder in ("patches", "native") for p in (ROOT / folder).rglob("*") if p.is_file())


def processor() -> str:
    """The features that -march=native sees."""
    try:
        flags = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
        return flags[0] if flags else platform.processor()
    except OSError:
        return platform.processor()


def gpu_options(cuda: bool, metal: bool) -> list[str]:
    """CMake options of a GPU backend, if its tools are there."""
    if cuda:
        if shutil.which("nvcc") is None:
            fail("--cuda needs nvcc: install the CUDA toolkit and put its bin folder on the PATH")
        return ["-DGGML_CUDA=ON"]
    if metal:
        if platform.system() != "Darwin":
            fail("--metal needs macOS: leave it out, or use --cuda on a machine with an NVIDIA GPU")
        if shutil.which("xcrun") is None:
            fail("--metal needs Xcode's command line tools: xcode-select --install")
        return ["-DGGML_METAL=ON"]
    return ["-DGGML_METAL=OFF"] if platform.system() == "Darwin" else []


def build_key(options: list[str]) -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        fail("no C++ compiler found: install one (Debian: apt-get install g++)")
    compilers = [compiler] + (["nvcc"] if "-DGGML_CUDA=ON" in options else [])
    version = "".join(subprocess.run([c, "--version"], capture_output=True, text=True, check=True).stdout for c in compilers)

    key = hashlib.sha256()
    for part in [SDIST_SHA256, sha256(Path(__file__)), *options, version, platform.machine(), processor()]:
        key.update(part.encode() + b"\0")
    for path in sources():
        key.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return key.hexdigest()[:16]


def fetch_sdist(folder: Path, requirement: str = SDIST, expected: str | None = SDIST_SHA256) -> Path:
    """Path of a source archive, whose sha256 must be `expected` if that is given."""
    path = folder / f"{requirement.replace('-', '_').replace('==', '-')}.tar.gz"
    if path.exists() and expected in (None, sha256(path)):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        print(f"fetching {requirement}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-binary", "llama-cpp-python", "--no-build-isolation", "--dest", temporary, requirement]
        result = subprocess.run(pip, capture_output=True, text=True)
        if result.returncode:
            fail(f"cannot download {requirement}: {result.stderr.strip().splitlines()[-1]}")
        found = Path(temporary) / path.name
        if expected not in (None, sha256(found)):
            fail(f"{path.name} is not the file that the patches are made for (sha256 {sha256(found)})")
        found.replace(path)
    return path


def git_apply(diff: str, tree: Path) -> subprocess.CompletedProcess[str]:
    """Apply a patch without fuzz to a tree; all of it or nothing."""
    # not inside a repository: the paths are relative to the current folder
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "GIT_DIR": os.devnull}
    command = ["git", "apply", "--verbose", "-"]
    return subprocess.run(command, cwd=tree, env=environment, input=diff, capture_output=True, text=True)


def prepare(sdist: Path, folder: Path, key: str) -> Path:
    """Unpack the source, apply the patches without fuzz and add the new files."""
    shutil.unpack_archive(sdist, folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    for patch in sorted((ROOT / "patches").glob("*.patch")):
        result = git_apply(patch.read_text(), source)
        if result.returncode:
            fail(f"{patch.name} does not apply: {result.stderr.strip()}")
    shutil.copytree(ROOT / "native", source / "vendor" / "llama.cpp", dirs_exist_ok=True)

    # the version tells the builds apart, so that pip replaces an older one
    init = source / "llama_cpp" / "__init__.py"
    init.write_text(re.sub(r'(__version__ = "[\d.]+)"', rf'\1+lukv.{key}"', init.read_text()))
    return source


def build(source: Path, folder: Path, options: list[str]) -> Path:
    log = folder / "build.log"
    settings = ["cmake.args=" + ";".join(options), "cmake.build-type=Release", *(f"build.targets={t}" for t in TARGETS)]
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder / "wheel"), str(source)]
    command += [item for setting in settings for item in ("-C", setting)]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    print("building llama.cpp with LU-KV: about 10 minutes on 2 cores", file=sys.stderr)
    shown = -1
    with log.open("w") as out, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        for line in process.stdout:
            out.write(line)
            step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            if step and int(step[1]) * 10 // int(step[2]) > shown:
                shown = int(step[1]) * 10 // int(step[2])
                print(f"  {step[1]} of {step[2]}", file=sys.stderr, flush=True)
    wheels = list((folder / "wheel").glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        kept = Path(tempfile.gettempdir()) / "lukv-gguf-build.log"
        shutil.copy(log, kept)
        errors = [line for line in log.read_text().splitlines() if "error" in line.lower()]
        fail(f"the build failed, see {kept}" + (f": {errors[0].strip()}" if errors else ""))
    return wheels[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the patched llama-cpp-python wheel, or take it from the cache.")
    gpu = parser.add_mutually_exclusive_group()
    gpu.add_argument("--cuda", action="store_true", help="with the CUDA backend: needs the CUDA toolkit (nvcc)")
    gpu.add_argument("--metal", action="store_true", help="with the Metal backend: needs macOS and Xcode's command line tools")
    parser.add_argument("--option", action="append", default=[], metavar="-DNAME=VALUE", help="a further CMake option")
    parser.add_argument("--source", type=Path, metavar="DIR", help="only prepare the patched source in DIR")
    arguments = parser.parse_args()

    cache = cache_dir()
    options = CMAKE_OPTIONS + gpu_options(arguments.cuda, arguments.metal) + arguments.option
    key = build_key(options)

    if arguments.source:
        arguments.source.mkdir(parents=True, exist_ok=True)
        print(prepare(fetch_sdist(cache / "downloads"), arguments.source, key))
        return

    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "wheels" / key
    with FileLock(cache / "build.lock"):
        if not target.exists():
            sdist = fetch_sdist(cache / "downloads")
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = cache / "build"  # always the same paths, so that ccache, where there is one, finds the objects again
            shutil.rmtree(folder, ignore_errors=True)
            wheel = build(prepare(sdist, folder, key), folder, options)
            (wheel.parent / "sha256").write_text(sha256(wheel))
            wheel.parent.rename(target)
            shutil.rmtree(folder)
    wheel = next(target.glob("*.whl"))
    if sha256(wheel) != (target / "sha256").read_text():
        fail(f"the cached wheel is damaged: remove {target} and run again")
    print(wheel)


if __name__ == "__main__":
    main()
