"""Makes transformers know `attn_implementation="entropi"` once both packages are imported, in whichever order.

transformers has no entry points: whoever offers an attention has to register it after `transformers.modeling_utils` is
imported. Importing that here would cost clients, who need neither torch nor transformers, seconds and gigabytes; so
the registration waits for whoever imports it, and what is registered imports our attention when it is first used.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "entropi"  # of the attention implementation
AWAITED = "transformers.modeling_utils"


def announce() -> None:
    """Register now, where transformers' models are imported already, else when they are."""
    if hasattr(sys.modules.get(AWAITED), "AttentionInterface"):
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds nothing itself; the import that is waited for is done by the others and followed by the registration."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(*args: Any, **kwargs: Any) -> Any:
    from entropi.entropy.interface import attention_forward, register_attention

    register_attention()  # itself, from now on
    return attention_forward(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    from entropi.entropy.interface import attention_mask, register_attention

    register_attention()
    return attention_mask(*args, **kwargs)
