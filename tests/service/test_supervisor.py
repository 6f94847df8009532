"""The operator's process, for real: starts, ends, deaths and hangs of its children. The engine is the simulated one
where no answer is looked at (tests/docs/test_readme.py starts the real one)."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from service.display import Display
from service.engine.client import EngineClient
from service.settings import SECRETS, Settings
from service.supervisor import Supervisor
from tests.ports import unused_port
from tests.service.launch import SIMULATED, Launched, run, wait_for
from tests.service.test_model_source import write_tiny_gguf

ENGINE = "service.engine.process"
API = "service.api_worker"
PROMPT = {"model": "SmolLM2-135M-Instruct", "prompt": "The sea", "max_tokens": 4}


@pytest.fixture
def launch(tmp_path: Path, base_model_dir: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Launched]]:
    """Starts a service with the simulated engine on the test's own data folder; all are stopped at the end."""
    running = []

    def start(*flags: str, **env: str) -> Launched:
        simulated = "--simulated", SIMULATED, "--model", str(base_model_dir)
        running.append(Launched(tmp_path, free_port(), *simulated, *flags, **env))
        return running[-1]

    yield start
    for service in running:
        service.__exit__(None, None, None)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[Launched]:
    """One for the tests after which it serves as before."""
    flags = "--simulated", SIMULATED, "--model", str(base_model_dir)
    with Launched(tmp_path_factory.mktemp("service"), unused_port(), *flags) as launched:
        launched.wait_announced()
        yield launched


def test_sigterm_leaves_no_process_behind(launch: Callable[..., Launched]) -> None:
    service = launch("--api-workers", "2")
    service.wait_announced()
    assert service.http.post("/v1/completions", json=PROMPT).status_code == 200
    assert len(list(service.children(API))) == 2
    service.process.terminate()
    assert service.process.wait(60) == 0
    assert service.survivors() == []
    assert "loraplex has stopped" in service.log.read_text()
    with pytest.raises(httpx.ConnectError):
        service.http.get("/health")


def test_ctrl_c_finishes_what_runs(launch: Callable[..., Launched]) -> None:
    service = launch("--simulated", '{"vocab_size": 49152, "step_s": 0.05}')
    service.wait_announced()
    body = {**PROMPT, "max_tokens": 40, "stream": True, "ignore_eos": True}
    with service.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        service.process.send_signal(signal.SIGINT)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2].replace(" ", "")
    assert service.process.wait(60) == 0
    assert service.survivors() == []


def test_a_killed_supervisor_takes_everything_with_it(launch: Callable[..., Launched]) -> None:
    service = launch()
    service.wait_announced()
    assert len(service.family()) >= 3
    service.process.kill()
    service.process.wait()
    wait_for(lambda: not service.survivors())


def test_a_start_counts_anew_though_process_ids_come_again(launch: Callable[..., Launched], tmp_path: Path) -> None:
    """In a container the processes of every start have the same ones."""
    earlier = tmp_path / "run" / "metrics" / str(os.getpid())
    earlier.mkdir(parents=True)
    (earlier / f"gauge_livesum_{os.getpid()}.db").touch()
    service = launch("--api-workers", "2")
    service.wait_announced()
    assert [folder.name for folder in earlier.parent.iterdir()] == [str(service.process.pid)]


def test_a_killed_engine_comes_back(service: Launched) -> None:
    first = service.child(ENGINE)
    first.kill()
    wait_for(lambda: not service.ready())
    wait_for(service.ready)
    assert service.child(ENGINE).pid != first.pid
    assert service.http.post("/v1/completions", json=PROMPT).status_code == 200
    assert "the engine was killed by SIGKILL; starting another one" in service.log.read_text()


def test_a_hung_engine_is_replaced(launch: Callable[..., Launched]) -> None:
    service = launch("--unhealthy-s", "1")
    service.wait_announced()
    first = service.child(ENGINE)
    first.suspend()
    wait_for(lambda: not service.ready())  # the API process finds out by itself, perhaps after the supervisor
    wait_for(lambda: not first.is_running())
    wait_for(service.ready)
    assert service.http.post("/v1/completions", json=PROMPT).status_code == 200


def test_a_killed_api_process_comes_back(service: Launched) -> None:
    engine, first = service.child(ENGINE), service.child(API)
    first.kill()
    wait_for(lambda: any(process.pid != first.pid for process in service.children(API)))
    wait_for(service.ready)
    assert service.http.post("/v1/completions", json=PROMPT).status_code == 200
    assert service.child(ENGINE) == engine


async def test_an_api_process_that_dies_while_the_start_asks_it_does_not_end_the_service(tmp_path: Path) -> None:
    """Killed when it was ready, as the list of models is asked for: the start asks the next one for everything."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            asked.append(head.split()[1])
            if asked == [b"/ready", b"/v1/models"]:
                break
            body = b'{"data": [{"id": "the-model"}]}'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            if len(asked) == 4:
                break
        writer.close()

    said = io.StringIO()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        supervisor = Supervisor(Settings.load(data_dir=tmp_path), Display(Console(file=said)))
        await supervisor._announce(EngineClient(f"ipc://{tmp_path}/engine.ipc"), server.sockets[0])
    assert asked == [b"/ready", b"/v1/models"] * 2
    assert "the-model" in said.getvalue()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_only_the_engine_may_load_torch(service: Launched) -> None:
    assert service.http.post("/v1/completions", json=PROMPT).status_code == 200
    for process in (psutil.Process(service.process.pid), service.child(API)):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libpython" in maps or "python" in maps
        assert "libtorch" not in maps


def test_a_second_start_needs_no_network(tmp_path: Path, base_model_dir: Path, free_port: Callable[[], int]) -> None:
    (tmp_path / "models").symlink_to(base_model_dir.parent)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    with Launched(tmp_path, free_port(), "--simulated", SIMULATED, **nowhere) as service:
        service.wait_announced()
        assert service.http.get("/v1/models").json()["data"][0]["id"] == base_model_dir.name


def test_sigterm_during_the_first_start(tmp_path: Path, free_port: Callable[[], int]) -> None:
    source = tmp_path / "tiny.gguf"
    write_tiny_gguf(source)
    with Launched(tmp_path, free_port(), "--simulated", SIMULATED, "--model", str(source)) as service:
        wait_for(lambda: "importing torch" in service.log.read_text())
        assert len(service.family()) == 2
        service.process.terminate()
        assert service.process.wait(60) == 0
        assert service.survivors() == []
    assert [path.name for path in (tmp_path / "models").rglob("*") if path.is_file()] == [".lock"]


def test_sigterm_while_the_model_is_looked_at(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Nothing breaks the thread off that reads it, nor one that downloads: it is not waited for."""
    source = tmp_path / "huge.gguf"
    with source.open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no room, and hours to read
    with Launched(tmp_path, free_port(), "--simulated", SIMULATED, "--model", str(source)) as service:
        wait_for(lambda: "checking huge.gguf" in service.log.read_text())
        service.process.terminate()
        assert service.process.wait(60) == 0
        assert "loraplex has stopped" in service.log.read_text()


def test_a_second_service_on_one_data_folder_is_refused(launch: Callable[..., Launched], tmp_path: Path) -> None:
    service = launch()
    wait_for((tmp_path / "run" / "lock").exists)
    wait_for((tmp_path / "run" / "lock").read_text)
    second = run("--data-dir", str(tmp_path), "--port", "0")
    assert second.returncode == 1
    problem, hint = second.stdout.splitlines()
    assert problem == f"loraplex: {tmp_path} is in use by another loraplex (process {service.process.pid})"
    assert "--data-dir" in hint


def test_a_port_in_use_is_one_line_and_a_hint(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = run("--port", str(port), "--data-dir", str(tmp_path))
    assert refused.returncode == 1
    problem, hint = refused.stdout.splitlines()
    assert problem == f"loraplex: 127.0.0.1:{port} cannot be used: Address already in use"
    assert "--port" in hint


@pytest.mark.parametrize(
    ("flags", "env", "line"),
    [
        (["--port", "70000"], {}, "port=70000: should be less than or equal to 65535"),
        ([], {"LORAPLEX_PORT": "http"}, "LORAPLEX_PORT=http: should be a valid integer"),
        ([], {"LORAPLEX_DEVICE": "tpu"}, "LORAPLEX_DEVICE=tpu: should be"),
    ],
)
def test_a_wrong_setting_names_key_and_value(flags: list[str], env: dict[str, str], line: str) -> None:
    refused = run(*flags, **env)
    assert refused.returncode == 2
    assert refused.stdout.startswith(f"loraplex: {line}")
    assert len(refused.stdout.splitlines()) == 1


def test_a_model_that_is_not_there_is_one_line_and_a_hint(tmp_path: Path) -> None:
    refused = run("--model", "/no/such/model", "--port", "0", "--data-dir", str(tmp_path))
    assert refused.returncode == 1
    problem, hint = refused.stdout.splitlines()
    assert problem.startswith("loraplex: LORAPLEX_MODEL=/no/such/model: ")
    assert hint.startswith("  hint: ")


def test_an_engine_that_cannot_start_ends_the_service(tmp_path: Path, base_model_dir: Path) -> None:
    flags = "--simulated", "not JSON", "--model", str(base_model_dir), "--port", "0", "--data-dir", str(tmp_path)
    refused = run(*flags)
    assert refused.returncode == 1
    assert "loraplex: the engine ended with exit code 1 before it was ready" in refused.stdout


def test_every_setting_but_secrets_is_a_flag() -> None:
    text = run("--help").stdout
    for name in Settings.model_fields:
        flag = f"--{name.replace('_', '-')}"
        assert (flag in text) == (name not in SECRETS)
        if name in SECRETS:  # whoever may list processes reads their flags
            continue
        assert f"(LORAPLEX_{name.upper()})" in " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--device", "cuda"), ("LORAPLEX_DEVICE=cuda", "--device cpu")),
        (("--device", "cuda", "--deterministic", "--eager"), ("LORAPLEX_DETERMINISTIC=true", "LORAPLEX_EAGER=true")),
        (("--device", "cpu", "--max-positions", "100000"), ("max_positions: 100000", "")),
    ],
)
def test_an_engine_that_cannot_start_is_one_line_and_a_hint(tmp_path, base_model_dir, free_port, flags, says):
    import torch

    if flags == ("--device", "cuda") and torch.cuda.is_available():
        flags, says = (*flags, "--kv-pages", "100000000"), ("memory", "LORAPLEX_KV_PAGES")
    done = run("--data-dir", str(tmp_path), "--port", str(free_port()), "--model", str(base_model_dir), *flags)
    assert done.returncode != 0
    problem, *hint = done.stdout[done.stdout.rindex("loraplex: ") :].splitlines()
    assert says[0] in problem
    assert says[1] in "".join(hint)
    assert "Traceback" not in done.stdout
