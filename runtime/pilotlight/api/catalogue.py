"""The functions that are served, each under its name; a host may change what stands behind a name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping

from pilotlight.function import Function


class Catalogue(Mapping[str, Function]):
    """A name gives the version that is served; ``choose`` may give another one to some requests."""

    @abstractmethod
    async def choose(self, name: str) -> Function:
        """Return the version that the next request goes to; waits while versions are being exchanged."""

    @abstractmethod
    def versions(self) -> Iterable[Function]:
        """Return every function that may have running invocations."""


class Fixed(Catalogue):
    """Functions that stay as they are."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self._functions = functions

    def __getitem__(self, name: str) -> Function:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    async def choose(self, name: str) -> Function:
        return self._functions[name]

    def versions(self) -> Iterable[Function]:
        return self._functions.values()


def catalogue_of(functions: Mapping[str, Function]) -> Catalogue:
    return functions if isinstance(functions, Catalogue) else Fixed(functions)
