"""The servers of one model: a request goes to the least busy one; those that fail are left out for a while."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1distill.teacher.settings import Client

if TYPE_CHECKING:
    import aiohttp

OTHER_FILES = 256  # that this process may have open beside its connections
FAILURES_TO_TAKE_OUT = 5  # in a row, of a server that can be reached
LONGEST_PROBE_SECONDS = 30.0


@dataclass
class Place:
    """One server. It is out while ``outages`` counts how often in a row it was found so; then one request probes it."""

    url: str
    session: Any  # aiohttp.ClientSession
    in_flight: int = 0
    probing: bool = False
    failures: int = 0  # in a row
    outages: int = 0
    ready_at: float = 0.0  # on the monotonic clock: the end of a rate limit, or the time of the next probe

    async def post(self, body: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer to a chat completion; raises aiohttp.ClientError or TimeoutError."""
        async with self.session.post(self.address, data=body.encode(), allow_redirects=False) as response:
            return response.status, response.headers, await response.read()

    @property
    def address(self) -> str:
        return f"{self.url}/chat/completions"


class Endpoints:
    """The places to ask, as ``client`` says. An async context manager."""

    def __init__(self, urls: list[str], key: str | None, client: Client):
        self.places = [Place(url, None) for url in dict.fromkeys(urls)]
        self._key, self._client = key, client
        self._stack = AsyncExitStack()
        self._down_since: float | None = None
        self.reason = ""  # why the last one that went out did

    async def __aenter__(self) -> Endpoints:
        _allow_files(self._client.in_flight + OTHER_FILES)
        for place in self.places:
            place.session = await self._stack.enter_async_context(self._session(place.url))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def choose(self, last: Place | None = None) -> tuple[Place | None, float]:
        """The place to ask now, with the request counted as in flight; or None, and when to look again, in seconds.

        The ``last`` one comes last; one that is out and due is probed first.
        """
        now = time.monotonic()
        ready = [place for place in self.places if place.ready_at <= now and not place.probing]
        if ready:
            place = min(ready, key=lambda one: (one is last, not one.outages, one.in_flight))
            place.in_flight += 1
            place.probing = place.outages > 0
            return place, 0.0
        wait = min(place.ready_at for place in self.places) - now
        # Not all at the same moment. Where a probe is under way there is no telling how long it takes.
        return None, wait + random.uniform(0, min(1.0, wait)) if wait > 0 else random.uniform(0.05, 0.2)

    def leave(self, place: Place) -> None:
        """A request that was in flight there is over."""
        place.in_flight -= 1
        place.probing = False

    def answered(self, place: Place) -> None:
        """It works."""
        if place.outages:
            print(f"{place.url} is back", file=sys.stderr)
        place.failures = place.outages = 0
        self._down_since = None

    def failed(self, place: Place, reason: str, reachable: bool) -> None:
        """It answered with an error or cut the connection, or it can't be reached at all.

        The last one that is left stays in as long as it can be reached: there is nobody else to ask.
        """
        place.failures += 1
        reason = reason.replace(self._key, "***") if self._key else reason  # should a server send it back
        others = any(not one.outages for one in self.places if one is not place)
        if not place.outages and (not reachable or (place.failures >= FAILURES_TO_TAKE_OUT and others)):
            print(f"{place.url} is left out until it answers again: {reason}", file=sys.stderr)
        elif not place.outages or place.ready_at > time.monotonic():  # known from another request in flight
            return
        place.outages += 1
        backoff = min(self._client.backoff_seconds * 2.0 ** (place.outages - 1), LONGEST_PROBE_SECONDS)
        place.ready_at = time.monotonic() + backoff * random.uniform(0.5, 1.5)
        self.reason = reason
        if self._down_since is None and all(one.outages for one in self.places):
            self._down_since = time.monotonic()

    def limited(self, place: Place, seconds: float) -> None:
        """It wants to be left alone for a while."""
        place.ready_at = max(place.ready_at, time.monotonic() + seconds)

    def down_seconds(self) -> float:
        """How long there has been nobody to ask."""
        return 0.0 if self._down_since is None else time.monotonic() - self._down_since

    def named(self) -> str:
        return ", ".join(place.url for place in self.places)

    def _session(self, url: str) -> aiohttp.ClientSession:
        import aiohttp

        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        return aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._client.timeout_seconds, sock_connect=30),
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Proxies of the environment are for somebody else's servers, not for those on this machine.
            trust_env="//127.0.0.1:" not in url,
        )


def _allow_files(wanted: int) -> None:
    """Let this process have that many files open: a connection is one, and 1,024 are a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
