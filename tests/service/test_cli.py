"""The commands against the real application with a simulated engine: what they print into a pipe and on a terminal, and
how they end."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service import __version__
from service.cli import COMMANDS, app
from tests.service.client_helpers import Exchange, adapter_json, peft_folder, scripted
from tests.service.inference_helpers import BASE, ROOT, InferenceServer

PROMPT = "The sea is"
LORAPLEX = [sys.executable, "-m", "service.cli"]
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}


@pytest.fixture
def cli(server: InferenceServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command in this process; the result has exit_code, stdout and stderr."""
    monkeypatch.setenv("LORAPLEX_URL", server.url)

    def run(*arguments: object, **more: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **more)

    return run


def process(*arguments: object, url: str = "", stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a shell does, in pipes."""
    environment = {**ENVIRONMENT, **({"LORAPLEX_URL": url} if url else {}), **env}
    return subprocess.run(
        [*LORAPLEX, *map(str, arguments)], cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: object, url: str, **env: str) -> None:
        self._end, other = pty.openpty()
        environment = {**ENVIRONMENT, "LORAPLEX_URL": url, **env}
        self.process = subprocess.Popen(
            [*LORAPLEX, *map(str, arguments)], cwd=ROOT, env=environment, stdin=other, stdout=other, stderr=other,
            start_new_session=True,
        )  # fmt: skip
        os.close(other)
        self.text = ""

    def read_until(self, text: str, seconds: float = 120.0) -> None:
        self._read(lambda: text in self.text, seconds)
        assert text in self.text

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def finish(self, seconds: float = 120.0) -> int:
        """Everything it wrote is in `text`; the exit code."""
        self._read(lambda: False, seconds)
        code = self.process.wait(seconds)
        os.close(self._end)
        return code

    def _read(self, enough: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not enough():
            if not select.select([self._end], [], [], max(0.0, until - time.monotonic()))[0]:
                self.process.kill()
                raise TimeoutError(self.text)
            try:
                data = os.read(self._end, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self.text += data.decode("utf-8", "replace")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return peft_folder(tmp_path / "folder", 101)


# ---------------------------------------------------------------- adapters


def test_upload_list_show_download_delete(cli: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    name = "cli-life"
    done = cli("upload", name, folder, "--description", "a\tb", "--label", "team=cli")
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.fullmatch(rf"{name}@1  uploaded \(rank 4, \d+ B\)\n", done.stdout)
    assert "unchanged" in cli("upload", name, folder).stdout
    assert cli("upload", name, folder, "--create").exit_code == 0  # the same content is no conflict
    second = peft_folder(tmp_path / "second", 102, shards=2)
    assert f"{name}@2  uploaded (not the default)" in cli("upload", name, second, "--no-default").stdout
    refused = cli("upload", name, peft_folder(tmp_path / "third", 103), "--create")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("loraplex: ")

    listed = cli("list", "--label", "team=cli")
    fields = listed.stdout.removesuffix("\n").split("\t")
    assert fields[:4] == [name, "1", "2", "4"]
    assert fields[4].isdigit()
    assert fields[6:] == ["ready", "a b"]
    (as_json,) = json.loads(cli("list", "--label", "team=cli", "--json").stdout)
    assert (as_json["object"], as_json["description"]) == ("adapter", "a\tb")

    shown = cli("show", name).stdout
    assert "labels: team=cli\n" in shown
    assert "versions: 1, 2\n" in shown
    assert "version: cli-life@2\n" in cli("show", f"{name}@2").stdout
    assert "file: adapter_model-00001-of-00002.safetensors" in cli("show", f"{name}@2").stdout
    assert json.loads(cli("show", f"{name}@1", "--json").stdout)["object"] == "adapter.version"

    down = tmp_path / "down"
    paths = cli("download", f"{name}@1", down).stdout.splitlines()
    assert {Path(path).name for path in paths} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (down / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    (down / "adapter_config.json").write_text("mine")
    clash = cli("download", f"{name}@1", down)
    assert clash.exit_code == 2
    assert "exists with other content" in clash.stderr
    assert cli("download", f"{name}@1", down, "--force").exit_code == 0

    assert cli("load", f"{name}@1").stdout == f"{name}@1  device\n"
    assert cli("unload", f"{name}@1").stdout.startswith(f"{name}@1  ")
    assert cli("delete", f"{name}@2").stdout.startswith(f"{name}@2  deleted (")
    gone = json.loads(cli("delete", name, "--json").stdout)
    assert gone["adapter_deleted"]
    missing = cli("show", name)
    assert missing.exit_code == 1
    assert (
        missing.stderr
        == f"loraplex: There is no adapter named '{name}'.\n  hint: `loraplex list` shows what there is\n"
    )


def test_a_version_is_not_dropped(cli: Callable[..., Any], folder: Path) -> None:
    name = "cli-whole"
    assert cli("upload", name, folder).exit_code == 0
    for command, *more in (("upload", folder), ("upload", folder, "--create"), ("share",), ("share", "--public")):
        refused = cli(command, f"{name}@5", *more)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"'{name}@5' names a version" in refused.stderr
    for command, *more in (("show",), ("delete", "--yes"), ("download", folder), ("load",), ("unload",)):
        refused = cli(command, f"{name}@", *more)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"'{name}@' has no version" in refused.stderr
    assert "versions: 1\n" in cli("show", name).stdout
    assert cli("delete", name).exit_code == 0


def test_every_reason_is_on_a_line_of_its_own(cli: Callable[..., Any], folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True, "bias": "all"}))
    refused = cli("upload", "cli-wrong", folder)
    assert refused.exit_code == 1
    first, *reasons = refused.stderr.splitlines()
    assert first == "loraplex: The adapter does not fit:"
    assert len(reasons) >= 2
    assert all(reason.startswith("  - ") for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upload", "x", "/no/such/folder"], "is not a folder"),
        (["upload", "x", "{folder}", "--label", "novalue"], "is not KEY=VALUE"),
        (["run", "base", "hi", "--adapter", "a=much"], "is not NAME=WEIGHT"),
        (["run", "base", "hi", "--adapter", "a=nan"], "is not NAME=WEIGHT"),
        (["run", "base", "hi", "--adapter", "a", "--adapter", "a=2"], "given twice"),
        (["run", "base", "hi", "--temperature", "7"], "--temperature"),
        (["run", "base", "hi", "--raw", "--system", "x"], "--system"),
        (["run", "base"], "it is empty"),
        (["compare", "base"], "prompt"),
        (["merge", "ab", "a", "b", "--output", "x"], "--into checkpoint"),
        (["merge", "ab", "a", "--into", "nothing"], "nothing"),
        (["list", "--url", "not-a-url"], "is not the URL of a server"),
        (["nosuch"], "No such command"),
        (["lst"], "Did you mean 'list'"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2(cli: Callable[..., Any], folder: Path, arguments: list[str], message: str) -> None:
    done = cli(*(argument.format(folder=folder) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.stderr.replace("\n", " ")
    assert done.stdout == ""


# ---------------------------------------------------------------- inference


def test_run(cli: Callable[..., Any], server: InferenceServer, adapters: dict[str, str]) -> None:
    greedy = ["--temperature", "0", "--max-tokens", "12", "--raw"]
    plain = server.expected_text(PROMPT, 12)
    assert cli("run", "base", PROMPT, *greedy).stdout == plain.removesuffix("\n") + "\n"
    assert cli("run", BASE, PROMPT, *greedy).stdout.startswith(plain)
    assert cli("run", "base", *greedy, input=f"{PROMPT}\n").stdout.startswith(plain)
    assert cli("run", "base", "-", *greedy, input=PROMPT).stdout.startswith(plain)
    one = server.expected_text(PROMPT, 12, {adapters["first@1"]: 1.0})
    assert cli("run", "first@old", PROMPT, *greedy).stdout.startswith(one)
    mixed = server.expected_text(PROMPT, 12, {adapters["first@2"]: 0.7, adapters["second@1"]: -1.0})
    mix = ["--adapter", "first=0.7", "--adapter", "second=-1"]
    assert cli("run", "base", PROMPT, *greedy, *mix).stdout.startswith(mixed)
    answer = json.loads(cli("run", "base", PROMPT, *greedy, *mix, "--json").stdout)
    assert (answer["adapter"], answer["choices"][0]["text"]) == ("first@2, second@1", mixed)

    ask = ["run", "second", "Hello", "--max-tokens", "9", "--seed", "5"]
    chat = cli(*ask, "--system", "Be brief.")
    assert chat.exit_code == 0
    assert cli(*ask, "--system", "Be brief.").stdout == chat.stdout != cli(*ask).stdout
    missing = cli("run", "nobody", "Hello")
    assert missing.exit_code == 1
    assert "'nobody' does not exist" in missing.stderr
    assert cli("run", "second", "Hello", *mix).exit_code == 1  # mixes are for the base


def test_compare(cli: Callable[..., Any], server: InferenceServer, adapters: dict[str, str]) -> None:
    arguments = ["first", "second", PROMPT, "--temperature", "0", "--max-tokens", "8", "--raw"]
    expected = {
        BASE: server.expected_text(PROMPT, 8),
        "first": server.expected_text(PROMPT, 8, {adapters["first@2"]: 1.0}),
        "second": server.expected_text(PROMPT, 8, {adapters["second@1"]: 1.0}),
    }
    answers = json.loads(cli("compare", *arguments, "--json").stdout)["answers"]
    assert {answer["model"]: answer["text"] for answer in answers} == expected
    printed = cli("compare", *arguments).stdout
    assert printed == "".join(f"== {name}\n{text.removesuffix(chr(10))}\n\n" for name, text in expected.items())
    # Sampled, but with the same seed: the base twice is once.
    same = cli("compare", "base", BASE, PROMPT, "--max-tokens", "8", "--json")
    assert [answer["model"] for answer in json.loads(same.stdout)["answers"]] == [BASE]
    failed = cli("compare", "first", "nobody", PROMPT)
    assert (failed.exit_code, failed.stdout) == (1, "")


# ---------------------------------------------------------------- how commands end


def test_not_reachable_is_3(free_port: Callable[[], int], folder: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for arguments in (["list"], ["upload", "x", folder], ["run", "base", "hi"], ["compare", "a", "hi"], ["merges"]):
        done = CliRunner().invoke(app, [*map(str, arguments), "--url", url])
        assert (done.exit_code, done.stdout) == (3, "")
        first, hint = done.stderr.splitlines()
        assert first.startswith(f"loraplex: cannot reach {url}: ")
        assert "loraplex serve" in hint
    before = process("--url", url, "list")
    assert (before.returncode, before.stdout) == (3, "")
    html = [lambda x: x.answer(200, b"<html>")]
    with scripted(html) as (other, _):
        assert CliRunner().invoke(app, ["list", "--url", other]).exit_code == 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_busy_is_4(status: int) -> None:
    with scripted(lambda x: x.refuse(status, {"Retry-After": "90"}, message="later")) as (url, _):
        done = CliRunner().invoke(app, ["list", "--url", url])
        assert (done.exit_code, done.stdout) == (4, "")
        assert done.stderr == "loraplex: later\n  hint: try again in 90 s\n"


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def refuse(exchange: Exchange) -> None:
        seen.append(exchange.headers["authorization"])
        exchange.refuse(401, message="Who are you?")

    monkeypatch.setenv("LORAPLEX_KEY", "from-outside")
    with scripted(refuse) as (url, _):
        monkeypatch.setenv("LORAPLEX_URL", url)
        for arguments in (["list"], ["--key", "before", "list"], ["--key", "before", "list", "--key", "after"]):
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 1
            assert "LORAPLEX_KEY" in done.stderr
    assert seen == ["Bearer from-outside", "Bearer before", "Bearer after"]


def test_ready(cli: Callable[..., Any], free_port: Callable[[], int]) -> None:
    assert cli("ready").stdout == "ready\n"
    assert cli("ready", "--wait", "0.2", "--url", f"http://127.0.0.1:{free_port()}").exit_code == 3


def test_ctrl_c_is_130(tmp_path: Path) -> None:
    """In the middle of an upload: no traceback, and the process is gone."""
    folder = peft_folder(tmp_path / "a", 1)
    (folder / "adapter_model.safetensors").write_bytes(bytes(4 << 20))
    begun, over = threading.Event(), threading.Event()

    def stall(exchange: Exchange) -> None:
        next(exchange.pieces())
        begun.set()
        over.wait(60)
        exchange.cut()

    with scripted(stall) as (url, _):
        command = [*LORAPLEX, "upload", "a", str(folder), "--url", url]
        upload = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert begun.wait(60)
        upload.send_signal(signal.SIGINT)
        out, err = upload.communicate(timeout=120)
        over.set()
    assert (upload.returncode, out, err) == (130, "", "")


def test_a_reader_that_goes_away(server: InferenceServer) -> None:
    # Far more than a pipe holds: otherwise all of it may have been written before the reader goes.
    page = {"object": "list", "data": [adapter_json(f"a{n}") for n in range(10000)], "has_more": False, "last_id": None}
    with scripted(lambda x: x.answer(200, page)) as (url, _):
        command = f"{' '.join(LORAPLEX)} list --url {url} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.stdout.startswith("a0\t")
    assert (done.returncode, done.stderr) == (141, "")


# ---------------------------------------------------------------- on a terminal


def test_tables_and_colours_are_for_terminals(server: InferenceServer, adapters: dict[str, str]) -> None:
    shown = Terminal("list", url=server.url)
    assert shown.finish() == 0
    assert "DESCRIPTION" in shown.text
    assert "first" in shown.text
    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        failed = Terminal("show", "nobody-here", url=server.url, **env)
        assert failed.finish() == 1
        assert "There is no adapter" in failed.text
        assert ("\x1b[1;31m" in failed.text) is coloured
    piped = process("show", "nobody-here", url=server.url)
    assert "\x1b" not in piped.stderr


def test_run_and_compare_on_a_terminal(server: InferenceServer, adapters: dict[str, str]) -> None:
    asked = Terminal("run", "first", PROMPT, "--raw", "--temperature", "0", "--max-tokens", "5", url=server.url)
    assert asked.finish() == 0
    assert "--max-tokens sets it" in asked.text  # on stderr, for who watches
    compared = Terminal("compare", "first", "Hello", "--max-tokens", "5", url=server.url)
    assert compared.finish() == 0
    assert f"─ {BASE} " in compared.text
    assert "─ first " in compared.text
    assert "╰" in compared.text


def test_what_a_model_writes_does_not_steer_the_terminal() -> None:
    evil = "a\x1b]0;title\x07b\x9b31mc\x08d"
    delta = json.dumps({"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": "stop"}]})
    stream = f"data: {delta}\n\ndata: [DONE]\n\n".encode()
    with scripted(lambda x: x.answer(200, stream)) as (url, _):
        shown = Terminal("run", "m", "x", url=url)
        assert shown.finish() == 0
        assert shown.text == "a]0;titleb31mcd\r\n"
        assert process("run", "m", "x", url=url).stdout == evil + "\n"  # a pipe gets what there is


def test_an_upload_shows_its_progress(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    (folder / "adapter_model.safetensors").write_bytes(bytes(24 << 20))
    go_on = threading.Event()

    def slowly(exchange: Exchange) -> None:
        pieces = exchange.pieces()
        next(pieces)
        go_on.wait(60)
        sum(pieces)
        exchange.answer(201, adapter_json())

    with scripted(slowly) as (url, _):
        shown = Terminal("upload", "a", folder, url=url)
        shown.read_until("/25.2 MB")
        assert "uploading a" in shown.text
        go_on.set()
        assert shown.finish() == 0
    assert "MB/s" in shown.text
    assert "a@1  uploaded" in shown.text


def test_delete_asks_on_a_terminal(cli: Callable[..., Any], server: InferenceServer, folder: Path) -> None:
    assert cli("upload", "cli-ask", folder).exit_code == 0
    asked = Terminal("delete", "cli-ask", url=server.url)
    asked.read_until("with all its versions? [y/N]")
    asked.type("n\n")
    assert asked.finish() == 1
    assert cli("show", "cli-ask").exit_code == 0
    asked = Terminal("delete", "cli-ask", url=server.url)
    asked.read_until("[y/N]")
    asked.type("y\n")
    assert asked.finish() == 0
    assert cli("show", "cli-ask").exit_code == 1


# ---------------------------------------------------------------- help, completion, installation


def test_help_of_every_command() -> None:
    root = CliRunner().invoke(app, ["--help"])
    assert root.exit_code == 0
    for name, listed in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(listed.help)}$", root.stdout, re.MULTILINE)
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        if name not in ("serve", "version"):
            assert "--url" in shown.stdout
            assert "--key" in shown.stdout
    assert "Exit codes: 0 done" in root.stdout
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{__version__}\n"
    assert CliRunner().invoke(app, ["version"]).stdout == f"{__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["version"], ["nosuch"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["loraplex", *{arguments!r}]
from service.cli import main
try:
    main()
except SystemExit:
    pass
slow = {{"torch", "numpy", "pydantic_settings", "sqlalchemy", "httpx", "rich", "fastapi"}}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def complete(words: str, url: str, **env: str) -> list[str]:
    """What bash is offered at the end of `words`, by way of what --show-completion gives it."""
    line = {"_LORAPLEX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'loraplex'; from service.cli import main; main()"],
        cwd=ROOT, env={**ENVIRONMENT, "LORAPLEX_URL": url, **line, **env}, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


def complete_from_server(words: str, url: str, **env: str) -> list[str]:
    """The same of names that the server has. A shell waits a second for them: where that is too short for a busy
    machine, nothing is offered, and it is asked again."""
    until = time.monotonic() + 60
    while not (offered := complete(words, url, **env)) and time.monotonic() < until:
        pass
    return offered


def test_completion(server: InferenceServer, adapters: dict[str, str], free_port: Callable[[], int]) -> None:
    assert complete("loraplex mer", server.url) == ["merge", "merges"]
    assert complete("loraplex merges d", server.url) == ["download", "delete"]
    assert "--max-tokens" in complete("loraplex run --m", server.url)
    assert complete_from_server("loraplex show fir", server.url) == ["first"]
    assert complete_from_server("loraplex compare first sec", server.url) == ["second"]
    assert {"first", "second"} <= set(complete_from_server("loraplex delete ", server.url))
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert complete("loraplex show fir", nowhere) == []
    assert complete_from_server(f"loraplex show --url {server.url} fir", nowhere) == ["first"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script(shell: str) -> None:
    code = "import sys; sys.argv = ['loraplex', '--show-completion']; from service.cli import main; main()"
    environment = {**ENVIRONMENT, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code = code.replace("'--show-completion'", f"'--show-completion', '{shell}'")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "_LORAPLEX_COMPLETE" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_serve_says_what_is_missing() -> None:
    """In an interpreter that does not find what the extra `server` brings."""
    code = """
import sys
hidden = {"torch", "fastapi", "pydantic_settings", "sqlalchemy"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else found(name, package)
sys.meta_path.insert(0, Hide())
sys.argv = ["loraplex", "serve"]
from service.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "pip install 'loraplex[server]'" in line
