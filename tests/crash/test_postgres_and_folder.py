"""PostgreSQL for the rows and the data folder for the files: one service has both, and a second one is not let in."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.crash.world import Content, World
from tests.real_parts import PASSWORD, S3, Postgres
from tests.service.adapter_helpers import Server
from tests.service.launch import PLAIN, run, wait_for

MakeWorld = Callable[..., World]


def get(world: World, path: str) -> httpx.Response:
    return httpx.get(f"{world.url}{path}", timeout=60, **PLAIN)


def answers(world: World, name: str, content: Content) -> bool:
    body = {"model": name, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    done = httpx.post(f"{world.url}/v1/completions", json=body, timeout=120, **PLAIN)
    assert done.status_code == 200, done.text
    return done.json()["choices"][0]["text"].strip() == world.answer([1, 2, 3], 4, content.digest).strip()


def start(folder: Path, database: str, blobs_url: str = "") -> subprocess.CompletedProcess[str]:
    flags = ("--data-dir", str(folder), "--port", "0", "--simulated", "{}")
    return run("serve", *flags, timeout=120, LORAPLEX_DATABASE_URL=database, LORAPLEX_BLOBS_URL=blobs_url)


def test_upload_list_run_delete_restart(make_world: MakeWorld, postgres: Postgres) -> None:
    database = postgres.create()
    world = make_world(database=database)
    contents = {name: Content.make(number, rank=4) for number, name in enumerate(("a", "b"))}
    world.start()
    for name, content in contents.items():
        answer = httpx.put(f"{world.url}/v1/adapters/{name}", files=content.form, timeout=60, **PLAIN)
        assert answer.status_code == 201, answer.text
        assert answers(world, name, content)
    needed = set.union(*(content.blobs for content in contents.values()))
    assert world.blobs() == needed
    assert not (world.data / "catalogue.sqlite3").exists()
    # At once after a stop, and after a kill, although the database has just heard of the service.
    for end in (world.stop, world.kill_everything):
        end()
        world.start()
        assert [each["id"] for each in get(world, "/v1/adapters").json()["data"]] == ["a", "b"]
        assert world.blobs() == needed
        for name, content in contents.items():
            assert answers(world, name, content)
            for filename, data in content.files.items():
                assert get(world, f"/v1/adapters/{name}/versions/1/files/{filename}").content == data
    assert httpx.delete(f"{world.url}/v1/adapters/a", timeout=60, **PLAIN).status_code == 200
    wait_for(lambda: world.blobs() == contents["b"].blobs)
    assert get(world, "/v1/adapters/a").status_code == 404
    assert answers(world, "b", contents["b"])
    world.stop()
    assert postgres.sql("SELECT count(*) FROM instances", database.rpartition("/")[2]) == [[0]]


def test_a_second_service_would_not_find_the_files(
    make_world: MakeWorld, postgres: Postgres, s3: S3, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    database, shared = postgres.create(), s3.create()
    world = make_world(database=database)
    world.start()
    for folder, blobs_url in (("folder", ""), ("s3", shared)):
        text = " ".join(start(tmp_path / folder, database, blobs_url).stdout.split())
        assert "LORAPLEX_DATABASE_URL: another loraplex uses this database" in text, text
        assert "LORAPLEX_BLOBS_URL" in text
        assert "Traceback" not in text
        assert PASSWORD not in text
    # Two that start at the same moment both see nobody: the one that comes second to the database ends.
    late = Server(tmp_path / "late", free_port(), database_url=database)
    try:
        with pytest.raises(RuntimeError, match="the server ended"):
            late.start(ready=False)
    finally:
        late.close()
    assert get(world, "/ready").status_code == 200
    world.stop()


def test_services_with_one_store_are_let_in_and_others_are_not(
    make_world: MakeWorld, postgres: Postgres, s3: S3, tmp_path: Path
) -> None:
    state = {"database": postgres.create(), "blobs_url": s3.create()}
    worlds = make_world(**state), make_world(**state)
    for world in worlds:
        world.start()
    for folder, blobs_url in (("folder", ""), ("s3", s3.create("another/prefix"))):
        done = start(tmp_path / folder, state["database"], blobs_url)
        assert done.returncode == 1
        assert "another loraplex uses this database" in " ".join(done.stdout.split())
