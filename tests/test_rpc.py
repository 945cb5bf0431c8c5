"""Two servers on loopback as the devices of a model: layers, their cells and the commits are on other machines."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from scorers import random_scorer
from test_native import F16, F32, feed, load, metadata, nmse, random_tokens, uneven_budget
from tiny_gguf import write_tiny

from lukv_gguf import metrics, runtime
from lukv_gguf.metadata import embed

Q8_0 = 8


def run(path: Path, n_gpu_layers: int, kv_type: int, flash_attn: bool) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of a prompt and of single tokens, and the positions that each head keeps."""
    model = load(path, kv_type=kv_type, flash_attn=flash_attn, n_gpu_layers=n_gpu_layers, n_ctx=1024)
    logits = [feed(model, random_tokens(700)), feed(model, random_tokens(7, seed=1))]
    logits += [feed(model, [token]) for token in random_tokens(100, seed=2)]
    usage = runtime.usage(model)
    assert usage.evictions > 5
    return np.concatenate(logits), [runtime.positions(model, *i).tolist() for i in np.ndindex(usage.owned.shape)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"ggml-rpc-server ended with {server.returncode}")


@pytest.fixture
def servers() -> Iterator[list[str]]:
    ports = [free_port(), free_port()]
    program = runtime.program("ggml-rpc-server")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], **quiet) for port in ports]
    try:
        for port, server in zip(ports, running):
            wait_for(port, server)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for server in running:
            server.kill()
            server.wait()


def register(servers: list[str]) -> None:
    """Make devices of the servers, for the rest of the process."""
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    rpc, ggml = (ctypes.CDLL(str(folder / f"lib{name}{suffix}")) for name in ("ggml-rpc", "ggml"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    for server in servers:
        ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(server.encode()))


def compare(path: Path, servers: list[str]) -> None:
    cases = [(F16, True), (F32, False), (Q8_0, True)]
    expected = [run(path, 0, *case) for case in cases]
    register(servers)
    for case, (logits, cells) in zip(cases, expected):
        for n_gpu_layers in (99, 2):  # all layers on the servers, and half of them
            got, got_cells = run(path, n_gpu_layers, *case)
            overlap = sum(len(set(a) & set(b)) for a, b in zip(cells, got_cells)) / sum(map(len, cells))
            assert overlap >= 0.97 and nmse(got, logits) < 1e-2, (case, n_gpu_layers, overlap, nmse(got, logits))


def compare_metrics(path: Path, servers: list[str]) -> None:
    """Scores by stock ops, head by head, against those by ops for all heads of a layer."""

    def kept(name: str, n_gpu_layers: int) -> list[list[int]]:
        metric = metrics.parse(name)
        values = {f"lukv.metric.{key}": value for key, value in metric.params.items()}
        model = load(path, {"lukv.metric": metric.name, **values}, n_gpu_layers=n_gpu_layers)
        for batch in np.split(tokens, np.cumsum([128, 128, 100, 20, 30, 1])):
            feed(model, batch.tolist())
        usage = runtime.usage(model)
        assert usage.evictions >= 3
        return [runtime.positions(model, *i).tolist() for i in np.ndindex(usage.owned.shape)]

    # no two alike, they would have the same score
    tokens = np.random.default_rng(0).permutation(np.arange(3, 899))[:437]
    names = [name for name in metrics.names() if metrics.get(name).native and "capacity" in metrics.get(name).policies]
    names += ["snapkv:carry=1:window=16", "h2o:average=1", "expectedattention:covariance=0:vnorm=0", "curdkv:block=0"]
    expected = {name: kept(name, 0) for name in names}
    register(servers)
    for name, want in expected.items():
        got = kept(name, 99)
        overlap = sum(len(set(a) & set(b)) for a, b in zip(want, got)) / sum(map(len, want))
        assert overlap >= 0.98, (name, overlap)


def test_two_servers_agree_with_the_cpu(tmp_path: Path, servers: list[str]) -> None:
    plain, path = tmp_path / "plain.gguf", tmp_path / "lukv.gguf"
    write_tiny(plain, n_layer=4, n_head=8, n_head_kv=2, d_head=64, n_ctx=4096)
    embed(plain, path, metadata(uneven_budget(4, 2, 0.25), 0.25))
    # a process of its own: the servers stay its devices
    done = subprocess.run([sys.executable, __file__, path, *servers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_metrics_without_an_op_for_all_heads(tmp_path: Path, servers: list[str]) -> None:
    path = tmp_path / "lukv.gguf"
    plain = write_tiny(tmp_path / "plain.gguf", n_layer=2, n_head=6, n_head_kv=2, d_head=64, n_ctx=4096, n_vocab=900)
    embed(plain.path, path, replace(metadata(uneven_budget(2, 2, 0.25), 0.25), scorer=random_scorer(2, 2, 64)))
    done = subprocess.run([sys.executable, __file__, "metrics", path, *servers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    if sys.argv[1] == "metrics":
        compare_metrics(Path(sys.argv[2]), sys.argv[3:])
    else:
        compare(Path(sys.argv[1]), sys.argv[2:])
