"""Calls that are not bound to their declarations, as other checkpoints' and scripted models write them."""

from collections.abc import Callable
from typing import Any

from edge_gemma import conversation


def unbind(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """put: setattr, or a test's own that is undone."""
    real = conversation.Bounds
    put(conversation, "Bounds", lambda *given, tools=None, **more: real(*given, tools=None, **more))
