"""The user's own tools: the functions marked with `@tool` in a Python file, which is executed.

Owns: executing the file, finding them. Does not know: what they do.
"""

import importlib.util
import sys
from pathlib import Path

from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.tools.function import RunnableTool


def tools_of(path: Path) -> list[RunnableTool]:
    """Raises UsageError, one line, for a file that cannot be executed and for one without tools."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file, expected Python with functions marked @edge_gemma.tool")
    spec = importlib.util.spec_from_file_location(f"edge_gemma_tools_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look for it
    try:
        spec.loader.exec_module(module)
    except EdgeGemmaError as error:
        raise UsageError(f"{path}: {error}") from None
    except SystemExit:
        raise UsageError(f"{path} ends the program: put what does under if __name__ == '__main__'") from None
    except Exception as error:
        raise UsageError(f"{path} cannot be executed: {type(error).__name__}: {' '.join(str(error).split())}") from None
    found = [value for value in vars(module).values() if isinstance(value, RunnableTool)]
    if not found:
        raise UsageError(f"{path} has no tools, expected functions marked @edge_gemma.tool")
    return list(dict.fromkeys(found))
