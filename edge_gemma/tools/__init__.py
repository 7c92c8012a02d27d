"""Tools that are run: the user's own, the built-in ones, those of MCP servers, and the loop that lets a model act."""
