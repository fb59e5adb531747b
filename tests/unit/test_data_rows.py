"""Reading rows from every kind of file, and one line for everything that can be wrong."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.rows import load_rows
from rlhf.errors import InputError

ROWS = [{"prompt": "Hi, you", "source": "a"}, {"prompt": 'Line one\nline "two", é', "source": "b"}]


def _write(folder: Path, name: str) -> Path:
    plain = folder / name.removesuffix(".gz")
    if plain.suffix == ".jsonl":
        plain.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif plain.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), plain)
    else:
        with plain.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["prompt", "source"])
            writer.writeheader()
            writer.writerows(ROWS)
    if not name.endswith(".gz"):
        return plain
    file = folder / name
    file.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return file


def _message(path: str | Path, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        load_rows(str(path), split="train", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, zipped: str) -> None:
    assert load_rows(str(_write(tmp_path, f"rows.{kind}{zipped}")), split="train") == ROWS


def test_extension_is_read_in_any_case(tmp_path: Path) -> None:
    file = _write(tmp_path, "rows.csv").rename(tmp_path / "ROWS.CSV")
    assert load_rows(str(file), split="train") == ROWS


def test_json_file_with_one_object_a_line(tmp_path: Path) -> None:
    file = _write(tmp_path, "rows.jsonl").rename(tmp_path / "rows.json")
    assert load_rows(str(file), split="train") == ROWS


def test_csv_values_stay_strings(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("prompt,n\n007,NA\n,1.0\n")
    assert load_rows(str(tmp_path / "n.csv"), split="train") == [
        {"prompt": "007", "n": "NA"},
        {"prompt": "", "n": "1.0"},
    ]


def test_parquet_keeps_chat_messages(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    assert load_rows(str(tmp_path / "chat.parquet"), split="train") == rows


def test_local_dataset_folder_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "three"}\n')
    assert [row["prompt"] for row in load_rows(str(folder), split="train")] == ["one", "two"]
    assert load_rows(str(folder), split="test") == [{"prompt": "three"}]
    with pytest.raises(InputError, match=r"prompts\.split = dev.*Unknown split"):
        load_rows(str(folder), split="dev")


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/file.csv.gz", "a/b/c", "~/missing-folder-x"])
def test_missing_file(path: str) -> None:
    message = _message(path, key="prompts.eval")
    assert message.startswith(f"prompts.eval.path = {path}: no such file; give a")


def test_dataset_id_that_cannot_be_fetched(tmp_path: Path) -> None:
    # A process of its own: offline mode is read when the library is imported.
    code = (
        "from rlhf.data.rows import load_rows\nfrom rlhf.errors import InputError\n"
        "try:\n    load_rows('nobody/no-such-set', split='train', name='default')\n"
        "except InputError as error:\n    print(error)\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.count("\n") == 1
    assert ran.stdout.startswith(
        "prompts.path = nobody/no-such-set: cannot load it as a Hugging Face dataset "
        "(prompts.split = train, prompts.name = default): "
    )
    assert ran.stdout.endswith("check the id, the split and the connection, or give a local file\n")


@pytest.mark.parametrize(("name", "content"), [("e.jsonl", b"\n \n"), ("e.json", b"[]"), ("e.csv", b"prompt\n")])
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert _message(tmp_path / name).endswith("there are no rows in it; give a dataset with at least one row")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("b.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "cannot be read as jsonl: line 2 is not valid JSON"),
        ("b.jsonl", b'{"prompt": "\xff"}\n', "cannot be read as jsonl: 'utf-8' codec"),
        ("b.json", b"[1, 2", "cannot be read as json: "),
        ("b.json", b'["just a string"]', "row 1 is a str; every row must be an object of columns"),
        ("b.csv", b"prompt\none,two\n", "cannot be read as csv: line 2 has more fields than the header"),
        ("b.parquet", b"not a parquet file", "cannot be read as parquet: "),
        ("b.jsonl.gz", b"not gzipped", "cannot be read as jsonl: Not a gzipped file"),
        ("b.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], "cannot be read as jsonl: "),
        ("b.txt", b"hello", "unknown kind of file; expected .jsonl, .json, .parquet, .csv, optionally with .gz"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert _message(tmp_path / name).startswith(f"prompts.path = {tmp_path / name}: {expected}")
