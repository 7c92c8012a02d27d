"""What an app may do wrong at the front door: each is told in a line."""

import pytest

from edge_gemma.errors import UsageError
from edge_gemma.text.tool_declaration import declaration


@pytest.mark.parametrize("annotation", ["int.nothing", "not valid(", "1 / 0", [int], {}], ids=str)
def test_an_annotation_that_cannot_be_read_is_told_in_a_line(annotation):
    def tool(a):
        pass

    tool.__annotations__ = {"a": annotation}
    with pytest.raises(UsageError, match="of the tool tool"):
        declaration(tool)
