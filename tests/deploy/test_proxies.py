"""nginx and Caddy before the service.

crossplane, which comes with the tests, parses nginx.conf everywhere as strictly as nginx would. nginx and caddy
themselves are packages of the system that `make test` cannot install: what needs them is skipped without them, but in
CI, which installs them (.ci/run). With them nginx proxies for real, and both take their configuration.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crossplane
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.deploy.files import DEPLOY
from tests.ports import unused_port
from tests.real_parts import missing
from tests.service.inference_helpers import BASE, InferenceServer

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CADDY = shutil.which("caddy")
Proxied = tuple[InferenceServer, httpx.Client]


def parsed() -> list[dict[str, Any]]:
    """nginx.conf as crossplane's tree; raises what nginx would refuse as syntax, arguments or context."""
    payload = crossplane.parse(str(DEPLOY / "nginx.conf"), strict=True, catch_errors=False)
    return payload["config"][0]["parsed"]


def every(block: list[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    for directive in block:
        if directive["directive"] == name:
            yield directive
        yield from every(directive.get("block", []), name)


def test_nginx_conf_parses_and_streams() -> None:
    tree = parsed()
    locations = [each for each in every(tree, "location") if list(every(each["block"], "proxy_pass"))]
    assert len(locations) == 1
    settings = {each["directive"]: each["args"] for each in locations[0]["block"]}
    assert settings["proxy_buffering"] == settings["proxy_request_buffering"] == ["off"]
    assert settings["proxy_http_version"] == ["1.1"]
    assert [each["args"] for each in every(tree, "client_max_body_size")] == [["16g"]]


def write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    (folder / "fullchain.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "privkey.pem").write_bytes(pem)


def configuration(folder: Path, upstream: int, plain: int, tls: int) -> Path:
    """The project's nginx.conf with other ports, paths and certificates; nothing else is changed."""
    tree = parsed()
    for server in every(tree, "listen"):
        port = tls if "ssl" in server["args"] else plain
        server["args"] = [server["args"][0].replace("443", str(port)).replace("80", str(port)), *server["args"][1:]]
        if server["args"][0].isdigit():
            server["args"][0] = f"127.0.0.1:{port}"
    for block in every(tree, "server"):
        if "block" in block:  # IPv6 may be missing where tests run
            block["block"] = [each for each in block["block"] if not each["args"][:1] or "[" not in each["args"][0]]
        else:
            block["args"] = [f"127.0.0.1:{upstream}"]
    for name in ("ssl_certificate", "ssl_certificate_key"):
        for each in every(tree, name):
            each["args"] = [str(folder / Path(each["args"][0]).name)]
    for each in every(tree, "access_log"):
        each["args"][0] = str(folder / "access.log")
    text = f"pid {folder}/nginx.pid; error_log {folder}/error.log;\n" + crossplane.build(tree)
    http = "http {" + "".join(
        f"\n    {kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(text.replace("http {", http, 1))
    return path


@pytest.fixture(scope="module")
def proxied(base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """A server whose tokens take 50 ms each, and a client that reaches it through nginx over TLS."""
    if NGINX is None:
        missing("nginx")
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    write_certificate(folder)
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.05})
    tls = unused_port()
    config = configuration(folder, server.settings.port, unused_port(), tls)
    checked = subprocess.run([NGINX, "-t", "-p", folder, "-c", config], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    nginx = None
    try:
        server.start()
        nginx = subprocess.Popen([NGINX, "-p", folder, "-c", config, "-g", "daemon off;"])
        with httpx.Client(base_url=f"https://127.0.0.1:{tls}", verify=False, timeout=60, trust_env=False) as client:
            until = time.monotonic() + 60
            while True:
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.05)
            yield server, client
    finally:
        if nginx is not None:
            nginx.terminate()
            nginx.wait(30)
        server.stop()


def test_tokens_pass_nginx_as_they_come(proxied: Proxied) -> None:
    server, client = proxied
    body = {"model": BASE, "prompt": "Hello", "max_tokens": 120, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line.startswith("data:"))
        assert next(lines) != "data: [DONE]"
        # The first token is here, and the request still runs: this one and the question about it.
        assert server.metrics()["loraplex_requests_in_progress"] == 2
        assert list(lines)[-1] == "data: [DONE]"


def test_large_bodies_reach_the_service(proxied: Proxied) -> None:
    """4 MiB, where nginx's own default is 1 MiB: the service's refusal is JSON, nginx's would be a 413 in HTML."""
    server, client = proxied
    answer = client.post("/v1/completions", content=b'"' + b" " * (server.settings.max_body_bytes // 2))
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_figures_are_not_for_everybody(proxied: Proxied) -> None:
    assert proxied[1].get("/metrics").status_code == 404


def test_caddy_takes_its_configuration(tmp_path: Path) -> None:
    if CADDY is None:
        missing("caddy")
    command = [str(CADDY), "validate", "--adapter", "caddyfile", "--config", str(DEPLOY / "Caddyfile")]
    env = {"HOME": str(tmp_path), "DOMAIN": "loraplex.example", "UPSTREAM": "loraplex:8000"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
