"""Prompt sources: what is read of files of every form, and what is said of those that cannot be read."""

import csv
import json
import socket
import warnings
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

import lit_align.data
from lit_align.data import (
    CSVPrompts,
    HubPrompts,
    JSONLPrompts,
    JSONPrompts,
    ParquetPrompts,
    PromptDataModule,
    PromptSource,
    ShapesPrompts,
    TextPrompts,
    TSVPrompts,
)
from lit_align.errors import ConfigError

PROMPTS = ["a cat", 'a "dog"\u2028, müde', "", "[a] {bear}"]
ROWS = [{"prompt": prompt, "level": level} for level, prompt in enumerate(PROMPTS)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "data").mkdir()
    return folder


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def every_form(folder: Path, form: str) -> PromptSource:
    """The same rows in a folder with one file of a form."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if form == "text":
        write(folder / "p.txt", b"\xef\xbb\xbf" + "\r\n".join([*PROMPTS, ""]).encode())
        return TextPrompts(str(folder))
    if form == "csv":
        with (folder / "p.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["prompt", "level"], *(row.values() for row in ROWS)])
        return CSVPrompts(str(folder))
    if form == "tsv":
        cells = [["prompt", "level"], *([str(row["prompt"]), str(row["level"])] for row in ROWS)]
        write(folder / "p.tsv", "\n".join(map("\t".join, cells)))
        return TSVPrompts(str(folder))
    if form in ("json", "json texts"):
        write(folder / "p.json", json.dumps(PROMPTS if "texts" in form else ROWS))
        return JSONPrompts(str(folder))
    if form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "p.parquet")
        return ParquetPrompts(str(folder / "*.parquet"))
    write(folder / "p.jsonl", lines)
    return JSONLPrompts(str(folder / "p.jsonl")) if form == "jsonl" else HubPrompts(str(folder))


@pytest.mark.parametrize("form", ["text", "csv", "tsv", "jsonl", "json", "json texts", "parquet", "hub"])
def test_every_form_is_read_alike(folder: Path, form: str) -> None:
    source = every_form(folder, form)
    assert [source.prompt(row) for row in range(len(source))] == PROMPTS == source.prompts(range(4))
    assert source.columns(3) == ({} if form in ("text", "json texts") else {"level": 3})
    assert (source.fingerprint() is None) == (form in ("csv", "tsv"))


@pytest.mark.parametrize("name", ["p [1]*?.txt", ".p.txt", "p{1,2}.txt", "prompts"])
def test_files_of_unusual_names_are_read(folder: Path, name: str) -> None:
    assert TextPrompts(write(folder / name, "a cat\na dog\n")).prompts(range(2)) == ["a cat", "a dog"]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/p-checkpoint.txt", "__MACOSX/._p.txt", "._p.txt"])
def test_hidden_files_of_a_folder_are_not_read(folder: Path, hidden: str) -> None:
    """What Jupyter and macOS leave beside the files that a person sees."""
    (folder / ".hidden" / "prompts" / hidden).parent.mkdir(parents=True)
    write(folder / ".hidden" / "prompts" / hidden, "an old cat\n")
    write(folder / ".hidden" / "prompts" / "p.txt", "a cat\n")
    assert TextPrompts(str(folder / ".hidden" / "prompts")).prompts(range(1)) == ["a cat"]
    assert len(TextPrompts(str(folder / ".hidden" / "prompts"))) == 1


def test_lines_that_may_be_remarks_are_told(folder: Path) -> None:
    path = write(folder / "p.txt", "# animals\na cat\n#2 pencil\n")
    with pytest.warns(UserWarning, match=r"2 lines of .*p\.txt with a # at the start, .*reads as prompts"):
        assert len(TextPrompts(path)) == 3


@pytest.mark.parametrize("text", ["1. a cat\n2. a dog\n", "- a cat\n- a dog\n", '"a cat",\n"a dog"\n'])
def test_lines_of_a_list_are_told(text: str, folder: Path) -> None:
    with pytest.warns(UserWarning, match="are those of a list, such as .*a cat.*delete what does not belong"):
        TextPrompts(write(folder / "p.txt", text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextPrompts(write(folder / "q.txt", '3 cats\n"STOP" on a wall\n1. a cat\n'))


def test_a_table_among_texts_and_files_that_are_missing_are_told(folder: Path) -> None:
    path = write(folder / "p-00000-of-00003.txt", "prompt\tseed\na cat\t1\n")
    with pytest.warns(UserWarning, match="has a tab, which TextPrompts takes as part of the prompt"):
        TextPrompts(path)
    write(folder / "p-00002-of-00003.txt", "a dog\n")
    with pytest.warns(UserWarning, match="holds 2 of 3 files by their names: the others are missing"):
        TextPrompts(str(folder))


@pytest.mark.parametrize("splits", [False, True])
def test_what_datasets_has_saved_is_read(folder: Path, splits: bool) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a cat", "a dog"], "level": [1, 2]})
    saved = datasets.DatasetDict({"train": rows, "test": rows.select([1])}) if splits else rows
    saved.save_to_disk(str(folder))
    source = HubPrompts(str(folder))
    assert [(source.prompt(row), source.columns(row)) for row in range(len(source))] == [
        ("a cat", {"level": 1}),
        ("a dog", {"level": 2}),
    ]
    assert source.fingerprint()
    if splits:
        assert HubPrompts(str(folder), "test").prompts(range(9)) == ["a dog"]
    with pytest.raises(ConfigError, match=r"cannot load split 'train\[:1\]' .* \(it has only train"):
        HubPrompts(str(folder), "train[:1]")


def test_one_of_several_subsets_of_a_dataset(folder: Path) -> None:
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]
    write(folder / "README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for name in ("one", "two"):
        write(folder / f"{name}.jsonl", json.dumps({"prompt": f"a {name}"}))
    assert HubPrompts(str(folder), subset="two").prompts(range(9)) == ["a two"]
    with pytest.raises(ConfigError, match=r"has several subsets: set subset to one of \['one', 'two'\]"):
        HubPrompts(str(folder))


def test_a_file_that_changes_is_read_anew(folder: Path) -> None:
    assert len(TextPrompts(write(folder / "p.txt", "a cat\n"))) == 1
    assert len(TextPrompts(write(folder / "p.txt", "a cat\na dog\n"))) == 2


def test_only_the_columns_to_keep_are_read(tmp_path: Path) -> None:
    texts = [f"prompt {n}" for n in range(300)]
    rows = pa.table({"caption": texts, "jpg_0": [b"x" * 10_000] * 300, "level": list(range(300))})
    pyarrow.parquet.write_table(rows, tmp_path / "p.parquet", compression="none", use_dictionary=False)
    source = ParquetPrompts(str(tmp_path / "p.parquet"), "caption", keep=["level"])
    assert source.columns(7) == {"level": 7}
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.arrow")) < 50_000


def test_numbers_in_a_csv_prompt_column_stay_text(folder: Path) -> None:
    assert CSVPrompts(write(folder / "p.csv", "prompt\n007\n")).prompt(0) == "007"


def test_a_row_of_a_csv_may_be_of_megabytes(folder: Path) -> None:
    source = CSVPrompts(write(folder / "p.csv", f"prompt,data\na cat,{'x' * 3_000_000}\na dog,y\n"))
    assert (source.prompts(range(2)), len(source.columns(0)["data"])) == (["a cat", "a dog"], 3_000_000)


def test_geneval_lists_of_several_types_are_read_as_they_are(folder: Path) -> None:
    beside = {"class": "cat", "count": 1, "position": ["left of", 0]}
    rows = [
        {"tag": "counting", "include": [{"class": "clock", "count": 3}], "prompt": "a photo of three clocks"},
        {
            "tag": "position",
            "include": [{"class": "bed", "count": 1}, beside],
            "prompt": "a cat left of a bed",
        },
    ]
    source = JSONLPrompts(write(folder / "m_metadata.jsonl", "\n".join(map(json.dumps, rows))))
    for number, row in enumerate(rows):
        assert source.columns(number) | {"prompt": source.prompt(number)} == row


def test_numbers_and_texts_like_numbers_in_one_column_are_read(folder: Path) -> None:
    lines = '{"prompt": "a cat", "id": 7}\n{"prompt": "a dog", "id": "0008"}\n'
    source = JSONLPrompts(write(folder / "p.jsonl", lines))
    assert [source.columns(row)["id"] for row in range(2)] == [7, "0008"]


def test_views_of_text_are_text(folder: Path) -> None:
    table = pa.table({"prompt": pa.array(["a cat", "a dog"], pa.string_view())})
    pyarrow.parquet.write_table(table, folder / "p.parquet")
    assert ParquetPrompts(str(folder)).prompts(range(2)) == ["a cat", "a dog"]


# What cannot be read


def shards(folder: Path, *, broken: bool = False, column: str = "prompt", level: Any = 1) -> str:
    """Three Parquet files, of which the second is broken or has another column or type."""
    for number in range(3):
        pyarrow.parquet.write_table(pa.table({"prompt": ["a"], "level": [1]}), folder / f"{number}.parquet")
    bad = folder / "1.parquet"
    pyarrow.parquet.write_table(pa.table({column: ["a"], "level": [level]}), bad)
    if broken:
        data = bytearray(bad.read_bytes())
        data[4:60] = bytes(56)
        bad.write_bytes(data)
    return str(folder)


def mapped(folder: Path) -> str:
    """A Parquet file with a column of mappings."""
    mappings = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    pyarrow.parquet.write_table(pa.table({"prompt": ["a"], "level": mappings}), folder / "p.parquet")
    return str(folder / "p.parquet")


def two(folder: Path, name: str, content: str | bytes) -> str:
    """A good file beside another; the path is that of the folder."""
    write(folder / f"a{Path(name).suffix}", '{"prompt": "a"}\n')
    write(folder / name, content)
    return str(folder)


def parted(folder: Path) -> str:
    """Folders of the splits, with files of one name."""
    for split in ("train", "test"):
        (folder / split).mkdir()
        write(folder / split / "a.txt", f"a cat of {split}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: TextPrompts(str(d / "none.txt")), ["none.txt", "does not exist", "check"]),
        (lambda d: TextPrompts(str(d / "*.txt")), ["*.txt", "does not exist"]),
        (lambda d: ParquetPrompts(str(d)), ["folder without .parquet files"]),
        (lambda d: CSVPrompts(str(d)), ["folder", "path of a file"]),
        (lambda d: CSVPrompts(two(d, "p.csv", "prompt\na\n")), ["means 2 files", "path of a file"]),
        (lambda d: TextPrompts(write(d / "p.txt", "")), ["p.txt", "is empty", "at least one prompt"]),
        (lambda d: TextPrompts(two(d, "p.txt", "")), ["p.txt", "is empty", "delete or restore"]),
        (lambda d: TextPrompts(two(d, "p.txt", b"a\nb\xe4r")), ["p.txt", "not UTF-8", "0xe4", "line 2"]),
        (lambda d: CSVPrompts(write(d / "p.csv", b"prompt\nb\xe4r")), ["not UTF-8", "line 2"]),
        (
            lambda d: CSVPrompts(write(d / "p.xlsx", b"PK\x03\x04\xff")),
            ["spreadsheet", "save the sheet as CSV"],
        ),
        (lambda d: JSONLPrompts(two(d, "p.jsonl", b'{"prompt": "b\xe4r"}\n')), ["p.jsonl", "not UTF-8"]),
        (
            lambda d: TextPrompts(write(d / "p.csv", "prompt\na\n")),
            ["has the name of a table", "give CSVPrompts"],
        ),
        (
            lambda d: TextPrompts(write(d / "p.txt", '{"prompt": "a"}\n')),
            ["begins with JSON", "JSONLPrompts"],
        ),
        (
            lambda d: TextPrompts(write(d / "p.txt", '[{"prompt": "a"}]')),
            ["begins with JSON", "JSONPrompts"],
        ),
        (lambda d: TextPrompts(write(d / "p.txt", '["a", "b"]')), ["begins with JSON", "JSONPrompts"]),
        (lambda d: TextPrompts(write(d / "p.txt", '[\n"a",\n"b"]')), ["begins with JSON", "JSONPrompts"]),
        (lambda d: JSONPrompts(write(d / "p.json", '{"prompt": ["a", "b"]}')), ["give each prompt a row"]),
        (
            lambda d: CSVPrompts(write(d / "p.csv", "a cat\na dog\n")),
            ["first line of", "has no column 'prompt'"],
        ),
        (
            lambda d: CSVPrompts(write(d / "p.csv", "prompt,level\na cat, red,1\n")),
            ["Expected 2 columns, got 3 in 'a cat, red,1'", "put quotes around prompts that hold a comma"],
        ),
        (lambda d: TextPrompts("https://a.b/p.txt"), ["https://a.b/p.txt is an address: download"]),
        (lambda d: TextPrompts(write(d / "p.JSONL", '{"prompt": "a"}\n')), ["give JSONLPrompts"]),
        (lambda d: TextPrompts(write(d / "p.txt", b"\xef\xbb\xbf")), ["has no rows"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt;style\na;b\n")), ["has ';' between its columns"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt\tstyle\na\tb\n")), ["has '\\t' between", "save it"]),
        (lambda d: TSVPrompts(write(d / "p.tsv", "prompt,style\na,b\n")), ["has ',' between its columns"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "id, prompt\n1, a\n")), ["did you mean column: ' prompt'?"]),
        (lambda d: TextPrompts(parted(d)), ["several splits", "test/a.txt and train/a.txt", "/test/*.txt"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "promt,level\na,1\n")), ["promt, level", "column: promt"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt\n")), ["no rows"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt,level\na,b,c\n")), ["p.csv", "not CSV"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt,prompt\na,b\n")), ["two columns"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", "a cat\n")), ["p.jsonl", "not JSON lines"]),
        (lambda d: JSONLPrompts(two(d, "p.jsonl", '{"prompt": "a"}\n{"pro')), ["p.jsonl", "not JSON lines"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", "\n")), ["p.jsonl"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", '{"prompt": 3}\n')), ["int64", "not text"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", '{"Prompts": "a"}\n')), ["column: Prompts"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", '{"text": "a"}\n'), "zzz"), ["'zzz'", "text"]),
        (lambda d: JSONPrompts(write(d / "p.json", '["a", 3]')), ["p.json", "not text"]),
        (lambda d: JSONPrompts(write(d / "p.json", '["a"')), ["p.json", "not one JSON list"]),
        (lambda d: JSONPrompts(write(d / "p.json", '[{"prompt": "a"}, 3]')), ["p.json", "not one JSON list"]),
        (lambda d: JSONPrompts(write(d / "p.json", "[]")), ["p.json", "no rows"]),
        (lambda d: ParquetPrompts(write(d / "p.parquet", "no")), ["p.parquet", "not Parquet"]),
        (lambda d: ParquetPrompts(shards(d, broken=True)), ["1.parquet", "not Parquet"]),
        (lambda d: ParquetPrompts(shards(d, column="Promt")), ["1.parquet", "column: Promt"]),
        (lambda d: ParquetPrompts(mapped(d)), ["map<string", "datasets does not read", "without it"]),
        (lambda d: ParquetPrompts(shards(d), keep=["style"]), ["0.parquet", "'style'"]),
        (lambda d: ParquetPrompts(shards(d, level="one")), ["do not fit together", "same type"]),
        (lambda d: HubPrompts(str(d / "nobody")), ["nobody", "check the name", "local file"]),
        (lambda d: ShapesPrompts([]), ["kinds", "empty", "single"]),
        (lambda d: PromptDataModule(TextPrompts(write(d / "p.txt", " \n\n"))).setup(), ["no usable prompt"]),
    ],
)
def test_a_source_that_cannot_work_says_why(
    folder: Path, make: Any, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    if "nobody" not in words:
        assert not capfd.readouterr().err  # no second message of a library


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ("a cat\n'a'\n\"best burger in town\na dog\na horse", 4),
        ('a cat\n"best burger\na dog\n"a horse\na fish', 3),
        ('a cat\n"STOP" painted on a wall', 3),
    ],
)
def test_a_quote_that_is_not_closed_is_an_error(folder: Path, lines: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"p\.csv is not CSV .*starts in line {line}\): close its quotes"):
        CSVPrompts(write(folder / "p.csv", f"prompt\n{lines}\n"))


def test_rows_of_several_lines_are_told(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 row of .*p\.csv with a line break .* line 3 on"):
        source = CSVPrompts(write(folder / "p.csv", 'prompt\na cat\n"a dog,\nasleep"\na "quoted" word\n'))
    assert source.prompts(range(3)) == ["a cat", "a dog,\nasleep", 'a "quoted" word']


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"p\.txt cannot be written into the cache at .* HF_DATASETS_CACHE"):
        TextPrompts(write(folder / "p.txt", "a cat\n"))


def test_files_are_read_without_a_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` counts its readers with a request, and waits for a name server that does not answer."""
    asked: list[object] = []

    def answer(*arguments: object, **options: object) -> list[tuple[Any, ...]]:
        asked.append(arguments)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    TextPrompts(write(folder / "p.txt", "a cat\n"))
    JSONLPrompts(write(folder / "p.jsonl", '{"prompt": "a cat"}\n'))
    ParquetPrompts(shards(folder))
    assert not asked


def test_the_number_of_prompts_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder / "p.txt", "a cat\n\n a cat \na dog\n  \na cat\n")
    with caplog.at_level("INFO"):
        data = PromptDataModule(
            TextPrompts(path), validation_fraction=0, test_fraction=0, prompts_per_batch=2
        )
        data.setup("fit")
    assert f"{path}: 6 prompts read; 2 empty and 2 repeated prompts dropped, 2 left" in caplog.text
    assert set(next(iter(data.train_dataloader())).prompts) == {"a cat", "a dog"}


def test_prompts_and_what_is_shared_know_nothing_of_preferences() -> None:
    folder = Path(lit_align.data.__file__).parent
    for file in (*(folder / "prompts").glob("*.py"), *folder.glob("[!_]*.py")):
        assert "data.preferences" not in file.read_text(), file
