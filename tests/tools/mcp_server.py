"""An MCP server over standard input and output, or at a port, made with the official package."""

import os
import sys
import time

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

server = MCPServer("test")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int = 1) -> int:
    """Add two numbers"""
    return a + b


@server.tool()
def fail(why: str) -> str:
    """Fail"""
    raise ToolError(why)


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def die() -> str:
    """End the server"""
    os._exit(3)


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def wait() -> str:
    """Wait long"""
    time.sleep(60)
    return "late"


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
