"""Small files are replaced as a whole, and names of strangers are escaped."""

import os

import pytest

from util.files.atomic import append_line, read_json, replacing, write_json, write_text
from util.files.names import counted, one_line, printable, printable_lines, table_cell


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "jobs.json"
    write_json(path, {"a": 1})
    assert read_json(path, dict) == {"a": 1}
    with replacing(path) as file:
        file.write("half of the")
        file.flush()
        # Until the block ends, readers see the old file.
        assert read_json(path, dict) == {"a": 1}
    assert path.read_text() == "half of the"
    assert os.listdir(tmp_path) == ["jobs.json"]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "log.txt"
    write_text(path, "old\n")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write("new")
        raise RuntimeError("killed")
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["log.txt"]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old\n"


def test_links_stay_and_pipes_are_written_to(tmp_path):
    write_text(tmp_path / "file", "old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new", follow=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    reader, writer = os.pipe()
    write_text(f"/dev/fd/{writer}", "through a pipe", follow=True)
    assert os.read(reader, 100) == b"through a pipe"
    os.close(reader)
    os.close(writer)
    os.mkfifo(tmp_path / "unread")
    with pytest.raises(OSError, match="unread"):
        write_text(tmp_path / "unread", "nobody waits", follow=True)


def test_lines_are_appended(tmp_path):
    path = tmp_path / "log.txt"
    append_line(path, "one")
    append_line(path, os.fsdecode(b"tw\xff"))
    assert path.read_bytes() == b"one\ntw\xff\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (b'{"a": ', "Expecting value"),
        (b"\xff\x81x", "utf"),
        (b"[" * 1_000_000, "maximum recursion|RecursionError"),
        (b"[1]", "holds a JSON list where a dict is expected"),
    ],
)
def test_damaged_json_names_the_file(tmp_path, content, reason):
    path = tmp_path / "owner.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_json(path, dict)
    assert str(path) in str(error.value)
    assert "remove it" in str(error.value)


def test_a_pipe_is_no_json_file(tmp_path):
    os.mkfifo(tmp_path / "jobs.json")
    with pytest.raises(ValueError, match=r"jobs\.json is not a regular file: remove it"):
        read_json(tmp_path / "jobs.json", dict)


def test_a_missing_json_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", dict)


@pytest.mark.parametrize(
    "name, safe",
    [
        ("cat 1.jpg", "cat 1.jpg"),
        ("Käse/猫 .jpg", "Käse/猫 .jpg"),
        ("\x1b[2Jgone.jpg", "\\x1b[2Jgone.jpg"),
        ("a\nb\r\t.jpg", "a\\nb\\r\\t.jpg"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\u2028b\x9b", "a\\u2028b\\x9b"),
        ("\ud800.jpg", "\\ud800.jpg"),
    ],
)
def test_names_are_one_printable_line(name, safe):
    assert one_line(name) == safe
    assert printable(name) == safe
    assert len(printable(name).splitlines()) == 1


def test_bytes_that_are_not_utf8():
    name = os.fsdecode(b"caf\xe9\x1b.jpg")
    assert os.fsencode(one_line(name)) == b"caf\xe9\\x1b.jpg"
    assert printable(name) == "caf\\xe9\\x1b.jpg"


def test_messages_keep_their_lines():
    assert printable_lines("a\tb\n\x1b[31mc\r") == "a\tb\n\\x1b[31mc\\r"


@pytest.mark.parametrize("name", ["=HYPERLINK(0)", "+1", "-1", "@SUM(A1)"])
def test_a_cell_is_never_a_formula(name):
    assert table_cell(name) == f"'{name}"
    assert table_cell("a=b") == "a=b"


def test_a_number_agrees_with_its_noun():
    words = [counted(number, "class", "classes") for number in (0, 1, 2)]
    assert words == ["0 classes", "1 class", "2 classes"] and counted(3, "image") == "3 images"
