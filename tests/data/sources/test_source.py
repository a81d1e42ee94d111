"""The files and names of sources, and messages for wrong paths."""

import ast
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from myllm.config import DataConfig
from myllm.data.prepare.spec import make_spec
from myllm.data.sources.catalog import CORPORA
from myllm.data.sources.readers import READER_BY_SUFFIX, SkipLog
from myllm.data.sources.source import check_source, find_source, read_documents
from myllm.errors import UserError


def names(spec: str | Path) -> list[str]:
    return [file.name for file in find_source(f"files:{spec}").files]


def fingerprint(spec: str | Path) -> str:
    return make_spec(DataConfig(source=f"files:{spec}")).fingerprint


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with text files at three depths, and other files."""
    root = tmp_path / "here" / "corpus"
    for name in (
        "b.txt", "a.md", "sub/c.jsonl", "sub/deep/d.txt", "sub/deep/e.TXT", "picture.png", "noending", "x.txt/in.txt",
        ".hidden.txt", ".git/config.txt", "sub/.cache/f.txt", "sub/g.tar.gz",
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "' + name + '"}')
    return root


def test_python_stdlib() -> None:
    source = find_source("python-stdlib")
    parts = [part for file in source.files for part in Path(file.name).parts]
    assert len(source.files) >= 400
    assert not {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"} & set(parts)
    assert "argparse.py" in [file.name for file in source.files]
    topics = next(file for file in source.files if file.name.endswith("topics.py"))
    texts = list(read_documents(source, topics, Path(topics.location), SkipLog()))
    tree = ast.parse(Path(topics.location).read_text(encoding="utf-8"))  # without running it
    values = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert texts == list(ast.literal_eval(values).values())
    assert find_source("python-stdlib") == source


def test_python_stdlib_reads_without_skips() -> None:
    source, skips = find_source("python-stdlib"), SkipLog()
    for file in source.files:
        texts = list(read_documents(source, file, Path(file.location), skips))
        assert len(texts) == 1 or file.reader == "topics"
    assert not skips.counts


def test_source_file_attributes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    found = {file.name: file for file in find_source("files:.").files}
    for name, file in found.items():
        content = (tree / name).read_bytes()
        assert file.location == str(tree / name)
        assert not file.remote
        assert file.reader == ("jsonl" if name == "sub/c.jsonl" else "prose")
        assert file.size_bytes == len(content)
        assert file.digest == hashlib.sha256(content).hexdigest()
    source, skips = find_source("files:."), SkipLog()
    assert source.size_bytes == sum(file.size_bytes for file in found.values())
    assert list(read_documents(source, found["sub/c.jsonl"], tree / "sub/c.jsonl", skips)) == ["sub/c.jsonl"]


def test_column_override(tree: Path) -> None:
    assert find_source(f"files:{tree}").column == "text"
    (tree / "sub" / "c.jsonl").write_text('{"text": "no", "body": "yes"}')
    source = find_source(f"files:{tree}/sub/c.jsonl", column="body")
    assert list(read_documents(source, source.files[0], tree / "sub" / "c.jsonl", SkipLog())) == ["yes"]


def test_folder_recursion_skips_hidden_files(tree: Path) -> None:
    expected = ["a.md", "b.txt", "sub/c.jsonl", "sub/deep/d.txt", "sub/deep/e.TXT", "x.txt/in.txt"]
    assert names(tree) == names(f"{tree}/") == expected
    assert names(tree / "x.txt") == ["in.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt"]),
        ("sub/*", ["c.jsonl"]),
        ("*/c.jsonl", ["sub/c.jsonl"]),
        ("**/*.txt", ["b.txt", "sub/deep/d.txt", "x.txt/in.txt"]),
        ("sub/**", ["c.jsonl", "deep/d.txt", "deep/e.TXT"]),
        ("[ab].*", ["a.md", "b.txt"]),
        ("sub/deep/?.txt", ["d.txt"]),
        ("b.txt", ["b.txt"]),
        (".hidden.txt", [".hidden.txt"]),  # asked for by its name
        ("../corpus/*.md", ["a.md"]),
    ],
)
def test_globs_and_files(pattern: str, expected: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(f"{tree}/{pattern}") == expected
    monkeypatch.chdir(tree)
    assert names(pattern) == expected


@pytest.mark.parametrize("pattern", ["", "/*.txt", "/**/*.txt", "/sub/c.jsonl"])
def test_fingerprint_depends_on_content_not_location(pattern: str, tree: Path, tmp_path: Path) -> None:
    before = fingerprint(f"{tree}{pattern}")
    os.utime(tree / "b.txt", (1, 1))
    assert fingerprint(f"{tree}{pattern}") == before
    moved = tmp_path / ".elsewhere" / "deep"  # a hidden folder above the source hides nothing in it
    moved.mkdir(parents=True)
    tree.rename(moved / "corpus")
    assert fingerprint(f"{moved}/corpus{pattern}") == before
    changed = moved / "corpus" / ("sub/c.jsonl" if pattern.endswith("c.jsonl") else "b.txt")
    changed.write_bytes(b"!" + changed.read_bytes()[1:])
    assert fingerprint(f"{moved}/corpus{pattern}") != before


def test_fingerprint_changes_with_file_set(tree: Path) -> None:
    seen = {fingerprint(tree)}
    (tree / "b.txt").rename(tree / "c.txt")
    seen.add(fingerprint(tree))
    (tree / "d.txt").write_text("")
    seen.add(fingerprint(tree))
    (tree / "a.md").unlink()
    seen.add(fingerprint(tree))
    assert len(seen) == 4


def test_expands_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names("~/sub") == ["c.jsonl", "deep/d.txt", "deep/e.TXT"]


def test_source_name_sanitized(tmp_path: Path) -> None:
    folder = tmp_path / "my texts: été! (v1.2)/x"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    assert find_source(f"files:{folder.parent}").name == "files-my-texts--été---v1-2-"
    assert find_source(f"files:{folder}/*.txt").name == "files-x"
    assert find_source(f"files:{folder}/a.txt").name == "files-a-txt"


def test_symlink_loops_terminate(tree: Path) -> None:
    expected = names(tree)
    for name in ("one", "two"):  # two links make 2^40 paths if they are followed
        (tree / "sub" / name).symlink_to(tree, target_is_directory=True)
    assert names(tree) == expected
    assert names(f"{tree}/**") == expected
    assert names(f"{tree}/sub/one") == expected  # a link given by name is followed


def test_file_symlinks_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "target.txt").write_text("a")
    (tree / "link.txt").symlink_to(tmp_path / "target.txt")
    assert "link.txt" in names(tree)


def refused(spec: str | Path, *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        find_source(str(spec))
    for part in fragments:
        assert part in str(caught.value)


def test_missing_text_raises(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "none", f"{tree}/*.none", f"{tree}/x.txt/b.txt"):
        refused(f"files:{where}", "no text found", "nothing", ".jsonl.zst")
    refused(f"files:{tmp_path}/none", "found nothing: no such file or folder")
    refused("files:", "needs a path")
    refused(f"files:{tree}/picture.png", "found only 1 .png", "`--suffix .rst")
    (tmp_path / "notes.txt.gz").touch()
    with pytest.raises(UserError, match=r"found only 1 \.txt\.gz, .*; decompress") as caught:
        find_source(f"files:{tmp_path}/notes.txt.gz")
    assert "--suffix" not in str(caught.value), "which would read the compressed bytes"
    refused(f"files:{tree}/a**", f"{tree}")
    refused("files:" + "x" * 5_000, "cannot read")
    refused("files:~nobody-of-this-name/texts", "cannot find", "~nobody-of-this-name")
    for odd in ("\0", "\0*", "[", "\ud83d", "**"):
        refused(f"files:{tmp_path}/empty/{odd}", "no text found")
    for kind in READER_BY_SUFFIX:
        refused(f"files:{tmp_path / 'empty'}", kind)


def test_unknown_source_suggests_nearest() -> None:
    refused("python-stlib", "did you mean 'python-stdlib'?", "files:PATH")
    refused("file:/tmp", "did you mean 'files:'?")
    refused("tinystorys", "did you mean 'tinystories'?")
    refused("hub", "did you mean")


@pytest.mark.parametrize("spec", ["", "none-such", "hub:", "python-stdlib:3", "files", "wikipedia:en"])
def test_unknown_source_lists_known_sources(spec: str) -> None:
    refused(spec, repr(spec), "python-stdlib", *CORPORA, "hub:NAMESPACE/NAME", "files:PATH")


def test_invalid_variant_raises_before_request() -> None:
    refused("c4:en", "c4 has no variant 'en'; use c4 alone")
    refused("dolma:v1_8", "no variant 'v1_8'", "did you mean", *CORPORA["dolma"].variants)
    for spec in ("hub:TinyStories", "hub:a/b/c", "hub:/b", "hub:a/:*.parquet"):
        refused(spec, "expected hub:NAMESPACE/NAME")


def test_broken_links_are_skipped_and_counted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = names(tree)
    (tree / "sub" / "gone.txt").symlink_to("nowhere.txt")
    (tree / "self.txt").symlink_to("self.txt")
    monkeypatch.setenv("MYLLM_DATA", str(tree / "data"))  # what is below it is told apart by its real path
    assert names(tree) == expected
    assert "2 broken link(s), " in find_source(f"files:{tree}").ignored_note
    assert find_source(f"files:{tree}/sub/*").ignored_note.startswith("ignored 1 broken link(s), 1 .tar.gz, reading 1 ")
    refused(f"files:{tree}/sub/gone.txt", "no text found", "only 1 broken link(s)")


def test_hidden_and_linked_folders_counted(tree: Path, tmp_path: Path) -> None:
    (tree / "linked").symlink_to(tmp_path)
    note = find_source(f"files:{tree}").ignored_note
    counts = "2 hidden folder(s), 1 hidden file(s), 1 link(s) to folders, 1 without suffix, 1 .png, 1 .tar.gz"
    assert note.startswith(f"ignored {counts}, reading 6 other file(s); `--suffix")
    assert note.endswith("; a hidden or linked folder is read where `files:` names it")
    assert names(tree / "sub" / ".cache") == ["f.txt"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "texts").symlink_to(tree)
    refused(f"files:{tmp_path}/only", "found only 1 link(s) to folders, expected", "`files:` names it")
    assert names(tmp_path / "only" / "texts") == names(tree)
    (tmp_path / "only" / "a.txt").write_text("text")
    assert "`--suffix" not in find_source(f"files:{tmp_path}/only").ignored_note


@pytest.fixture
def of_an_ordinary_user(tree: Path) -> Iterator[Path]:
    """A copy of the tree that everybody may read, with this process as an ordinary user: root may read everything."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        copy = shutil.copytree(tree, Path(name) / "tree")
        before = os.geteuid()
        if before == 0:
            os.seteuid(65_534)  # nobody
        yield copy
        os.seteuid(before)
        (copy / "sub" / "deep").chmod(0o755)


def forbid(path: Path, mode: int = 0) -> None:
    """Set the mode of a path, as its owner."""
    user = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(mode)
    os.seteuid(user)


def test_unreadable_file_raises(of_an_ordinary_user: Path) -> None:
    tree = of_an_ordinary_user
    forbid(tree / "b.txt")
    refused(f"files:{tree}", "b.txt", "readable")
    forbid(tree / "b.txt", 0o644)
    forbid(tree / "sub" / "deep")
    refused(f"files:{tree}", "deep", "readable")


def test_unlistable_folder_raises(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(f"files:{tree}", "deep", "Permission denied")


def test_skips_named_pipes(tree: Path) -> None:
    os.mkfifo(tree / "pipe.txt")  # opening it would wait for a writer
    assert "pipe.txt" not in names(tree)


def test_excludes_own_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "more" / "b.txt").write_text("mine too")
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "data"))
    before = [find_source(f"files:{tmp_path}{glob}") for glob in ("", "/**", "/**/*.txt")]
    for folder in ("runs/x", "datasets/y", "tokenizers/z", "listings", "downloads/c4"):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / folder / "log.txt").write_text("not mine")
        (tmp_path / "data" / folder / ".lock").write_text("")
    assert [find_source(f"files:{tmp_path}{glob}") for glob in ("", "/**", "/**/*.txt")] == before
    assert [file.name for file in before[0].files] == ["a.txt", "data/more/b.txt"]
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path))
    assert len(find_source(f"files:{tmp_path}").files) == 7, "other folders of that name are the user's"
    assert [file.name for file in find_source(f"files:{tmp_path}/data/runs/x").files] == ["log.txt"]


def test_bare_path_suggests_files_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    for spec in ("texts", "./texts", str(tmp_path / "texts"), "texts/a.txt", "texts/*.txt"):
        refused(spec, f"did you mean 'files:{spec}'?;")
    refused("./text", "did you mean 'files:./text'? (there is nothing at that path)")
    refused("roneneldan/TinyStories", "did you mean 'hub:roneneldan/TinyStories'")
    refused("fineweb-edu", "did you mean 'fineweb-edu-10bt'")


def test_ignored_files_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.html", "c.html", "d.PDF", "Makefile", ".hidden.html"):
        (tmp_path / name).write_text("text")
    note = find_source(f"files:{tmp_path}").ignored_note
    assert note.startswith(
        "ignored 1 hidden file(s), 2 .html, 1 without suffix, 1 .pdf, reading 1 other file(s); `--suffix .rst"
    )
    (tmp_path / "a.txt").unlink()
    refused(f"files:{tmp_path}", "only 1 hidden file(s), 2 .html, 1 without suffix, 1 .pdf, expected", "`--suffix")


def test_extra_suffixes_read_as_plain_text(tmp_path: Path) -> None:
    for name in ("a.txt", "b.html", "c.RST", "d.pdf", "e.jsonl"):
        (tmp_path / name).write_text('{"text": "' + name + '"}')
    source = find_source(f"files:{tmp_path}", suffixes=(".rst", "html", ".jsonl"))
    read = {file.name: list(read_documents(source, file, tmp_path / file.name, SkipLog())) for file in source.files}
    assert read == {name: ['{"text": "' + name + '"}'] for name in ("a.txt", "b.html", "c.RST")} | {
        "e.jsonl": ["e.jsonl"]
    }, "its own reader stays"
    assert source.ignored_note.startswith("ignored 1 .pdf, ")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.tex").write_text("text")
    refused(f"files:{tmp_path / 'only'}", "only 1 .tex")
    check_source(f"files:{tmp_path / 'only'}", ("*.tex",))
