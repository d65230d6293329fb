"""Named plug-ins (controllers, tasks, targets): a dictionary that refuses collisions and suggests spellings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from autocompress.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> plug-in. ``what`` is the noun used in messages, for example ``"controller"``."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores a plug-in under ``name``; a name can be taken once."""

        def keep(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.what} {name!r} is registered twice.")
            self._items[name] = item
            return item

        return keep

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise UnknownName(self.what, name, self._items)
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __contains__(self, name: str) -> bool:
        return name in self._items
