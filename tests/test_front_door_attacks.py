"""What an app may do wrong at the front door: each is told in a line."""

import threading

import pytest

from edge_gemma.chat import Chat
from edge_gemma.errors import UsageError
from edge_gemma.text.tool_declaration import declaration
from tests.fakes import FakeEngine


@pytest.mark.parametrize("annotation", ["int.nothing", "not valid(", "1 / 0", [int], {}], ids=str)
def test_an_annotation_that_cannot_be_read_is_told_in_a_line(annotation):
    def tool(a):
        pass

    tool.__annotations__ = {"a": annotation}
    with pytest.raises(UsageError, match="of the tool tool") as told:
        declaration(tool)
    assert "\n" not in str(told.value)


def test_two_threads_that_send_at_once_lose_no_reply(monkeypatch):
    """The second is refused while the first reads an earlier reply to its end."""
    chat, told = Chat(FakeEngine("one", "two", "three")), []

    def send():
        with pytest.raises(UsageError, match="is writing a reply"):
            chat.send("c")
        told.append("refused")

    earlier = chat.send("a")
    read = earlier.result

    def reading():
        other = threading.Thread(target=send)
        other.start()
        other.join(10)
        return read()

    monkeypatch.setattr(earlier, "result", reading)
    assert chat.send("b").text == "two"
    assert told == ["refused"]
    assert [message.content for message in chat.messages] == ["a", "one", "b", "two"]
    assert chat.send("c").text == "three"
