"""A real S3-protocol server (moto's) in a process of its own on loopback, and a proxy before it that makes it fail."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import urlopen

from aiohttp import ClientSession, DummyCookieJar, web

BUCKET = "bucket"
_ERROR = b'<?xml version="1.0"?><Error><Code>InternalError</Code><Message>We failed.</Message></Error>'
_HOP = {"transfer-encoding", "connection", "content-length", "content-encoding", "expect"}


class FaultyProxy:
    """Passes requests on, but for the faults that are switched on.

    `fail_until`: up to that `time.monotonic()`, a share `fail_share` of all requests is answered 500, half of them
    after the server has done what they ask. `cuts`: so many answers longer than 4 KB are cut off in the middle, one for
    each object. `failed` and `cut` count; `cut_paths` says which.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream, self.port = upstream, free_port()
        self.fail_until, self.fail_share, self.cuts = 0.0, 0.2, 0
        self.requests = self.failed = self.cut = 0
        self.cut_paths: set[str] = set()
        self._random = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar())
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self._ready.set()

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        body = await request.read()
        fails = time.monotonic() < self.fail_until and self._random.random() < self.fail_share
        self.failed += fails
        if fails and self._random.random() < 0.5:
            return web.Response(status=500, body=_ERROR)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        url = f"http://127.0.0.1:{self.upstream}{request.raw_path}"
        async with self._session.request(request.method, url, headers=headers, data=body) as answer:
            data = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
            status = answer.status
            length = answer.headers.get("Content-Length")
        if fails:
            return web.Response(status=500, body=_ERROR)
        if request.method == "GET" and len(data) > 4096 and self.cuts and request.path not in self.cut_paths:
            return await self._cut(request, kept, data)
        if request.method == "HEAD" and length is not None:
            kept["Content-Length"] = length
        return web.Response(status=status, headers=kept, body=data)

    async def _cut(self, request: web.Request, headers: dict[str, str], data: bytes) -> web.StreamResponse:
        self.cuts -= 1
        self.cut += 1
        self.cut_paths.add(request.path)
        response = web.StreamResponse(headers={**headers, "Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response


@contextmanager
def s3_server() -> Iterator[FaultyProxy]:
    """The proxy before a running, empty server that has the bucket BUCKET."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        proxy = FaultyProxy(port)
        yield proxy
        proxy.close()
    finally:
        server.kill()
        server.wait()


def environment(proxy: FaultyProxy) -> dict[str, str]:
    """What the libraries of S3 read."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert server.poll() is None, "the S3 server ended"
        try:
            urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the S3 server does not answer")
