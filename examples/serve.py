"""Serve an index over HTTP: requests that arrive together are searched together.

    pip install avq-jax aiohttp
    python examples/serve.py words.avq --port 8080 --k 10

    curl localhost:8080/search -d '{"queries": [[0.1, 0.2, ...]]}'
    curl localhost:8080/health
    curl localhost:8080/metrics

One thread searches; while it does, new requests wait in a queue and make up the next batch, padded
to a power of two so that few shapes are compiled, all of them before the first request. SIGTERM
ends the service when the requests that it has accepted are answered.
"""

import argparse
import asyncio
import bisect
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from aiohttp import web

import avq_jax

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


SERVICE = web.AppKey("service", object)


class Service:
    """A queue before a searcher."""

    def __init__(self, index, *, k=10, leaves=None, rescore=None, max_batch=64):
        self.index, self.k, self.max_batch = index, k, max_batch
        self._find = avq_jax.searcher(index, k=k, leaves_to_search=leaves, rescore=rescore)
        self._thread = ThreadPoolExecutor(1)
        self._queue = asyncio.Queue()
        self.ready = self.closing = False
        self.requests = {}
        self.queries = self.batches = 0
        self.latency = [0] * (len(_BUCKETS) + 1)
        self.seconds = 0.0

    def _search(self, rows):
        """All sizes are a power of two, so that each is compiled once."""
        size = 1 << (len(rows) - 1).bit_length()
        padded = np.zeros((size, self.index.dim), np.float32)
        padded[: len(rows)] = rows
        found = self._find(padded)
        return found.scores[: len(rows)], found.ids[: len(rows)]

    def warm_up(self):
        """Compile every size of a batch: less than twice the largest one asked for."""
        size = 1
        while size <= 2 * self.max_batch:
            self._search(np.zeros((size, self.index.dim), np.float32))
            size *= 2
        self.ready = True

    async def batches_forever(self):
        """Search what has come, as one batch; meanwhile the next one comes."""
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await self._queue.get()]
            count = len(waiting[0][0])
            while not self._queue.empty() and count < self.max_batch:
                waiting.append(self._queue.get_nowait())
                count += len(waiting[-1][0])
            rows = np.concatenate([rows for rows, _ in waiting])
            try:
                scores, ids = await loop.run_in_executor(self._thread, self._search, rows)
            except Exception as error:  # the next batch is served all the same
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            self.batches += 1
            self.queries += len(rows)
            begin = 0
            for rows, answer in waiting:
                end = begin + len(rows)
                if not answer.done():
                    answer.set_result((scores[begin:end], ids[begin:end]))
                begin = end

    async def find(self, rows):
        answer = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((rows, answer))
        return await answer

    def parse(self, text):
        """Queries of a request; a ValueError says what is wrong with them."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the request must be JSON: {error}") from None
        if not isinstance(body, dict) or set(body) != {"queries"}:
            raise ValueError('the request must be an object with the one key "queries"')
        try:
            rows = np.asarray(body["queries"], np.float32)
        except (ValueError, TypeError) as error:
            raise ValueError(f"queries must be lists of numbers: {error}") from None
        if rows.ndim != 2 or rows.shape[1] != self.index.dim or not len(rows) >= 1:
            raise ValueError(
                f"queries must have shape [b, {self.index.dim}]; got {list(rows.shape)}"
            )
        if len(rows) > self.max_batch:
            raise ValueError(f"queries must be at most {self.max_batch}; got {len(rows)}")
        if not np.isfinite(rows).all():
            raise ValueError("queries must be finite")
        return rows

    def _answer(self, status, body):
        self.requests[status] = self.requests.get(status, 0) + 1
        return web.json_response(body, status=status)

    async def handle_search(self, request):
        start = time.perf_counter()
        if self.closing or not self.ready:
            return self._answer(503, {"error": "not serving"})
        try:
            rows = self.parse(await request.read())
        except ValueError as error:
            return self._answer(400, {"error": str(error)})
        scores, ids = await self.find(rows)
        ids = avq_jax.user_ids(self.index, ids)
        finite = np.where(np.isfinite(scores), scores, 0).tolist()  # JSON has no infinity
        took = time.perf_counter() - start
        self.latency[bisect.bisect_left(_BUCKETS, took)] += 1
        self.seconds += took
        return self._answer(200, {"ids": ids.tolist(), "scores": finite})

    async def handle_health(self, request):
        serving = self.ready and not self.closing
        body = {"status": "serving" if serving else "not serving", "rows": self.index.num_rows}
        return web.json_response(body, status=200 if serving else 503)

    async def handle_metrics(self, request):
        """Counters in the text format of Prometheus."""
        lines = [f'avq_requests_total{{status="{s}"}} {n}' for s, n in self.requests.items()]
        lines += [f"avq_queries_total {self.queries}", f"avq_batches_total {self.batches}"]
        lines += [f"avq_queue_length {self._queue.qsize()}"]
        total = 0
        for edge, count in zip((*_BUCKETS, "+Inf"), self.latency, strict=True):
            total += count
            lines.append(f'avq_latency_seconds_bucket{{le="{edge}"}} {total}')
        lines += [f"avq_latency_seconds_sum {self.seconds}", f"avq_latency_seconds_count {total}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def lifetime(self, app):
        """Warm up, search batches, and at the end stop the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.warm_up)
        task = asyncio.create_task(self.batches_forever())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._thread.shutdown()

    async def close(self, app):
        self.closing = True


def make_app(index, **options):
    """Make the application of an index; options of `Service`."""
    service = Service(index, **options)
    app = web.Application(client_max_size=1 << 24)
    app[SERVICE] = service
    app.router.add_post("/search", service.handle_search)
    app.router.add_get("/health", service.handle_health)
    app.router.add_get("/metrics", service.handle_metrics)
    app.cleanup_ctx.append(service.lifetime)
    app.on_shutdown.append(service.close)
    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", help="a saved index")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--leaves", type=int, default=None)
    parser.add_argument("--rescore", type=int, default=None)
    parser.add_argument("--max-batch", type=int, default=64)
    args = parser.parse_args()
    index = avq_jax.load(args.index)
    options = {"k": args.k, "leaves": args.leaves, "rescore": args.rescore}
    app = make_app(index, max_batch=args.max_batch, **options)
    # Accepted requests are answered after SIGTERM or Ctrl-C, for at most ten seconds.
    web.run_app(app, host=args.host, port=args.port, shutdown_timeout=10.0, access_log=None)


if __name__ == "__main__":
    main()
