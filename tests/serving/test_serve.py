"""The example service: the ids of search, wrong requests, load, and an orderly end."""

import asyncio
import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import avq_jax

aiohttp = pytest.importorskip("aiohttp", reason="examples/serve.py needs aiohttp")

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "serve.py"
N, D = 400, 8


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def index(rows):
    return avq_jax.build(jax.random.key(0), rows, ids=2**40 + np.arange(N))


def run(serve, index, story, **options):
    """Play a story with a client of a server on a real socket."""
    from aiohttp.test_utils import TestClient, TestServer

    async def play():
        app = serve.make_app(index, **options)
        async with TestClient(TestServer(app)) as client:
            return await story(client)

    return asyncio.run(play())


def test_ids_of_search_under_load(serve, index, rows):
    wanted = avq_jax.user_ids(index, np.asarray(avq_jax.search(index, rows, k=5).ids))

    async def story(client):
        async def ask(begin, count):
            body = {"queries": rows[begin : begin + count].tolist()}
            async with client.post("/search", json=body) as answer:
                assert answer.status == 200
                found = await answer.json()
                assert found["ids"] == wanted[begin : begin + count].tolist()
                assert np.isfinite(found["scores"]).all()

        await asyncio.gather(*(ask(i % 390, 1 + i % 7) for i in range(600)))
        metrics = await (await client.get("/metrics")).text()
        return metrics

    metrics = run(serve, index, story, k=5, max_batch=32)
    told = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    assert told['avq_requests_total{status="200"}'] == "600"
    assert int(told["avq_queries_total"]) == sum(1 + i % 7 for i in range(600))
    assert int(told["avq_batches_total"]) < 600  # requests that came together
    assert told["avq_latency_seconds_count"] == "600"


def test_wrong_requests(serve, index, rows):
    async def story(client):
        for body, error in [
            (b"{", "must be JSON"),
            (b"[]", "one key"),
            (b'{"queries": [[1, 2]]}', "shape"),
            (b'{"queries": "text"}', "lists of numbers"),
            (b'{"queries": [[1, 2], [3]]}', "lists of numbers"),
            (b'{"queries": []}', "shape"),
            (b'{"queries": [[NaN,0,0,0,0,0,0,0]]}', "finite"),
            (b'{"queries": [' + b",".join([b"[0,0,0,0,0,0,0,0]"] * 9) + b"]}", "at most 8"),
        ]:
            answer = await client.post("/search", data=body)
            assert answer.status == 400
            assert error in (await answer.json())["error"], body
        health = await client.get("/health")
        assert (health.status, (await health.json())["rows"]) == (200, N)
        assert (await client.get("/none")).status == 404
        client.server.app[serve.SERVICE].closing = True
        assert (await client.get("/health")).status == 503
        answer = await client.post("/search", json={"queries": rows[:1].tolist()})
        assert answer.status == 503

    run(serve, index, story, max_batch=8)


@pytest.mark.full
def test_ends_in_order(index, rows, tmp_path):
    """SIGTERM while requests are on their way: all accepted ones are answered, exit code 0."""
    avq_jax.save(index, tmp_path / "index")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(EXAMPLE.parent.parent)
    child = subprocess.Popen(
        [sys.executable, str(EXAMPLE), str(tmp_path / "index"), "--port", str(port)],
        env={**os.environ, "PYTHONPATH": root, "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
    )

    async def story():
        address = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session:
            for _ in range(600):
                try:
                    async with session.get(address + "/health") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientConnectionError:
                    pass
                assert child.poll() is None
                await asyncio.sleep(0.1)

            async def ask():
                try:
                    body = {"queries": rows[:8].tolist()}
                    async with session.post(address + "/search", json=body) as answer:
                        return answer.status, len((await answer.json()).get("ids", ()))
                except aiohttp.ClientConnectionError:
                    return "not accepted", 0

            asked = [asyncio.create_task(ask()) for _ in range(200)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            child.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

    try:
        found = asyncio.run(story())
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        child.wait()
    assert found.count((200, 8)) >= 1
    assert set(found) <= {(200, 8), (503, 0), ("not accepted", 0)}
