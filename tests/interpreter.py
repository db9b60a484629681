"""Makes Triton's interpreter fast enough for a whole suite."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


class _Nothing:
    def restore(self) -> None:
        """Restore nothing: the launch around this call restores what it patched."""


def patch_language_once_per_launch() -> None:
    """Skip work that the interpreter repeats.

    It replaces the members of triton.language anew whenever one device function calls another,
    which takes milliseconds and changes nothing after the first call from a module.
    """
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__
    patch_language = interpreter._patch_lang

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return _Nothing()
        patched.add(module)
        return patch_language(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_once
