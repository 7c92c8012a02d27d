"""Archives to search, made as the journal makes them, and OUTPUT's lines."""

import contextlib
import json
import sqlite3

from edge_gemma.archive.search import APPLICATION_ID, SCHEMA, VERSION, Passage, index

TAPES = {
    "tape-1": [Passage("The storm came in the night.", 0.0, 7.0), Passage("Boats lay in the harbour.", 7.0, 12.0)],
    "tape-2": [Passage("A quiet harbour, and the Café by the sea", 60.0, 80.0)],
    "tape-3": [Passage("今日は新しい港を見ました", 3.0, 9.0), Passage("ฉันรักทะเล", 9.0, 12.0)],
    "note": [Passage("Don't wait: a naïve answer, STRASSE 12")],
}


@contextlib.contextmanager
def writing(path, mode="TRUNCATE"):
    """A connection to an archive, made as the journal makes it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS requests(id INTEGER PRIMARY KEY, custom_id TEXT UNIQUE NOT NULL)"
        )
        connection.executescript(SCHEMA)
        yield connection


def add(connection, number, custom_id, passages):
    """Index a request."""
    connection.execute("INSERT OR IGNORE INTO requests(id, custom_id) VALUES(?, ?)", (number, custom_id))
    index(connection, number, passages)


def write(path, tapes, mode="TRUNCATE"):
    """Write an archive: passages by custom_id."""
    with writing(path, mode) as connection:
        connection.execute("BEGIN")
        for number, (custom_id, passages) in enumerate(tapes.items(), 1):
            add(connection, number, custom_id, passages)
        connection.execute("COMMIT")
    return path


def line(custom_id, passages):
    """What OUTPUT has of a request, of a chat if its passages have no times."""
    if all(p.start is None for p in passages) and passages:
        body = {"choices": [{"message": {"role": "assistant", "content": passages[0].text}}]}
    else:
        segments = [{"start": p.start, "end": p.end, "text": p.text} for p in passages]
        body = {"text": " ".join(p.text for p in passages), "segments": segments}
    return {"id": "x", "custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def write_lines(path, lines):
    """Write an OUTPUT."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


def ids(found):
    """The custom_ids of what is found."""
    return [one.custom_id for one in found]
