"""Two services, two data folders, one PostgreSQL and one S3: what one is told the other knows, and neither takes away
what the other needs. Backup and restore of such a pair."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.crash.world import API, Content, World
from tests.docs.markdown import bash_under
from tests.real_parts import PASSWORD, S3, Postgres, bucket_names
from tests.service.launch import PLAIN, wait_for

MakeWorld = Callable[..., World]


@pytest.fixture
def state(postgres: Postgres, s3: S3) -> dict[str, str]:
    return {"database": postgres.create(), "blobs_url": s3.create()}


@pytest.fixture
def pair(state: dict[str, str], make_world: MakeWorld) -> tuple[World, World]:
    worlds = make_world(engine='{"step_s": 0.01}', **state), make_world(engine='{"step_s": 0.01}', **state)
    for world in worlds:
        world.start()
    return worlds


def complete(world: World, model: str, tokens: int = 4) -> httpx.Response:
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{world.url}/v1/completions", json=body, timeout=120, **PLAIN)


def put(world: World, name: str, content: Content, **params: Any) -> httpx.Response:
    url = f"{world.url}/v1/adapters/{name}"
    return httpx.put(url, files=content.form, params=params, timeout=120, **PLAIN)


def test_two_instances(pair: tuple[World, World], state: dict[str, str]) -> None:
    one, two = pair
    contents = [Content.make(number, rank=4) for number in range(9)]

    # What is uploaded at one is used at the other with the very next request, and the other way round.
    for number, content in enumerate(contents[:4]):
        assert put(pair[number % 2], "a", content).status_code == 201
        answer = complete(pair[1 - number % 2], "a")
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"].strip() == one.answer([1, 2, 3], 4, content.digest)
    assert put(two, "a", contents[0], default="false").status_code == 200

    # Versions of one name from both at once: every one gets a number of its own and all are there.
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(put, pair[i % 2], "b", content) for i, content in enumerate(contents[:6])]
        versions = sorted(done.result().json()["version"] for done in sent)
    assert versions == [1, 2, 3, 4, 5, 6]
    for world in pair:
        assert httpx.get(f"{world.url}/v1/adapters/b", **PLAIN).json()["versions"] == versions

    # Deleted at one while the other runs it: the request ends as if nothing had happened, and its files stay so long.
    last = contents[8]
    assert put(one, "c", last).status_code == 201
    done: list[httpx.Response] = []
    running = threading.Thread(target=lambda: done.append(complete(two, "c", 600)))
    running.start()
    wait_for(lambda: residency(two, "c") == "device")
    assert httpx.delete(f"{one.url}/v1/adapters/c", timeout=60, **PLAIN).status_code == 200
    assert complete(two, "c").status_code == 404
    while running.is_alive():
        names = bucket_names(state["blobs_url"])
        assert last.blobs <= names or not running.is_alive()
        time.sleep(0.2)
    running.join(120)
    assert done[0].json()["choices"][0]["text"].strip() == one.answer([1, 2, 3], 600, last.digest)
    wait_for(lambda: not last.blobs & bucket_names(state["blobs_url"]) - shared(contents[:6]), 60)

    # The same content comes back at one while the other may still be deleting it.
    for turn in range(3):
        assert put(pair[turn % 2], "d", contents[7]).status_code == 201
        assert httpx.delete(f"{pair[1 - turn % 2].url}/v1/adapters/d", timeout=60, **PLAIN).status_code == 200
    assert put(one, "d", contents[7]).status_code == 201
    time.sleep(3.0)  # longer than a deletion takes
    for filename, data in contents[7].files.items():
        numbers = httpx.get(f"{two.url}/v1/adapters/d", **PLAIN).json()["versions"]
        got = httpx.get(f"{two.url}/v1/adapters/d/versions/{numbers[0]}/files/{filename}", timeout=60, **PLAIN)
        assert got.content == data

    # An instance that is killed in the midst of an upload leaves nothing; the other one sees to that.
    needed = bucket_names(state["blobs_url"])
    for process in list(two.running.children(API)):
        process.kill()
    wait_for(two.ready, 60)
    assert bucket_names(state["blobs_url"]) == needed
    logs = one.running.log.read_text() + two.running.log.read_text()
    assert "Traceback" not in logs
    assert PASSWORD not in logs


def residency(world: World, name: str) -> str:
    return str(httpx.get(f"{world.url}/v1/adapters/{name}", timeout=60, **PLAIN).json().get("residency"))


def shared(contents: list[Content]) -> set[str]:
    return {sha for content in contents for sha in content.blobs}


def test_backup_and_restore(
    postgres: Postgres, s3: S3, state: dict[str, str], make_world: MakeWorld, tmp_path: Path
) -> None:
    """docs/operations.md as printed, but for addresses: settings, files, dump, files again; what happens in between
    does no harm."""
    contents = [Content.make(20 + number, rank=4) for number in range(4)]
    (settings,) = bash_under("operations.md", "PostgreSQL and S3")
    backup, restore = bash_under("operations.md", "Backup and restore")
    world = make_world(**settings_of(settings, postgres, s3, state))
    world.start(**AWS)
    assert put(world, "kept", contents[0]).status_code == 201
    assert put(world, "gone", contents[1]).status_code == 201
    copy, dump, copy_again = backup.splitlines()
    run = Commands(postgres, s3, tmp_path)
    run(copy, state)
    assert put(world, "new", contents[2]).status_code == 201
    run(dump, state)
    assert put(world, "later", contents[3]).status_code == 201
    assert httpx.delete(f"{world.url}/v1/adapters/gone", timeout=60, **PLAIN).status_code == 200
    wait_for(lambda: not (contents[1].blobs - shared([contents[0]])) & bucket_names(state["blobs_url"]))
    run(copy_again, state)
    world.stop()

    restored = {"database": postgres.create(), "blobs_url": s3.create()}
    run(restore, restored)
    again = make_world(**restored)
    again.start()
    for name, content in (("kept", contents[0]), ("gone", contents[1]), ("new", contents[2])):
        for filename, data in content.files.items():
            got = httpx.get(f"{again.url}/v1/adapters/{name}/versions/1/files/{filename}", timeout=60, **PLAIN)
            assert (got.status_code, got.content) == (200, data)
    assert httpx.get(f"{again.url}/v1/adapters/later", **PLAIN).status_code == 404
    assert put(again, "later", contents[3]).status_code == 201


AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
PRINTED = "bucket/prefix"


def place(blobs_url: str) -> str:
    """bucket/prefix of a blobs URL."""
    return blobs_url.removeprefix("s3://").partition("?")[0]


def settings_of(block: str, postgres: Postgres, s3: S3, state: dict[str, str]) -> dict[str, str]:
    """What a shell has exported after the block, as make_world takes it: printed addresses replaced by real ones."""
    printed = "postgresql://loraplex:PASSWORD@db.internal:5432/loraplex"
    assert printed in block
    block = block.replace(printed, state["database"]).replace(PRINTED, place(state["blobs_url"]))
    block = block.replace("http://store:9000", f"http://127.0.0.1:{s3.port}")
    code = f'{block}\nprintf "%s\\n" "$LORAPLEX_DATABASE_URL" "$LORAPLEX_BLOBS_URL"'
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, check=True)
    database, blobs_url = done.stdout.splitlines()
    assert str(s3.port) in blobs_url
    return {"database": database, "blobs_url": blobs_url}


class Commands:
    """Runs printed commands in one folder, with PostgreSQL's programs and the AWS command line."""

    def __init__(self, postgres: Postgres, s3: S3, folder: Path) -> None:
        self._folder = folder
        path = [str(postgres.bin), f"{sys.prefix}/bin", os.environ["PATH"]]
        self._env = {
            **os.environ,
            **AWS,
            "PATH": os.pathsep.join(path),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3.port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __call__(self, commands: str, state: dict[str, str]) -> None:
        text = commands.replace(f"s3://{PRINTED}", f"s3://{place(state['blobs_url'])}")
        env = {**self._env, "LORAPLEX_DATABASE_URL": state["database"]}
        done = subprocess.run(
            ["bash", "-euc", text], cwd=self._folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
