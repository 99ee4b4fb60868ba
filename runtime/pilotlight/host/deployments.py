"""Which versions of each function there are, and which of them a request goes to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pilotlight.api.catalogue import Catalogue
from pilotlight.config import FunctionSettings
from pilotlight.function import Function
from pilotlight.host.pool import Pool
from pilotlight.host.replica_handle import Replica

logger = logging.getLogger("pilotlight.host")

SETTLED_TICKS = 3
TICK_S = 1.0


@dataclass(eq=False)
class Version:
    """An artifact behind a name: its function, its pool, and the settings that both were made from."""

    settings: FunctionSettings
    function: Function
    pool: Pool


class Deployment:
    """One name: the current version, perhaps a canary, and old versions with streams that still run.

    The canary's share is exact: of every hundred requests in a row it gets its percentage, evenly spread.
    """

    def __init__(self, current: Version) -> None:
        self.current = current
        self.canary: Version | None = None
        self.old: list[Version] = []
        self.open = asyncio.Event()
        self.open.set()
        self._share = 0.0
        self._due = 0.0

    @property
    def versions(self) -> list[Version]:
        return [self.current, *([self.canary] if self.canary is not None else []), *self.old]

    @property
    def replicas(self) -> list[Replica]:
        return [replica for version in self.versions for replica in version.pool.fleet.replicas.values()]

    def role(self, version: Version) -> str:
        if version is self.current:
            return "current"
        return "canary" if version is self.canary else "old"

    def choose(self) -> Version:
        if self.canary is None:
            return self.current
        self._due += self._share
        if self._due < 1.0:
            return self.current
        self._due -= 1.0
        return self.canary

    def promote(self, version: Version) -> list[Version]:
        """Make a version the current one; return those that get no more requests."""
        leaving = [one for one in (self.current, self.canary) if one is not None and one is not version]
        self.current, self.canary = version, None
        self.old += leaving
        return leaving

    def try_out(self, version: Version, percent: float) -> list[Version]:
        """Give a version a share of the requests; return the canary that it replaces."""
        leaving = [self.canary] if self.canary is not None and self.canary is not version else []
        self.canary, self._share, self._due = version, percent / 100, 0.0
        self.old += leaving
        return leaving


class Deployments(Catalogue):
    """All functions of a host."""

    def __init__(self) -> None:
        self._deployments: dict[str, Deployment] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def add(self, name: str, version: Version) -> None:
        self._deployments[name] = Deployment(version)

    def deployment(self, name: str) -> Deployment:
        return self._deployments[name]

    def deployments(self) -> Iterable[tuple[str, Deployment]]:
        return self._deployments.items()

    def __getitem__(self, name: str) -> Function:
        return self._deployments[name].current.function

    def __iter__(self) -> Iterator[str]:
        return iter(self._deployments)

    def __len__(self) -> int:
        return len(self._deployments)

    async def choose(self, name: str) -> Function:
        deployment = self._deployments[name]
        await deployment.open.wait()
        return deployment.choose().function

    def versions(self) -> list[Function]:
        return [version.function for deployment in self._deployments.values() for version in deployment.versions]

    def retire(self, deployment: Deployment, leaving: Iterable[Version]) -> None:
        """Have versions that get no more requests end after their last stream."""
        for version in leaving:
            task = asyncio.create_task(self._retire(deployment, version), name="retire")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """End everything that runs, with its records."""
        for task in self._retiring:
            task.cancel()
        for function in self.versions():
            await function.close()

    async def _retire(self, deployment: Deployment, version: Version) -> None:
        """A request that chose this version may still be on its way to it, so it has to be settled for a while."""
        version.pool.hold(0)
        settled = 0
        while settled < SETTLED_TICKS:
            await asyncio.sleep(TICK_S)
            settled = 0 if version.function.num_running else settled + 1
        await version.function.close()
        deployment.old.remove(version)
