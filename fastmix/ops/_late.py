"""Registers what must wait until somebody imports a part of torch; `import fastmix` does not."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, register: Callable[[Any], None]) -> None:
    """Calls register(module) once there is a module of that name, which may be now."""
    if name in sys.modules:
        register(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, register))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, register: Callable[[Any], None]) -> None:
        self.name, self.register = name, register

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                self.register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
